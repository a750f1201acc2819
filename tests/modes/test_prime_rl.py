"""The modes of prime-rl against its formulas, token by token, and its keys."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from framework_rows import assert_same

from drpo_core import DPPO, modes
from drpo_core.modes import Mode
from drpo_core.objectives import CISPO, IPO
from drpo_core.penalties import Penalty
from drpo_core.reduction import prompt_mean


def ipo(row, *, eps=0.3, max_importance_ratio=1e4):
    kept = (row.x.exp() - row.mu.exp()).abs() <= eps
    ell = row.x - row.mu
    # the capped ratio keeps its gradient
    ratio = torch.exp(torch.clamp(ell.detach(), max=math.log(max_importance_ratio)) + ell - ell.detach())
    return torch.where(kept.detach(), -row.a * ratio, 0.0)


def icepop(row, *, ratio_low=0.2, ratio_high=5.0):
    ratio = torch.exp(row.x - row.mu)
    return torch.where((ratio >= ratio_low) & (ratio <= ratio_high), -row.a * ratio, 0.0)


def ppo(row, *, ratio_low=0.8, ratio_high=1.2):
    ratio = torch.exp(row.x - row.mu)
    return -torch.minimum(row.a * ratio, row.a * torch.clamp(ratio, ratio_low, ratio_high))


def cispo(row, *, ratio_low=0.0, ratio_high=5.0):
    return -torch.clamp(torch.exp(row.x - row.mu), ratio_low, ratio_high).detach() * row.a * row.x


def default(row, *, dppo_mask_low=0.2, dppo_mask_high=0.2, kl_tau=1e-3):
    shift, ell = row.x.exp() - row.mu.exp(), row.x - row.mu
    masked = shift > dppo_mask_high if row.a > 0 else shift < -dppo_mask_low
    return -row.a * torch.exp(ell) * (~masked) + kl_tau * ell * ell


THEIRS = {"ipo": ipo, "icepop": icepop, "ppo": ppo, "cispo": cispo, "default": default}
CASES = [
    *((name, {}) for name in THEIRS),
    ("ipo", {"eps": 0.05}),
    ("icepop", {"ratio_low": 0.9, "ratio_high": 1.1}),
    ("ppo", {"ratio_low": 0.9, "ratio_high": 1.05}),
    ("cispo", {"ratio_low": 0.9, "ratio_high": 1.1}),
    ("default", {"dppo_mask_low": 0.02, "dppo_mask_high": 0.05, "kl_tau": 0.3}),
    ("default", {"kl_tau": 0.0}),
]


@pytest.mark.parametrize(("name", "keys"), CASES, ids=str)
def test_loss_and_gradient(name, keys):
    def loss(rows):
        return torch.cat([THEIRS[name](row, **keys) for row in rows]).mean()

    assert_same(modes.prime_rl(name, **keys), loss)


def test_prompts():
    ids = np.arange(16) // 3

    def loss(rows):
        groups = [[ipo(row) for row, i in zip(rows, ids, strict=True) if i == prompt] for prompt in set(ids)]
        return torch.stack([torch.cat(group).mean() for group in groups]).mean()

    for name in THEIRS:
        assert modes.prime_rl(name, loss_aggregation="prompt").reduction == "prompt_mean"
    mode = modes.prime_rl(loss_aggregation="prompt")
    assert_same(mode, loss, reduction=partial(prompt_mean, group_ids=ids))


def test_gradient_beyond_the_cap():
    keys = {"max_importance_ratio": 1.02}
    assert_same(modes.prime_rl("ipo", **keys), lambda rows: torch.cat([ipo(r, **keys) for r in rows]).mean(), value=False)


def test_mode_is_the_value():
    assert modes.prime_rl() == modes.prime_rl("ipo") == Mode(IPO(delta=0.3, max_ratio=1e4))
    assert modes.prime_rl("cispo", ratio_low=0.5) == Mode(CISPO(min_ratio=0.5, max_ratio=5.0))
    assert modes.prime_rl("default", kl_tau=0.1) == Mode(
        DPPO(delta_low=0.2, delta_high=0.2), penalties=(Penalty(coefficient=0.1, estimator="square", to="behavior"),)
    )


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("dppo", {}, "type: expected 'ipo', 'icepop', 'ppo', 'cispo', 'default', got 'dppo'"),
        ([], {}, r"type: expected .* got \[\]"),
        ("ipo", {"ipo_threshold": 0.1}, "ipo_threshold: expected keys of prime-rl among eps"),
        ("ipo", {"score_centering": True}, "score_centering: .* support"),
        ("ipo", {"adv_tau": 0.5}, "adv_tau: .* advantages"),
        ("ipo", {"loss_aggregation": "sequence"}, "loss_aggregation: expected 'token', 'prompt', got 'sequence'"),
        ("ipo", {"max_importance_ratio": 0.5}, "max_importance_ratio: expected a finite number, 1 or more"),
        ("ppo", {"max_importance_ratio": 5.0}, "max_importance_ratio: .* no such cap"),
        ("icepop", {"ratio_low": 6.0}, "min_ratio"),
    ],
)
def test_errors_name_the_key(name, keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.prime_rl(name, **keys)
