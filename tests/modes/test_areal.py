"""The modes of AReaL against its formulas, sequence by sequence, and its keys."""

import math

import pytest
import torch
from framework_rows import assert_same, batch, keeps_some

from drpo_core import PPOClip, modes
from drpo_core.anchors import Behavior
from drpo_core.modes import Mode
from drpo_core.modes._areal import DEFAULTS, REJECTION


def weight(row, given):
    """AReaL's mask of tokens, and its weight of them."""
    r = {**REJECTION, **given}
    ell = row.old - row.mu
    of_ratio = r["metric"] == "ratio"
    statistic = {"ratio": ell, "kl_k1": ell, "kl_k2": 0.5 * ell * ell}[r["metric"]]
    rho = torch.exp(ell)
    if r["level"] == "sequence":
        rho = torch.exp(ell.mean()).expand_as(ell) if of_ratio else rho
        statistic = {"sum": torch.sum, "mean": torch.mean, "max": torch.max}[r["agg"]](statistic).expand_as(ell)
    statistic = torch.exp(statistic) if of_ratio else statistic
    low = -math.inf if r["lower"] is None else r["lower"]
    if r["action"] == "clamp":
        return torch.ones_like(rho), torch.clamp(rho, max(low, 0.0), r["upper"])
    return (statistic >= low) & (statistic <= r["upper"]), rho


def theirs(name, **keys):
    c = {**DEFAULTS, **keys}
    high = c["eps_clip"] if c["eps_clip_higher"] is None else c["eps_clip_higher"]

    def of_row(row):
        ell = row.x - (row.old if c["use_decoupled_loss"] or c["recompute_logprob"] else row.mu)
        ratio = torch.exp(ell.mean().expand_as(ell) if c["importance_sampling_level"] == "sequence" else ell)
        if name == "sapo":
            tau = c["sapo_tau_pos"] if row.a > 0 else c["sapo_tau_neg"]
            return -row.a * torch.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau
        loss = torch.maximum(-row.a * ratio, -row.a * torch.clamp(ratio, 1.0 - c["eps_clip"], 1.0 + high))
        loss = torch.minimum(loss, torch.sign(row.a) * c["c_clip"] * row.a) if c["c_clip"] else loss
        if c["rejection_sampling"] is None:
            return loss
        mask, factor = weight(row, c["rejection_sampling"])
        return loss * mask * factor

    return lambda rows: torch.cat([of_row(row) for row in rows]).mean()


CLIP = {"eps_clip": 0.05, "eps_clip_higher": 0.1}
VARIANTS = [
    ("ppo", CLIP),
    ("ppo", {"eps_clip": 0.1, "recompute_logprob": True}),
    ("ppo", {**CLIP, "c_clip": 1.15}),
    ("ppo", {**CLIP, "use_decoupled_loss": True}),
    ("ppo", {**CLIP, "use_decoupled_loss": True, "recompute_logprob": True}),
    ("ppo", {**CLIP, "importance_sampling_level": "sequence"}),
    ("sapo", {"sapo_tau_pos": 2.0}),
    ("sapo", {"recompute_logprob": True, "importance_sampling_level": "sequence"}),
]
REJECTIONS = [
    {"upper": 1.02},
    {"upper": 1.02, "lower": 0.97},
    {"metric": "kl_k1", "upper": 0.02},
    {"metric": "kl_k1", "upper": 0.02, "lower": -0.03},
    {"metric": "kl_k1", "upper": 900.0, "lower": -0.03},
    {"metric": "kl_k2", "upper": 2e-4},
    {"level": "sequence", "upper": 1.005, "lower": 0.99},
    {"level": "sequence", "agg": "sum", "upper": 1.05, "lower": 0.9},
    {"level": "sequence", "agg": "max", "upper": 1.04},
    *(
        {"level": "sequence", "metric": "kl_k2", "agg": agg, "upper": limit}
        for agg, limit in (("sum", 2e-3), ("mean", 4e-4), ("max", 1e-3))
    ),
    {"level": "sequence", "metric": "kl_k1", "agg": "sum", "upper": 0.05, "lower": -0.05},
    {"level": "sequence", "metric": "kl_k1", "upper": 0.005},
    {"level": "sequence", "metric": "kl_k1", "agg": "max", "upper": 0.04},
]
CLAMPS = [
    {"action": "clamp", "upper": 1.02},
    {"action": "clamp", "upper": 1.02, "lower": 0.98},
    {"action": "clamp", "level": "sequence", "upper": 1.005, "lower": 0.99},
]


@pytest.mark.parametrize(("name", "keys"), VARIANTS, ids=str)
def test_loss_and_gradient(name, keys):
    assert_same(modes.areal(name, **keys), theirs(name, **keys), arrays=batch(drift=0.1, mismatch=0.03))


GEOMETRIC = [each for each in REJECTIONS + CLAMPS if each.get("level") == "sequence" and "metric" not in each]
RULES = [*((each, "token") for each in REJECTIONS + CLAMPS), *((each, "sequence") for each in GEOMETRIC)]


@pytest.mark.parametrize(("rejection", "level"), RULES, ids=str)
def test_rejection_sampling(rejection, level):
    decoupled = {"use_decoupled_loss": True, "importance_sampling_level": level}
    keys = {**CLIP, **decoupled, "rejection_sampling": rejection}
    expected = theirs("ppo", **keys)

    def loss(rows):
        if "action" not in rejection:
            keeps_some([weight(row, rejection)[0] for row in rows])
        return expected(rows)

    assert_same(modes.areal("ppo", **keys), loss, arrays=batch(drift=0.1, mismatch=0.03))


def test_mode_is_the_value():
    assert modes.areal() == modes.areal("ppo") == Mode(PPOClip(eps_low=0.2, eps_high=0.2), anchor=Behavior())


DECOUPLED = {"use_decoupled_loss": True}


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("cispo", {}, "loss: expected 'ppo', 'sapo', got 'cispo'"),
        ("ppo", {"clip": 0.2}, "clip: expected keys of AReaL among eps_clip"),
        ("ppo", {"rejection_sampling": {}}, "rejection_sampling: AReaL's 'ppo' with these settings reads"),
        ("sapo", {"use_decoupled_loss": True}, "use_decoupled_loss: AReaL's 'sapo'"),
        ("ppo", {**DECOUPLED, "m2_threshold": 0.1}, "m2_threshold: .* one token"),
        ("ppo", {**DECOUPLED, "rejection_sampling": {"bound": 1}}, "bound: expected keys of AReaL's rejection_sampling"),
        ("ppo", {**DECOUPLED, "rejection_sampling": {"metric": "kl_k3"}}, "metric: expected 'ratio', .* got 'kl_k3'"),
        ("ppo", {**DECOUPLED, "rejection_sampling": {"metric": "kl_k2", "lower": 0.1}}, "lower: .* no mask"),
        ("ppo", {**DECOUPLED, "rejection_sampling": {"level": "sequence", "agg": "max", "lower": 0.1}}, "lower: .* no mask"),
        ("ppo", {**DECOUPLED, "rejection_sampling": {"level": "sequence", "agg": "sum", "action": "clamp"}}, "action: .*"),
        (
            "ppo",
            {**DECOUPLED, "rejection_sampling": {}, "importance_sampling_level": "sequence"},
            "rejection_sampling: .* tokens that are left",
        ),
        (
            "ppo",
            {**DECOUPLED, "rejection_sampling": {"action": "clamp"}, "importance_sampling_level": "sequence"},
            "rejection_sampling: .* differentiated as one",
        ),
    ],
)
def test_errors_name_the_key(name, keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.areal(name, **keys)
