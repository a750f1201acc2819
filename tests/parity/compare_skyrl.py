"""SkyRL: its registered losses under its own configuration."""

from sources import checkout, isolate

RELEASE = "a956457"
PLACEHOLDERS = ("skyrl.backends.skyrl_train.inference_servers",)
values = {"skyrl.train.config": {"AlgorithmConfig": object}}
isolate("skyrl", root=checkout("skyrl", RELEASE), placeholders=PLACEHOLDERS, values=values)

from skyrl.backends.skyrl_train.utils.ppo_utils import (  # noqa: E402
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
)
from skyrl.train.config.config import SkyRLTrainConfig  # noqa: E402
from tensors import by_autograd  # noqa: E402

from drpo_core.modes._skyrl import LOSSES, REDUCTIONS  # noqa: E402

FUNCTION = "`PolicyLossRegistry` and `apply_loss_reduction_to_advantages_minibatch` of `ppo_utils`"
PACKAGES = ("torch", "omegaconf")
PRECISION = "float32"
SECTIONS = {"cispo": "cispo", "delta": "dppo", "dppo": "dppo", "tau": "sapo"}
SECTIONS |= dict.fromkeys(("kl_cov_frac", "ppo_kl_coef"), "kl_cov")
SECTIONS |= dict.fromkeys(("tis", "token", "sequence", "geo", "product", "outlier"), "off_policy_correction")
OWN = {
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
        section = SECTIONS.get(key, SECTIONS.get(key.partition("_")[0]))
        if value is not None:
            overrides.append(f"trainer.algorithm.{section + '.' if section else ''}{key}={value}")
    return SkyRLTrainConfig.from_cli_overrides(overrides).trainer.algorithm


def own_value(name, _keys):
    """SkyRL: −A r log π."""
    return name == "rollout_is"


def theirs(name, keys):
    """Loss and gradient of SkyRL."""
    config = algorithm(name, keys)

    def loss(batch):
        mask, scaled = batch["mask"].double(), batch["advantages"]
        # None: they are divided already
        if keys.get("loss_reduction", "") is not None:
            scaled = apply_loss_reduction_to_advantages_minibatch(
                scaled, mask, config.loss_reduction, len(mask), keys.get("max_seq_len")
            )
        old, rollout = batch["proximal_log_prob"], batch["behavior_log_prob"]
        value, _ = PolicyLossRegistry.get(name)(batch["log_prob"], old, scaled, config, mask, rollout)
        return value

    return by_autograd(loss)


def _settings():
    # not 0.05, where tokens of equal covariance would be divided: SkyRL chooses among them by their order
    for share in (2e-4, 0.07, 0.29):
        yield "kl_cov", {"kl_cov_frac": share, "ppo_kl_coef": 0.7, "loss_reduction": None}
    for name in LOSSES:
        if name == "kl_cov":
            continue
        own = OWN.get(name, {"eps_clip_low": 0.05, "eps_clip_high": 0.1})
        # the prompts are no key
        for reduction in (r for r in REDUCTIONS if r != "prompt_mean"):
            width = {"max_seq_len": 20} if reduction == "seq_mean_token_sum_norm" else {}
            yield name, {**own, "loss_reduction": reduction, **width}
        if name == "cispo":
            yield name, {**own, "cispo_anchor": "rollout"}
        if name == "dppo":
            yield name, {"dppo_type": "binary_kl", "delta_low": 1e-3, "delta_high": 2e-3}
        if name in ("dppo", "rollout_is"):
            yield name, {**own, "tis_ratio_type": "token"}
        elif name != "importance_sampling":
            yield from ((name, {**own, **keys}) for keys in CORRECTIONS)


SETTINGS = tuple(_settings())
