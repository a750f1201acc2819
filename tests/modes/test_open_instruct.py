"""The modes of open-instruct against its formulas, sequence by sequence, and its keys."""

import pytest
import torch
from framework_rows import assert_same, batch, keeps_some

from drpo_core import PPOClip, modes
from drpo_core.anchors import Proximal
from drpo_core.corrections import ImportanceWeight
from drpo_core.modes import Mode
from drpo_core.modes._open_instruct import DEFAULTS
from drpo_core.penalties import Penalty


def kept(row, c):
    ell = row.old - row.mu
    rho = torch.exp(ell.mean().expand_as(ell) if c["rho_mask_sequence_level"] else ell)
    statistic = (torch.exp(ell) - 1.0).abs().mean().expand_as(ell) if c["rho_mask_tv_divergence"] else rho
    low, high = c["rho_mask_lower_bound"], c["rho_mask_upper_bound"]
    dropped = ((statistic < low) & (low > 0)) | ((statistic > high) & (high > 0))
    if c["rho_mask_tv_divergence"]:
        dropped = dropped & (ell.sign() * row.a > 0)
    return ~dropped


def theirs(name, **keys):
    c = {**DEFAULTS, **keys}

    def of_row(row):
        ratio = torch.exp(row.x - (row.mu if c["use_vllm_logprobs"] else row.old))
        clipped = torch.clamp(ratio, 1.0 - c["clip_lower"], 1.0 + c["clip_higher"])
        loss = torch.maximum(-row.a * ratio, -row.a * clipped)
        if name == "cispo":
            loss = -row.a * torch.clamp(ratio.detach(), max=1.0 + c["clip_higher"]) * row.x
        if c["use_rho_correction"] and not c["use_vllm_logprobs"]:
            ell = row.old - row.mu
            rho = torch.exp(ell.mean().expand_as(ell) if c["rho_mask_sequence_level"] else ell)
            rho = torch.clamp(rho, c["rho_clamp_lower_bound"], c["rho_clamp_upper_bound"] or float("inf"))
            loss = loss * rho * kept(row, c)
        gap = row.x - row.ref
        kl = (gap, gap * gap / 2.0, torch.expm1(-gap) + gap, ratio * gap)[c["kl_estimator"]]
        return loss + c["beta"] * kl * c["load_ref_policy"]

    return lambda rows: torch.cat([of_row(row) for row in rows]).mean()


CLIP = {"clip_lower": 0.05, "clip_higher": 0.1, "beta": 0.0}
VARIANTS = [
    ("dapo", {}),
    ("cispo", {"clip_higher": 0.05}),
    *(("dapo", {"kl_estimator": number, "clip_lower": 0.05}) for number in range(4)),
    ("dapo", {**CLIP, "use_rho_correction": False}),
    ("dapo", {"clip_lower": 0.05, "use_vllm_logprobs": True, "kl_estimator": 3}),
    ("dapo", {"load_ref_policy": False}),
    ("dapo", {**CLIP, "rho_clamp_upper_bound": 1.02, "rho_clamp_lower_bound": 0.98}),
    ("cispo", {"clip_higher": 0.05, "rho_clamp_upper_bound": 0.0}),
]
MASKS = [
    {"rho_mask_lower_bound": 0.97, "rho_mask_upper_bound": 1.02},
    {"rho_mask_upper_bound": 1.02},
    {"rho_mask_upper_bound": 1.005, "rho_mask_lower_bound": 0.99, "rho_mask_sequence_level": True},
    {"rho_mask_upper_bound": 0.02, "rho_mask_tv_divergence": True},
]


@pytest.mark.parametrize(("name", "keys"), VARIANTS, ids=str)
def test_loss_and_gradient(name, keys):
    assert_same(modes.open_instruct(name, **keys), theirs(name, **keys), arrays=batch(drift=0.1, mismatch=0.03))


@pytest.mark.parametrize("keys", MASKS, ids=str)
def test_masks(keys):
    given = {**CLIP, **keys}
    expected = theirs("dapo", **given)

    def loss(rows):
        keeps_some([kept(row, {**DEFAULTS, **given}) for row in rows])
        return expected(rows)

    assert_same(modes.open_instruct("dapo", **given), loss, arrays=batch(drift=0.1, mismatch=0.03))


def test_mode_is_the_value():
    assert modes.open_instruct() == Mode(
        PPOClip(eps_low=0.2, eps_high=0.272),
        anchor=Proximal(),
        corrections=(ImportanceWeight(high=2.0),),
        penalties=(Penalty(coefficient=0.05, estimator="k3"),),
    )


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("ppo", {}, "loss_fn: expected 'dapo', 'cispo', got 'ppo'"),
        ("dapo", {"eps": 0.1}, "eps: expected keys of open-instruct among clip_lower"),
        ("cispo", {"clip_lower": 0.1}, "clip_lower: open-instruct's 'cispo'"),
        ("dapo", {"loss_denominator": 512.0}, "loss_denominator: .* normalizer"),
        ("dapo", {"rho_mask_tv_divergence": True}, "rho_mask_tv_divergence: .* upper bound"),
        ("dapo", {"kl_estimator": 4}, "kl_estimator: expected 0, 1, 2, 3, got 4"),
        ("dapo", {"use_vllm_logprobs": True, "rho_clamp_upper_bound": 3.0}, "rho_clamp_upper_bound: open-instruct's"),
    ],
)
def test_errors_name_the_key(name, keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.open_instruct(name, **keys)
