"""The modes of Tinker against its documented formulas, token by token, and its keys."""

import pytest
import torch
from framework_rows import assert_same

from drpo_core import PPOClip, modes
from drpo_core.modes import Mode
from drpo_core.objectives import CISPO

DEFAULTS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "beta": None}


def theirs(name, **keys):
    c = {**DEFAULTS, **keys}

    def of_row(row):
        ratio = torch.exp(row.x - row.mu)
        clipped = torch.clamp(ratio, c["clip_low_threshold"], c["clip_high_threshold"])
        if name == "importance_sampling":
            return -ratio * row.a
        if name == "ppo":
            return -torch.minimum(ratio * row.a, clipped * row.a)
        if name == "cispo":
            return -clipped.detach() * row.x * row.a
        return -(row.x * row.a - 0.5 * c["beta"] * (row.x - row.mu) ** 2)

    return lambda rows: torch.cat([of_row(row) for row in rows]).sum()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("importance_sampling", {}),
        ("ppo", {}),
        ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        ("cispo", {}),
        ("cispo", {"clip_low_threshold": 0, "clip_high_threshold": 1.1}),
        ("dro", {"beta": 0.05}),
    ],
    ids=str,
)
def test_loss_and_gradient(name, keys):
    assert_same(modes.tinker(name, **keys), theirs(name, **keys))


def test_mode_is_the_value():
    assert modes.tinker("ppo", clip_low_threshold=0.5, clip_high_threshold=1.5) == Mode(
        PPOClip(eps_low=0.5, eps_high=0.5), reduction="token_sum"
    )
    assert modes.tinker("cispo", clip_low_threshold=0.0) == Mode(CISPO(max_ratio=1.2), reduction="token_sum")


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("gspo", {}, "loss_fn: expected 'importance_sampling', .* got 'gspo'"),
        ("ppo", {"eps": 0.1}, "eps: expected keys of Tinker among clip_low_threshold"),
        ("ppo", {"beta": 0.1}, "beta: Tinker's 'ppo'"),
        ("dro", {}, "beta: expected a real number"),
    ],
)
def test_errors_name_the_key(name, keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.tinker(name, **keys)
