"""NeMo-RL: its `ClippedPGLossFn`, whose imports that no loss uses are placeholders."""

from sources import checkout, isolate

RELEASE = "7ea279a"
PLACEHOLDERS = (
    "nemo_rl.algorithms.x_token", "nemo_rl.data", "nemo_rl.distributed", "nemo_rl.models", "nemo_rl.utils",
    "transformers",
)  # fmt: skip
isolate("nemo_rl", root=checkout("nemo_rl", RELEASE), placeholders=PLACEHOLDERS)

import torch  # noqa: E402
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig, ClippedPGLossFn  # noqa: E402
from tensors import by_autograd  # noqa: E402
from test_nemo_rl import VARIANTS  # noqa: E402

FUNCTION = "`ClippedPGLossFn` of `nemo_rl/algorithms/loss/loss_functions.py`"
PACKAGES = ("torch", "pydantic")
NAMES = ("sequence_level_importance_ratios", "use_cispo", "disable_ppo_ratio", "force_on_policy_ratio")
# a KL that is weighted with ratios exceeds the clamp, which the mode does not have
UNCLAMPED = {"kl_output_clamp_value": None}
SETTINGS = [
    (
        next((name for name in NAMES if name in keys), "none"),
        {**keys, **(UNCLAMPED if "use_on_policy_kl_approximation" in keys else {})},
    )
    for keys in VARIANTS
]


def own_value(name, _keys):
    """NeMo-RL: −A."""
    return name == "force_on_policy_ratio"


def theirs(_name, keys):
    """Loss and gradient of NeMo-RL."""
    function = ClippedPGLossFn(ClippedPGLossConfig(**keys))

    def loss(batch):
        mask = batch["mask"].double()

        # its arrays are of inputs, of which the first has no log-prob
        def shifted(tensor):
            return torch.cat([torch.zeros_like(tensor[:, :1]), tensor], dim=1)

        rows = {
            "token_mask": mask,
            "advantages": batch["advantages"],
            "prev_logprobs": batch["proximal_log_prob"],
            "generation_logprobs": batch["behavior_log_prob"],
            "reference_policy_logprobs": batch["reference_log_prob"],
        }
        data = {key: shifted(value) for key, value in rows.items()}
        data["sample_mask"] = torch.ones(len(mask), dtype=torch.float64)
        return function(batch["log_prob"], data, mask.new_tensor(len(mask)), mask.sum())[0]

    return by_autograd(loss)
