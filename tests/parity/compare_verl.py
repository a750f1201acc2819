"""verl: its registered losses, its rollout correction and its KL, put together as its trainer and its `ppo_loss` do."""

from tensors import by_autograd
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.rollout_corr_helper import (
    SUPPORTED_ROLLOUT_RS_OPTIONS,
    compute_rollout_correction_and_rejection_mask,
)
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from drpo_core import modes
from drpo_core.modes._verl import DEFAULTS, LOSSES, REDUCTIONS

FUNCTION = (
    "`POLICY_LOSS_REGISTRY`, `agg_loss` and `kl_penalty` of `core_algos`; `compute_rollout_correction_and_rejection_mask`"
)
PACKAGES = ("verl", "torch")
ACTOR = {"clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg"}
ACTOR |= {"loss_agg_mode", "loss_scale_factor", "use_kl_loss", "kl_loss_coef", "kl_loss_type"}
KEYS = {
    "gspo": {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03},
    "dro": {"dro_beta": 0.3},
    "kl_cov": {"kl_cov_ratio": 0.07, "ppo_kl_coef": 0.7},
    "dppo_tv": {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02},
    "dppo_kl": {"clip_ratio_low": 0.001, "clip_ratio_high": 0.002},
    "geo_mean": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.05},
}
LIMITS = {"token": 1e-3, "seq_sum": 0.008, "seq_mean": 1e-3, "seq_max": 4e-3}
KL = ("kl", "mse", "low_var_kl", "k1+", "k2+", "k3+", "kl+", "mse+", "low_var_kl+")


def own_value(name, _keys):
    """verl: −A min(r, c) log π, and −A times the ratio of the sequence."""
    return name in ("dppo_tv", "dppo_kl", "geo_mean")


def theirs(loss_mode, keys):
    """Loss and gradient of verl."""
    values = {**DEFAULTS, **keys}
    correction = RolloutCorrectionConfig(
        **{
            name: value
            for name, value in values.items()
            if name.startswith("rollout_") or name in ("bypass_mode", "loss_type")
        }
    )
    own = {name: values[name] for name in ("dro_beta", "kl_cov_ratio", "ppo_kl_coef")}
    policy_loss = PolicyLossConfig(loss_mode=loss_mode, **own, rollout_correction=correction)
    config = FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=policy_loss,
        **{name: values[name] for name in ACTOR},
    )
    config.global_batch_info["loss_scale_factor"] = values["loss_scale_factor"]
    bypass = correction.bypass_mode or loss_mode == "bypass_mode"

    def loss(batch):
        proximal, behavior, mask = batch["proximal_log_prob"], batch["behavior_log_prob"], batch["mask"]
        weights = None
        if bypass:
            proximal = behavior
        else:
            names = ("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize", "rollout_rs", "rollout_rs_threshold")
            found, mask, _ = compute_rollout_correction_and_rejection_mask(
                proximal, behavior, mask, **{name: getattr(correction, name) for name in names}
            )
            weights = None if found is None else found.batch["rollout_is_weights"]
        common = {"loss_agg_mode": config.loss_agg_mode}
        loss, _ = get_policy_loss_fn("bypass_mode" if bypass else loss_mode)(
            old_log_prob=proximal,
            log_prob=batch["log_prob"],
            advantages=batch["advantages"],
            response_mask=mask,
            config=config,
            rollout_is_weights=weights,
            **common,
        )
        if config.use_kl_loss:
            kl = kl_penalty(batch["log_prob"], batch["reference_log_prob"], config.kl_loss_type)
            loss = loss + config.kl_loss_coef * agg_loss(kl, mask, **common, **config.global_batch_info)
        return loss

    return by_autograd(loss)


def _settings():
    for loss_mode in LOSSES:
        if loss_mode == "bypass_mode":
            continue
        for aggregation in REDUCTIONS:
            scaled = aggregation == "seq-mean-token-sum-norm" and loss_mode not in ("sapo", "geo_mean")
            yield (
                loss_mode,
                {**KEYS.get(loss_mode, {}), "loss_agg_mode": aggregation, **({"loss_scale_factor": 512} if scaled else {})},
            )
    for ratio in (0.01, 0.29, 1.0):
        yield "kl_cov", {"kl_cov_ratio": ratio}
    for rule in sorted(SUPPORTED_ROLLOUT_RS_OPTIONS):
        for bypass in ({}, {"bypass_mode": True}):
            # π/μ is further from 1 than π_old/μ
            k1, scale = ("0.85_1.1", 20.0) if bypass else ("0.97_1.02", 1.0)
            threshold = k1 if rule.endswith("k1") else scale * LIMITS[rule[:-3]]
            yield "vanilla", {"rollout_rs": rule, "rollout_rs_threshold": threshold, "rollout_is": "token", **bypass}
    for loss_mode in ("gspo", "geo_mean", "cispo", "dppo_tv"):
        keys = {"rollout_rs": "seq_mean_k3,seq_sum_k1", "rollout_rs_threshold": "0.002,0.8_1.25"}
        yield loss_mode, {**KEYS.get(loss_mode, {}), **keys, "rollout_is": "sequence", "rollout_is_threshold": 1.05}
    for kind in KL:
        keys = {"kl_loss_type": kind, "kl_loss_coef": 0.7, "loss_agg_mode": "seq-mean-token-sum"}
        yield "gpg", {"use_kl_loss": True, **keys}
    for preset in modes.VERL_PRESETS.values():
        bounds = {"rollout_rs_threshold": "0.9_1.1"} if preset.get("rollout_rs_threshold") == "0.999_1.001" else {}
        yield "vanilla", {**preset, **bounds}
    yield "bypass_mode", {"loss_type": "reinforce", "rollout_is": "token"}
    yield "bypass_mode", {"loss_type": "reinforce", "rollout_is": "sequence", "rollout_is_threshold": "0.1_9.0"}


SETTINGS = tuple(_settings())
