"""The mode of NeMo-RL against its formulas, sequence by sequence, and its keys."""

import pytest
import torch
from framework_rows import assert_same, batch

from drpo_core import PPOClip, modes
from drpo_core.anchors import Proximal
from drpo_core.modes import Mode
from drpo_core.modes._nemo_rl import DEFAULTS
from drpo_core.penalties import Penalty


def policy_loss(row, c):
    ell = row.x - row.old
    if c["force_on_policy_ratio"]:
        return -row.a * torch.exp(row.x - row.x.detach())
    if c["disable_ppo_ratio"]:
        return -row.a * row.x
    ratio = torch.exp(ell.mean().expand_as(ell) if c["sequence_level_importance_ratios"] else ell)
    clipped = torch.clamp(ratio, 1.0 - c["ratio_clip_min"], 1.0 + c["ratio_clip_max"])
    if c["use_cispo"]:
        return -row.a * clipped.detach() * row.x
    loss = torch.maximum(-row.a * ratio, -row.a * clipped)
    return torch.minimum(loss, -row.a * c["ratio_clip_c"]) if c["ratio_clip_c"] and row.a < 0 else loss


def weights(row, c):
    ell = row.old - row.mu
    rho = torch.exp(ell.sum().expand_as(ell) if c["sequence_level_importance_ratios"] else ell)
    kind, high = c["truncated_importance_sampling_type"], c["truncated_importance_sampling_ratio"]
    low = c["truncated_importance_sampling_ratio_min"] or 0.0
    if kind == "tis":
        return torch.clamp(rho, low, high)
    if kind == "icepop":
        return torch.where((rho >= low) & (rho <= high), rho, 0.0)
    if kind == "seq-mask-tis":
        return rho * bool(low <= torch.exp(ell.mean()) <= high)
    return rho


def kl(row, c):
    score = row.mu if c["use_on_policy_kl_approximation"] else row.x.detach()
    gap = row.ref - row.x
    value = -gap if c["reference_policy_kl_type"] == "k1" else torch.exp(gap) - 1.0 - gap
    return torch.exp(row.x - score) * value


def theirs(**keys):
    c = {**DEFAULTS, **keys}

    def of_row(row):
        loss = policy_loss(row, c)
        loss = loss * weights(row, c) if c["use_importance_sampling_correction"] else loss
        beta = 0.0 if c["use_kl_in_reward"] else c["reference_policy_kl_penalty"]
        return loss + beta * kl(row, c) if beta else loss

    def loss(rows):
        losses = [of_row(row) for row in rows]
        return torch.cat(losses).mean() if c["token_level_loss"] else sum(each.mean() for each in losses) / len(rows)

    return loss


CLIP = {"ratio_clip_min": 0.05, "ratio_clip_max": 0.1}
SEQUENCES = {"token_level_loss": False, "sequence_level_importance_ratios": True}
IS = {"use_importance_sampling_correction": True}


def truncated(kind, high, low=None):
    names = ("type", "ratio", "ratio_min")
    values = zip(names, (kind, high, low), strict=True)
    return {**IS, **{f"truncated_importance_sampling_{name}": value for name, value in values if value is not None}}


VARIANTS = [
    CLIP,
    {},
    {**CLIP, "token_level_loss": False},
    {**CLIP, "ratio_clip_c": 1.1},
    {**CLIP, **SEQUENCES},
    {**CLIP, "use_cispo": True},
    {"disable_ppo_ratio": True},
    {"force_on_policy_ratio": True},
    {**CLIP, **IS},
    {**CLIP, **IS, **SEQUENCES},
    {**CLIP, **truncated("tis", 1.02)},
    {**CLIP, **truncated("tis", 1.02, 0.98)},
    {**CLIP, **truncated("icepop", 1.02, 0.97)},
    {**CLIP, **truncated("icepop", 1.1, 0.9), **SEQUENCES},
    {**CLIP, **truncated("seq-mask-tis", 1.01, 0.99)},
    {**CLIP, "use_on_policy_kl_approximation": True},
    {**CLIP, "use_on_policy_kl_approximation": True, "reference_policy_kl_type": "k1"},
    {**CLIP, "use_kl_in_reward": True},
    {**CLIP, "reference_policy_kl_penalty": 0.0},
]


@pytest.mark.parametrize("keys", VARIANTS, ids=str)
def test_loss_and_gradient(keys):
    arrays = batch(drift=0.1, mismatch=0.03)
    value = "force_on_policy_ratio" not in keys
    assert_same(modes.nemo_rl("ClippedPGLossFn", **keys), theirs(**keys), value=value, arrays=arrays)


def test_mode_is_the_value():
    assert modes.nemo_rl() == Mode(
        PPOClip(eps_low=0.2, eps_high=0.2), anchor=Proximal(), penalties=(Penalty(coefficient=0.01, estimator="k3+"),)
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"clip": 0.2}, "clip: expected keys of NeMo-RL among disable_ppo_ratio"),
        ({"disable_ppo_ratio": True, "ratio_clip_min": 0.1}, "ratio_clip_min: NeMo-RL's 'ClippedPGLossFn'"),
        ({"use_cispo": True, "ratio_clip_c": 3.0}, "ratio_clip_c: NeMo-RL's"),
        ({"use_cispo": True, "token_level_loss": False}, "use_cispo: .* refuses"),
        ({"use_cispo": True, "disable_ppo_ratio": True}, "use_cispo: .* refuses"),
        ({"sequence_level_importance_ratios": True}, "sequence_level_importance_ratios: .* token_level_loss"),
        ({"reference_policy_kl_type": "k2"}, "reference_policy_kl_type: expected 'k3', got 'k2'"),
        ({"positive_example_nll_weight": 0.1}, "positive_example_nll_weight: .* rewards"),
        ({"truncated_importance_sampling_type": "tis"}, "truncated_importance_sampling_type: NeMo-RL's"),
        (truncated("icepop", 2.0), "truncated_importance_sampling_ratio_min: .* needs it"),
        (truncated("tis", None), "truncated_importance_sampling_ratio: expected a real number"),
        ({**truncated("seq-mask-tis", 1.1, 0.9), **SEQUENCES}, "truncated_importance_sampling_type: .* refuses"),
    ],
)
def test_errors_name_the_key(keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.nemo_rl("ClippedPGLossFn", **keys)


def test_one_loss():
    with pytest.raises(ValueError, match="loss_fn: expected 'ClippedPGLossFn', got 'DPO'"):
        modes.nemo_rl("DPO")
