"""The modes of verl against verl's own functions, under verl's own configuration classes."""

import pytest

pytest.importorskip("verl", reason="runs in the environment of `nox -s integration-verl`")

import torch
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.rollout_corr_helper import (
    SUPPORTED_ROLLOUT_RS_OPTIONS,
    compute_rollout_correction_and_rejection_mask,
)
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from drpo_core import modes, policy_loss_and_gradient
from drpo_core.modes._verl import DEFAULTS, LOSSES, REDUCTIONS

# verl adds 1e-8 to the length of sequences, and to 1 − p
TOLERANCE = 1e-7
ACTOR = {"clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg"}
ACTOR |= {"loss_agg_mode", "loss_scale_factor", "use_kl_loss", "kl_loss_coef", "kl_loss_type"}
WITH_THEIR_OWN_LOSS = ("dppo_tv", "dppo_kl", "geo_mean")
KEYS = {
    "gspo": {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03},
    "dro": {"dro_beta": 0.3},
    "dppo_tv": {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02},
    "dppo_kl": {"clip_ratio_low": 0.001, "clip_ratio_high": 0.002},
    "geo_mean": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.05},
}


def batch(seed=0, rows=12, width=9):
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(rows, width, generator=generator, dtype=torch.float64)

    behavior = -torch.exp(noise(1.0))
    proximal = torch.clamp(behavior + noise(0.05), max=-1e-3)
    log_prob = torch.clamp(proximal + noise(0.2), max=-1e-3)
    reference = torch.clamp(log_prob + noise(0.3), max=-1e-3)
    advantages = noise(1.0)[:, :1].expand(rows, width).clone()
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    return behavior, proximal, log_prob, reference, advantages, torch.arange(width) < lengths


def verls(loss_mode, keys):
    """Loss and gradient of verl, put together as its trainer and its `ppo_loss` do."""
    behavior, proximal, log_prob, reference, advantages, mask = batch()
    values = {**DEFAULTS, **keys}
    correction = RolloutCorrectionConfig(
        **{
            name: value
            for name, value in values.items()
            if name.startswith("rollout_") or name in ("bypass_mode", "loss_type")
        }
    )
    policy_loss = PolicyLossConfig(loss_mode=loss_mode, dro_beta=values["dro_beta"], rollout_correction=correction)
    config = FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=policy_loss,
        **{name: values[name] for name in ACTOR},
    )
    config.global_batch_info["loss_scale_factor"] = values["loss_scale_factor"]
    weights = None
    if correction.bypass_mode:
        loss_mode, proximal = "bypass_mode", behavior
    else:
        names = ("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize", "rollout_rs", "rollout_rs_threshold")
        found, mask, _ = compute_rollout_correction_and_rejection_mask(
            proximal, behavior, mask, **{name: getattr(correction, name) for name in names}
        )
        weights = None if found is None else found.batch["rollout_is_weights"]
    log_prob.requires_grad_()
    common = {"loss_agg_mode": config.loss_agg_mode}
    loss, _ = get_policy_loss_fn(loss_mode)(
        old_log_prob=proximal,
        log_prob=log_prob,
        advantages=advantages,
        response_mask=mask,
        config=config,
        rollout_is_weights=weights,
        **common,
    )
    if config.use_kl_loss:
        kl = kl_penalty(log_prob, reference, config.kl_loss_type)
        loss = loss + config.kl_loss_coef * agg_loss(kl, mask, **common, **config.global_batch_info)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    return loss.detach(), gradient


