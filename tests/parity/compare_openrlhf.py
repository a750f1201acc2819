"""OpenRLHF: its `PolicyLoss` module and its KL, put together as its actor does; DeepSpeed is a placeholder."""

from sources import isolate

PLACEHOLDERS = ("deepspeed", "flash_attn", "transformers")
isolate("openrlhf", placeholders=PLACEHOLDERS)

from openrlhf.models.loss import PolicyLoss, aggregate_loss  # noqa: E402
from openrlhf.models.utils import compute_approx_kl  # noqa: E402
from tensors import by_autograd  # noqa: E402
from test_openrlhf import CLIPS, MASKS, VARIANTS, bounds  # noqa: E402

from drpo_core.modes._openrlhf import DEFAULTS  # noqa: E402

FUNCTION = "`PolicyLoss`, `aggregate_loss` and `compute_approx_kl` of `openrlhf.models`"
PACKAGES = ("openrlhf", "torch")
SETTINGS = [*VARIANTS, *(("ppo", keys) for keys in MASKS + CLIPS)]


def theirs(name, keys):
    """Loss and gradient of OpenRLHF."""
    c = {**DEFAULTS, **keys}
    low, high = c["actor.eps_clip_low_high"] or (c["actor.eps_clip"], c["actor.eps_clip"])
    by_token = c["actor.loss_agg_mode"] == "token-mean"
    options = {
        key: c[f"algo.advantage.{key}"] for key in ("is_correction_level", "is_correction_mode", "is_correction_gating")
    }
    module = PolicyLoss(
        low, high, c["actor.dual_clip"], by_token, policy_loss_type=name, is_correction_threshold=bounds(c), **options
    )

    def loss(batch):
        x, mask = batch["log_prob"], batch["mask"].double()
        value, *_ = module(
            x,
            batch["proximal_log_prob"],
            batch["advantages"],
            action_mask=mask,
            rollout_log_probs=batch["behavior_log_prob"],
        )
        if c["algo.kl.use_loss"]:
            kl = compute_approx_kl(x, batch["reference_log_prob"], kl_estimator=c["algo.kl.estimator"])
            value = value + c["algo.kl.init_coef"] * aggregate_loss(kl, mask)
        return value

    return by_autograd(loss)
