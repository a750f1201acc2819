"""The modes of ms-swift against its formulas, sequence by sequence, and its keys."""

import pytest
import torch
from framework_rows import assert_same, batch

from drpo_core import PPOClip, modes
from drpo_core.anchors import Proximal
from drpo_core.modes import Mode
from drpo_core.modes._ms_swift import DEFAULTS, LOSSES
from drpo_core.penalties import Penalty


def future(ell, ratio, c):
    """FIPO's weights of the tokens of a row."""
    counted = ell if c["delta"] is None else torch.where(ratio > c["delta"], 0.0, ell)
    gamma = 2.0 ** (-1.0 / c["fipo_decay_rate"])
    ahead = [sum(gamma ** (k - t) * counted[k] for k in range(t, len(ell))) for t in range(len(ell))]
    width = c["fipo_clip_range"]
    low = 1.0 if c["fipo_clip_high_only"] else 1.0 - width
    return torch.clamp(torch.exp(torch.stack(ahead)), low, 1.0 + width).detach()


def rollout_weight(row, c):
    ell, high = row.old - row.mu, c["rollout_importance_sampling_threshold"]
    rho, mean = torch.exp(ell), torch.exp(ell.mean())
    return {
        None: torch.ones_like(rho),
        "token_truncate": torch.clamp(rho, max=high),
        "token_mask": torch.where(rho <= high, rho, 0.0),
        "sequence_truncate": torch.clamp(mean, max=high).expand_as(rho),
        "sequence_mask": rho * (mean <= high),
    }[c["rollout_importance_sampling_mode"]]


def of_row(row, name, c):
    ell = row.x - row.old
    level = c["importance_sampling_level"]
    log_ratio = {"token": ell, "sequence": ell.mean(), "sequence_token": row.x - row.x.detach() + ell.mean().detach()}[level]
    ratio = torch.exp(log_ratio).expand_as(ell)
    high = c["epsilon"] if c["epsilon_high"] is None else c["epsilon_high"]
    if name == "cispo":
        loss = -torch.clamp(ratio, max=high).detach() * row.a * row.x
    elif name == "sapo":
        tau = c["tau_pos"] if row.a > 0 else c["tau_neg"]
        loss = -row.a * torch.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau
    else:
        bounded = ratio if c["delta"] is None else torch.clamp(ratio, max=c["delta"])
        loss = -torch.minimum(bounded * row.a, torch.clamp(ratio, 1.0 - c["epsilon"], 1.0 + high) * row.a)
        loss = loss * future(ell, ratio, c) if name == "fipo" else loss
    gap = row.ref - row.x
    loss = (loss + c["beta"] * (torch.exp(gap) - gap - 1.0)) * rollout_weight(row, c)
    limit = c["off_policy_sequence_mask_delta"]
    return loss, limit is None or not (row.a < 0 and (row.mu - row.x).mean() > limit)


def theirs(name, **keys):
    c = {**DEFAULTS, **keys}

    def loss(rows):
        found = [of_row(row, name, c) for row in rows]
        if name in ("grpo", "sapo"):
            return sum(each.mean() * kept for each, kept in found) / len(rows)
        total = sum(each.sum() * kept for each, kept in found)
        if name == "dr_grpo":
            return total / (len(rows) * c["max_completion_length"])
        return total / sum(len(each) for each, kept in found if kept or name != "bnpo")

    return loss


CLIP = {"epsilon": 0.05, "epsilon_high": 0.1}
EPSILON = {"cispo": {"epsilon_high": 1.05}, "sapo": {}, "fipo": {**CLIP, "delta": 1.2}}
ROLLOUT = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
VARIANTS = [
    {},
    {"beta": 0.0},
    {"importance_sampling_level": "sequence_token"},
    {"beta": 0.0, "off_policy_sequence_mask_delta": 0.01},
    *(
        {"beta": 0.0, "rollout_importance_sampling_mode": mode, "rollout_importance_sampling_threshold": 1.01}
        for mode in ROLLOUT
    ),
]


@pytest.mark.parametrize("keys", VARIANTS, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(name, keys):
    if name == "fipo" and "importance_sampling_level" in keys:
        return
    given = {**EPSILON.get(name, CLIP), **keys}
    assert_same(modes.ms_swift(name, **given), theirs(name, **given), arrays=batch(drift=0.1, mismatch=0.03))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "fipo"])
def test_one_ratio_of_a_sequence(name):
    keys = {**EPSILON.get(name, CLIP), "importance_sampling_level": "sequence"}
    weights = {
        "beta": 0.0,
        "rollout_importance_sampling_mode": "sequence_truncate",
        "rollout_importance_sampling_threshold": 1.01,
    }
    for given in (keys, {**keys, **weights}):
        assert_same(modes.ms_swift(name, **given), theirs(name, **given))


@pytest.mark.parametrize(
    "keys",
    [
        {**CLIP, "fipo_safety_threshold": None},
        {**CLIP, "fipo_safety_threshold": None, "fipo_clip_high_only": False, "fipo_decay_rate": 2.0},
        {**CLIP, "delta": 1.3, "fipo_clip_range": 0.5},
    ],
    ids=str,
)
def test_fipo(keys):
    assert_same(modes.ms_swift("fipo", **keys), theirs("fipo", **keys))


def test_delta_is_the_dual_clip():
    keys = {"epsilon": 0.05, "delta": 1.2}
    assert_same(modes.ms_swift("grpo", **keys), theirs("grpo", **keys))


def test_mode_is_the_value():
    assert modes.ms_swift() == Mode(
        PPOClip(eps_low=0.2, eps_high=0.2),
        anchor=Proximal(),
        penalties=(Penalty(coefficient=0.04),),
        reduction="sequence_mean_token_mean",
    )


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("real", {}, "loss_type: expected 'grpo', .* got 'real'"),
        ("grpo", {"eps": 0.1}, "eps: expected keys of ms-swift among epsilon"),
        ("grpo", {"tau_pos": 1.0}, "tau_pos: ms-swift's 'grpo'"),
        ("grpo", {"delta": 1.1}, "delta: .* cuts the gradient"),
        ("grpo", {"off_policy_sequence_mask_delta": 0.1}, "beta: .* KL too"),
        ("grpo", {"rollout_importance_sampling_mode": "token_mask"}, "beta: .* KL too"),
        ("fipo", {}, "fipo_safety_threshold: .* own ratio"),
        ("fipo", {"delta": 1.5, "importance_sampling_level": "sequence_token"}, "_level: .* of the sequence"),
        (
            "grpo",
            {"importance_sampling_level": "sequence", "rollout_importance_sampling_mode": "token_mask", "beta": 0.0},
            "rollout_importance_sampling_mode: .* differentiated as one",
        ),
    ],
)
def test_errors_name_the_key(name, keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.ms_swift(name, **keys)
