"""The modes of OpenRLHF against its formulas, sequence by sequence, and its keys."""

import pytest
import torch
from framework_rows import assert_same, batch, keeps_some

from drpo_core import PPOClip, modes
from drpo_core.anchors import Behavior, Sequence
from drpo_core.modes import Mode
from drpo_core.modes._openrlhf import DEFAULTS


def gate(row, c):
    """The statistic of a row's tokens, or of the row."""
    ell = row.old - row.mu
    p, q = row.mu.exp(), row.old.exp()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    gating = c["algo.advantage.is_correction_gating"]
    statistic = {"ratio": ell, "binary_kl": kl, "tv": (p - q).abs()}[gating]
    if c["algo.advantage.is_correction_level"] == "seq":
        statistic = statistic.mean().expand_as(ell)
    return torch.exp(statistic) if gating == "ratio" else statistic


def bounds(c):
    threshold = c["algo.advantage.is_correction_threshold"]
    return threshold if isinstance(threshold, tuple) else (0.0, threshold)


def theirs(name, **keys):
    c = {**DEFAULTS, **keys}
    eps = c["actor.eps_clip_low_high"] or (c["actor.eps_clip"], c["actor.eps_clip"])
    on = c["algo.advantage.is_correction_level"] != "off"

    def of_row(row):
        ell = row.x - (row.mu if name == "gspo" and on else row.old)
        ratio = torch.exp(ell.mean().expand_as(ell) if name == "gspo" else ell)
        gain = torch.minimum(ratio * row.a, torch.clamp(ratio, 1.0 - eps[0], 1.0 + eps[1]) * row.a)
        if c["actor.dual_clip"] and row.a < 0:
            gain = torch.maximum(gain, c["actor.dual_clip"] * row.a)
        loss = -gain
        if name == "ppo" and on:
            statistic, (low, high) = gate(row, c), bounds(c)
            kept = torch.where((statistic >= low) & (statistic <= high), torch.exp(row.old - row.mu), 0.0)
            clip = c["algo.advantage.is_correction_mode"] == "clip"
            loss = loss * (torch.clamp(statistic, low, high) if clip else kept)
        if c["algo.kl.use_loss"]:
            gap = row.x - row.ref
            kl = {"k1": gap, "k2": gap * gap / 2.0, "k3": torch.exp(-gap) - 1.0 + gap}[c["algo.kl.estimator"]]
            loss = loss + c["algo.kl.init_coef"] * kl
        return loss

    def loss(rows):
        losses = [of_row(row) for row in rows]
        by_sequence = name == "gspo" or c["actor.loss_agg_mode"] == "seq-mean-token-mean"
        return sum(each.mean() for each in losses) / len(rows) if by_sequence else torch.cat(losses).mean()

    return loss


CLIP = {"actor.eps_clip_low_high": (0.05, 0.1)}


def correction(level, threshold, **keys):
    named = {f"algo.advantage.is_correction_{key}": value for key, value in keys.items()}
    return {**CLIP, "algo.advantage.is_correction_level": level, "algo.advantage.is_correction_threshold": threshold, **named}


VARIANTS = [
    ("ppo", CLIP),
    ("ppo", {"actor.eps_clip": 0.1, "actor.loss_agg_mode": "seq-mean-token-mean"}),
    ("ppo", {**CLIP, "actor.dual_clip": 1.15}),
    *(("ppo", {**CLIP, "algo.kl.use_loss": True, "algo.kl.estimator": kind}) for kind in ("k1", "k2", "k3")),
    ("gspo", CLIP),
    ("gspo", {**CLIP, "algo.advantage.is_correction_level": "token"}),
]
MASKS = [
    correction("token", (0.97, 1.02)),
    correction("token", 1.02),
    correction("token", 5e-5, gating="binary_kl"),
    correction("token", 0.005, gating="tv"),
    correction("seq", (0.99, 1.005)),
    correction("seq", 2e-4, gating="binary_kl"),
    correction("seq", 0.008, gating="tv"),
]
CLIPS = [correction("token", (0.97, 1.02), mode="clip"), correction("token", 1.02, mode="clip")]


@pytest.mark.parametrize(("name", "keys"), VARIANTS + [("ppo", keys) for keys in CLIPS], ids=str)
def test_loss_and_gradient(name, keys):
    assert_same(modes.openrlhf(name, **keys), theirs(name, **keys), arrays=batch(drift=0.1, mismatch=0.03))


@pytest.mark.parametrize("keys", MASKS, ids=str)
def test_masks(keys):
    expected, c = theirs("ppo", **keys), {**DEFAULTS, **keys}
    low, high = bounds(c)

    def loss(rows):
        keeps_some([(gate(row, c) >= low) & (gate(row, c) <= high) for row in rows])
        return expected(rows)

    assert_same(modes.openrlhf("ppo", **keys), loss, arrays=batch(drift=0.1, mismatch=0.03))


def test_mode_is_the_value():
    assert modes.openrlhf("gspo", **{"algo.advantage.is_correction_level": "seq"}) == Mode(
        PPOClip(eps_low=0.2, eps_high=0.2), anchor=Sequence(Behavior()), reduction="sequence_mean_token_mean"
    )


KL = {"algo.kl.use_loss": True}


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("cispo", {}, "policy_loss_type: expected 'ppo', 'gspo', got 'cispo'"),
        ("ppo", {"eps_clip": 0.2}, "eps_clip: expected keys of OpenRLHF among actor.eps_clip"),
        ("ppo", {**CLIP, "actor.eps_clip": 0.2}, "actor.eps_clip: OpenRLHF's 'ppo' with these settings reads"),
        ("ppo", {"actor.eps_clip_low_high": 0.2}, "actor.eps_clip_low_high: expected two numbers, got 0.2"),
        ("ppo", correction("seq", (0.5, 2.0), mode="clip"), "is_correction_mode: .* tokens only"),
        ("ppo", correction("token", (0.5, 2.0), gating="tv"), "is_correction_threshold: .* upper bound only"),
        ("gspo", correction("token", (0.5, 2.0)), "is_correction_threshold: OpenRLHF's 'gspo'"),
        ("gspo", KL, "algo.kl.use_loss: .* over sequences"),
        ("ppo", {**KL, "algo.kl.unbiased_gradient": True}, "algo.kl.unbiased_gradient: .* ratio"),
    ],
)
def test_errors_name_the_key(name, keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.openrlhf(name, **keys)
