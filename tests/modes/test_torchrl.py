"""The modes of TorchRL against its formulas, sequence by sequence, and its keys."""

import math

import pytest
import torch
from framework_rows import assert_same

from drpo_core import PPOClip, modes
from drpo_core.modes import Mode


def theirs(name, *, clip_epsilon=0.2, kl_mask_threshold=None, aggregation="token_mean"):
    low, high = clip_epsilon if isinstance(clip_epsilon, tuple) else (clip_epsilon, clip_epsilon)

    def of_row(row):
        ell = row.x - row.mu
        clipped = torch.exp(torch.clamp(ell, math.log1p(-low), math.log1p(high))) * row.a
        loss = -clipped if name == "CISPOLoss" else -torch.minimum(torch.exp(ell) * row.a, clipped)
        return loss if kl_mask_threshold is None else loss[0.5 * ell.detach() ** 2 <= kl_mask_threshold]

    def loss(rows):
        losses = [of_row(row) for row in rows]
        if aggregation == "token_mean":
            return torch.cat(losses).mean()
        return sum(each.mean() for each in losses) / len(losses)

    return loss


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"clip_epsilon": (0.05, 0.1)},
        {"clip_epsilon": 0.1, "aggregation": "prompt_mean"},
        {"kl_mask_threshold": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["GRPOLoss", "DAPO", "CISPOLoss"])
def test_loss_and_gradient(name, keys):
    assert_same(modes.torchrl(name, **keys), theirs(name, **keys), value=name != "CISPOLoss")


def test_mode_is_the_value():
    assert modes.torchrl() == Mode(PPOClip(eps_low=0.2, eps_high=0.2))


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("PPOLoss", {}, "loss: expected 'GRPOLoss', 'DAPO', 'CISPOLoss', got 'PPOLoss'"),
        ("DAPO", {"epsilon": 0.1}, "epsilon: expected keys of TorchRL among clip_epsilon"),
        ("DAPO", {"clip_epsilon": (0.1,)}, "clip_epsilon: expected two numbers"),
        ("DAPO", {"kl_to_ref_coeff": 0.1}, "kl_to_ref_coeff: .* padding"),
        ("DAPO", {"kl_mask_threshold": 0.1, "aggregation": "prompt_mean"}, "kl_mask_threshold: .* over all sequences"),
        ("DAPO", {"aggregation": "none"}, "aggregation: expected 'token_mean', 'prompt_mean', got 'none'"),
    ],
)
def test_errors_name_the_key(name, keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.torchrl(name, **keys)
