"""The modes of SkyRL against SkyRL's own functions and configuration."""

import pytest

pytest.importorskip("skyrl", reason="runs in the environment of `nox -s integration-skyrl`")

import torch
from skyrl.backends.skyrl_train.utils.ppo_utils import (
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
)
from skyrl.train.config import SkyRLTrainConfig

from drpo_core import modes, policy_loss_and_gradient
from drpo_core.modes import DoubleRatioWarning
from drpo_core.modes._skyrl import DEFAULTS, LOSSES, REDUCTIONS

# SkyRL's ratios are float32
TOLERANCE = 1e-6
SECTIONS = {"cispo": "cispo", "delta": "dppo", "dppo": "dppo", "tau": "sapo"}
SECTIONS |= dict.fromkeys(("tis", "token", "sequence", "geo", "product", "outlier"), "off_policy_correction")
# in 0.3.0 these two default to what are ratios in 0.4, and cispo has no anchor to choose
CISPO = {"cispo_eps_clip_low": 0.05, "cispo_eps_clip_high": 0.1}
SETTINGS = {
    "cispo": CISPO,
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


def batch(rows=12, width=9):
    generator = torch.Generator().manual_seed(0)

    def noise(scale):
        return scale * torch.randn(rows, width, generator=generator, dtype=torch.float64)

    rollout = -torch.exp(noise(1.0))
    old = torch.clamp(rollout + noise(0.03), max=-1e-3)
    current = torch.clamp(old + noise(0.1), max=-1e-3)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    advantages = noise(1.0)[:, :1].expand(rows, width).clone()
    return current, old, rollout, advantages, torch.arange(width) < lengths


def assert_same(name, **keys):
    mode = modes.skyrl(name, **keys)
    current, old, rollout, advantages, mask = batch()
    others = {"proximal_log_prob": old} if mode.arguments else {}
    ours = policy_loss_and_gradient(mode, current, rollout, advantages, mask=mask, **others)
    config = algorithm(name, keys)
    loss_mask = mask.to(torch.float64)
    scaled = apply_loss_reduction_to_advantages_minibatch(
        advantages, loss_mask, config.loss_reduction, len(mask), keys.get("max_seq_len")
    )
    x = current.requires_grad_()
    loss, _ = PolicyLossRegistry.get(name)(x, old, scaled, config, loss_mask, rollout)
    (expected,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(ours.gradient, expected, rtol=0.0, atol=TOLERANCE * float(expected.abs().max()))
    if name != "rollout_is":
        torch.testing.assert_close(ours.loss, loss.detach(), rtol=1e-5, atol=1e-7)


def settings(name):
    return SETTINGS.get(name, {"eps_clip_low": 0.05, "eps_clip_high": 0.1})


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, reduction):
    width = {"max_seq_len": 20} if reduction == "seq_mean_token_sum_norm" else {}
    assert_same(name, **settings(name), loss_reduction=reduction, **width)


@pytest.mark.parametrize("keys", CORRECTIONS, ids=str)
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("dppo", "rollout_is", "importance_sampling")])
def test_off_policy_correction(name, keys):
    assert_same(name, **settings(name), **keys)


@pytest.mark.parametrize("name", ["dppo", "rollout_is"])
def test_skyrl_counts_a_ratio_twice(name):
    with pytest.warns(DoubleRatioWarning):
        assert_same(name, **settings(name), tis_ratio_type="token")


def test_defaults_are_skyrls():
    config = algorithm("regular", {})
    for key, value in DEFAULTS.items():
        section = SECTIONS.get(key.partition("_")[0])
        place = config if section is None else getattr(config, section)
        if key not in {*CISPO, "cispo_anchor", "use_kl_loss", "max_seq_len"}:
            assert getattr(place, key) == value, key
