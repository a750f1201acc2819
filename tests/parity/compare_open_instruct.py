"""open-instruct: its loss and its correction, put together as its trainer does; what no loss uses is a placeholder."""

from types import SimpleNamespace

from sources import checkout, isolate

RELEASE = "e6c3044"
PLACEHOLDERS = (
    "accelerate", "datasets", "deepspeed", "huggingface_hub", "olmo_core", "open_instruct.data_loader",
    "open_instruct.data_types", "open_instruct.ground_truth_utils", "open_instruct.logger_utils",
    "open_instruct.olmo_core_utils", "open_instruct.utils", "pandas", "ray", "rich", "transformers", "wandb",
)  # fmt: skip
isolate("open_instruct", root=checkout("open_instruct", RELEASE), placeholders=PLACEHOLDERS)

from open_instruct.grpo_utils import compute_grpo_loss, compute_rho_correction  # noqa: E402
from open_instruct.rl_utils import masked_mean  # noqa: E402
from tensors import by_autograd  # noqa: E402
from test_open_instruct import CLIP, MASKS, VARIANTS  # noqa: E402

from drpo_core.modes._open_instruct import DEFAULTS  # noqa: E402

FUNCTION = "`compute_grpo_loss` and `compute_rho_correction` of `open_instruct/grpo_utils.py`"
PACKAGES = ("torch",)
SETTINGS = [*VARIANTS, *(("dapo", {**CLIP, **keys}) for keys in MASKS)]


def theirs(name, keys):
    """Loss and gradient of open-instruct."""
    config = SimpleNamespace(**{**DEFAULTS, **keys}, loss_fn=name)
    # its configuration refuses both
    config.use_rho_correction = config.use_rho_correction and not config.use_vllm_logprobs

    def loss(batch):
        x, mask, advantages = batch["log_prob"], batch["mask"], batch["advantages"]
        rollout = batch["behavior_log_prob"]
        old = rollout if config.use_vllm_logprobs else batch["proximal_log_prob"]
        tokens, _, kl = compute_grpo_loss(
            x,
            (x - old).exp(),
            advantages,
            batch["reference_log_prob"] if config.load_ref_policy else None,
            config,
            compute_rho_correction(old, rollout, mask, advantages, config).weights,
        )
        return masked_mean(tokens + config.beta * kl, mask)

    return by_autograd(loss)