def assert_same(loss_mode, *, loss=True, **keys):
    mode = modes.verl(loss_mode, **keys)
    behavior, proximal, log_prob, reference, advantages, mask = batch()
    others = {"proximal_log_prob": proximal, "reference_log_prob": reference}
    given = {name: array for name, array in others.items() if name in mode.arguments}
    ours = policy_loss_and_gradient(mode, log_prob, behavior, advantages, mask=mask, **given)
    expected_loss, expected = verls(loss_mode, keys)
    torch.testing.assert_close(ours.gradient, expected, rtol=0.0, atol=TOLERANCE * float(expected.abs().max()))
    if loss:
        torch.testing.assert_close(ours.loss, expected_loss, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("aggregation", REDUCTIONS)
@pytest.mark.parametrize("loss_mode", [name for name in LOSSES if name != "bypass_mode"])
def test_losses(loss_mode, aggregation):
    scale = (
        {"loss_scale_factor": 512}
        if aggregation == "seq-mean-token-sum-norm" and loss_mode not in ("sapo", "geo_mean")
        else {}
    )
    keys = {**KEYS.get(loss_mode, {}), "loss_agg_mode": aggregation, **scale}
    assert_same(loss_mode, **keys, loss=loss_mode not in WITH_THEIR_OWN_LOSS)


@pytest.mark.parametrize("preset", modes.VERL_PRESETS)
def test_presets(preset):
    keys = dict(modes.VERL_PRESETS[preset])
    made = getattr(RolloutCorrectionConfig, preset)()
    # the methods spell out what the configuration has by default anyway
    assert all(getattr(made, name) == value for name, value in keys.items())
    assert {name for name in ("rollout_is", "rollout_rs") if getattr(made, name)} == keys.keys() & {"rollout_is", "rollout_rs"}
    if keys.get("rollout_rs_threshold") == "0.999_1.001":
        # so that some sequences of the batch are rejected, and some are not
        keys["rollout_rs_threshold"] = "0.99_1.03"
    assert_same("vanilla", **keys)


def test_presets_are_all():
    methods = {name for name, value in vars(RolloutCorrectionConfig).items() if isinstance(value, classmethod)}
    assert methods == modes.VERL_PRESETS.keys()


LIMITS = {"token": 1e-3, "seq_sum": 0.008, "seq_mean": 1e-3, "seq_max": 4e-3}


@pytest.mark.parametrize("rule", sorted(SUPPORTED_ROLLOUT_RS_OPTIONS))
@pytest.mark.parametrize("bypass", [{}, {"bypass_mode": True}])
def test_rejection(rule, bypass):
    # π/μ is further from 1 than π_old/μ; where all is rejected, verl's loss is a NaN
    k1, scale = ("0.85_1.1", 20.0) if bypass else ("0.97_1.02", 1.0)
    threshold = k1 if rule.endswith("k1") else scale * LIMITS[rule[:-3]]
    assert_same("vanilla", rollout_rs=rule, rollout_rs_threshold=threshold, rollout_is="token", **bypass)


@pytest.mark.parametrize("loss_mode", ["gspo", "geo_mean", "cispo", "dppo_tv"])
def test_weights_and_sequences(loss_mode):
    keys = {"rollout_rs": "seq_mean_k3,seq_sum_k1", "rollout_rs_threshold": "0.002,0.8_1.25"}
    weights = {"rollout_is": "sequence", "rollout_is_threshold": 1.05}
    assert_same(loss_mode, **KEYS.get(loss_mode, {}), **keys, **weights, loss=loss_mode not in WITH_THEIR_OWN_LOSS)


@pytest.mark.parametrize("kind", ["kl", "mse", "low_var_kl", "k1+", "k2+", "k3+", "kl+", "mse+", "low_var_kl+"])
def test_kl(kind):
    assert_same("gpg", use_kl_loss=True, kl_loss_type=kind, kl_loss_coef=0.7, loss_agg_mode="seq-mean-token-sum")


def test_names_and_defaults_are_verls():
    # plug-ins, ours among them, are in the registry too
    theirs = {name for name, loss in POLICY_LOSS_REGISTRY.items() if loss.__module__ == "verl.trainer.ppo.core_algos"}
    assert LOSSES.keys() | {"clip_cov", "kl_cov"} == theirs
    config = FSDPActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
    assert {name: getattr(config, name) for name in ACTOR} == {name: DEFAULTS[name] for name in ACTOR}
