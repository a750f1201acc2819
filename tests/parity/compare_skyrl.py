"""SkyRL: its registered losses under its own configuration."""

import runpy
from pathlib import Path

# on Python 3.11 SkyRL's request types need this; no loss depends on it
runpy.run_path(str(Path(__file__).parents[1] / "integrations" / "skyrl" / "python311" / "sitecustomize.py"))

from skyrl.backends.skyrl_train.utils.ppo_utils import (  # noqa: E402
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
)
from skyrl.train.config import SkyRLTrainConfig  # noqa: E402
from tensors import by_autograd  # noqa: E402

from drpo_core.modes._skyrl import LOSSES, REDUCTIONS  # noqa: E402

FUNCTION = "`PolicyLossRegistry` and `apply_loss_reduction_to_advantages_minibatch` of `ppo_utils`"
PACKAGES = ("skyrl", "torch")
PRECISION = "float32"
OWN_VALUE = ("rollout_is",)
SECTIONS = {"cispo": "cispo", "delta": "dppo", "dppo": "dppo", "tau": "sapo"}
SECTIONS |= dict.fromkeys(("tis", "token", "sequence", "geo", "product", "outlier"), "off_policy_correction")
OWN = {
    # in 0.3.0 these two default to what are ratios in 0.4, and cispo has no anchor to choose
    "cispo": {"cispo_eps_clip_low": 0.05, "cispo_eps_clip_high": 0.1},
    "dppo": {"delta_low": 0.02, "delta_high": 0.03},
    "sapo": {},
    "importance_sampling": {},
    "dual_clip": {"eps_clip_low": 0.05, "eps_clip_high": 0.1, "clip_ratio_c": 1.15},
}
CORRECTIONS = [
    {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.02},
    {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.05},
    {"sequence_mask_metric": "geometric"},
    {"sequence_mask_metric": "product", "product_mask_low": 0.95, "product_mask_high": 1.05},
    {"outlier_token_is_threshold_low": 0.94, "outlier_token_is_threshold_high": 1.06},
    {"token_mask_is_threshold_low": 0.97, "token_mask_is_threshold_high": 1.02, "tis_ratio_type": "token"},
]


def algorithm(name, keys):
    """`trainer.algorithm` of SkyRL's command line."""
    overrides = [f"trainer.algorithm.policy_loss_type={name}"]
    for key, value in keys.items():
        section = SECTIONS.get(key.partition("_")[0])
        overrides.append(f"trainer.algorithm.{section + '.' if section else ''}{key}={value}")
    return SkyRLTrainConfig.from_cli_overrides(overrides).trainer.algorithm


def theirs(name, keys):
    """Loss and gradient of SkyRL."""
    if name == "cispo":
        keys = {"cispo_eps_clip_low": 1.0, "cispo_eps_clip_high": 4.0, **keys}
    config = algorithm(name, keys)

    def loss(batch):
        mask = batch["mask"].double()
        scaled = apply_loss_reduction_to_advantages_minibatch(
            batch["advantages"], mask, config.loss_reduction, len(mask), keys.get("max_seq_len")
        )
        old, rollout = batch["proximal_log_prob"], batch["behavior_log_prob"]
        value, _ = PolicyLossRegistry.get(name)(batch["log_prob"], old, scaled, config, mask, rollout)
        return value

    return by_autograd(loss)


def _settings():
    for name in LOSSES:
        own = OWN.get(name, {"eps_clip_low": 0.05, "eps_clip_high": 0.1})
        for reduction in REDUCTIONS:
            width = {"max_seq_len": 20} if reduction == "seq_mean_token_sum_norm" else {}
            yield name, {**own, "loss_reduction": reduction, **width}
        if name in ("dppo", "rollout_is"):
            yield name, {**own, "tis_ratio_type": "token"}
        elif name != "importance_sampling":
            yield from ((name, {**own, **keys}) for keys in CORRECTIONS)


SETTINGS = tuple(_settings())
