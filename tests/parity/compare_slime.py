"""slime: `policy_loss_function` with log-probs in the place of those it computes from logits; Megatron is a placeholder."""

from types import SimpleNamespace

from sources import checkout, isolate

RELEASE = "624b824"
PLACEHOLDERS = ("megatron", "slime.utils.distributed_utils", "slime.utils.misc", "slime.utils.types")
values = {
    "megatron.core.mpu": {"get_context_parallel_world_size": lambda: 1, "get_data_parallel_world_size": lambda **_options: 1},
}
isolate("slime", root=checkout("slime", RELEASE), placeholders=PLACEHOLDERS, values=values)

import torch  # noqa: E402
from slime.backends.megatron_utils import loss as theirs_loss  # noqa: E402
from tensors import by_autograd  # noqa: E402
from test_slime import VARIANTS  # noqa: E402

from drpo_core.modes._slime import DEFAULTS, LOSSES  # noqa: E402

FUNCTION = "`policy_loss_function` of `slime/backends/megatron_utils/loss.py`"
PACKAGES = ("torch",)
SETTINGS = [
    *((name, keys) for name in LOSSES for keys in VARIANTS if name != "gspo" or "use_tis" not in keys),
    ("grpo", {"eps_clip": 0.05, "eps_clip_c": 1.1}),
]


def load_function(path):
    """A function of slime's by its path."""
    return getattr(theirs_loss, path.rpartition(".")[-1])


def theirs(name, keys):
    """Loss and gradient of slime."""
    c = {**DEFAULTS, **keys}
    high = c["eps_clip"] if c["eps_clip_high"] is None else c["eps_clip_high"]
    options = {
        "loss_type": "policy_loss",
        "recompute_loss_function": False,
        "allgather_cp": False,
        "get_mismatch_metrics": False,
    }
    options["rollout_top_p"] = 1.0
    arguments = SimpleNamespace(**{**c, "eps_clip_high": high}, **options, advantage_estimator=name)

    def loss(batch):
        x, mask = batch["log_prob"], batch["mask"]
        rows = {
            "log_probs": batch["proximal_log_prob"],
            "rollout_log_probs": batch["behavior_log_prob"],
            "ref_log_probs": batch["reference_log_prob"],
            "advantages": batch["advantages"],
            "loss_masks": mask.double(),
        }
        given = {key: list(value) for key, value in rows.items()}
        widths = [mask.shape[1]] * len(mask)
        given |= {"response_lengths": widths, "total_lengths": widths, "unconcat_tokens": None}
        given["rollout_mask_sums"] = list(mask.sum(dim=-1))
        theirs_loss.load_function = load_function
        theirs_loss.all_gather_with_cp = lambda tensor, *_lengths: tensor
        found = {"log_probs": list(x), "entropy": list(torch.zeros_like(x))}
        theirs_loss.get_log_probs_and_entropy = lambda *_arguments, **_options: (None, found)
        value, tokens, _ = theirs_loss.loss_function(arguments, given, 1, len(mask), x)
        return value / tokens

    return by_autograd(loss)
