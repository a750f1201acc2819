"""The modes of Tunix against its formulas, sequence by sequence, and its keys."""

import pytest
import torch
from framework_rows import assert_same

from drpo_core import PPOClip, modes
from drpo_core.modes import Mode
from drpo_core.modes._tunix import DEFAULTS, LOSSES, REDUCTIONS
from drpo_core.penalties import Penalty


def theirs(name, **keys):
    c = {**DEFAULTS, **keys}
    high = c["epsilon"] if c["epsilon_high"] is None else c["epsilon_high"]

    def of_row(row):
        ell = row.x - row.mu
        ratio = torch.exp(row.x - row.x.detach() + ell.mean().detach() if name == "gspo-token" else ell)
        loss = torch.maximum(-row.a * ratio, -row.a * torch.clamp(ratio, 1.0 - c["epsilon"], 1.0 + high))
        if c["epsilon_c"] and row.a < 0:
            loss = torch.minimum(-c["epsilon_c"] * row.a, loss)
        gap = row.ref - row.x
        kl = {"kl": -gap, "mse_kl": 0.5 * gap * gap, "low_var_kl": torch.exp(gap) - gap - 1.0}[c["kl_loss_mode"]]
        return loss + c["beta"] * kl

    def loss(rows):
        losses = [of_row(row) for row in rows]
        if c["loss_agg_mode"] == "token-mean":
            return torch.cat(losses).mean()
        by_length = c["loss_agg_mode"] == "sequence-mean-token-mean"
        return sum(each.mean() if by_length else each.sum() for each in losses) / len(rows)

    return loss


CLIP = {"epsilon": 0.05, "epsilon_high": 0.1}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {**CLIP, "epsilon_c": 1.1, "beta": 0.0},
        *({**CLIP, "kl_loss_mode": mode} for mode in ("kl", "mse_kl", "low_var_kl")),
        *({**CLIP, "loss_agg_mode": mode} for mode in REDUCTIONS),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(name, keys):
    assert_same(modes.tunix(name, **keys), theirs(name, **keys))


def test_mode_is_the_value():
    assert modes.tunix() == Mode(
        PPOClip(eps_low=0.2, eps_high=0.2),
        penalties=(Penalty(coefficient=0.04, estimator="k1"),),
        reduction="sequence_mean_token_mean",
    )


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("gspo", {}, "loss_algo: expected 'grpo', 'gspo-token', got 'gspo'"),
        ("grpo", {"eps": 0.1}, "eps: expected keys of Tunix among epsilon"),
        ("grpo", {"loss_agg_mode": "sequence-mean-token-scale"}, "loss_agg_mode: expected 'token-mean'"),
        ("grpo", {"beta": 0.0, "kl_loss_mode": "kl"}, "kl_loss_mode: Tunix's 'grpo'"),
    ],
)
def test_errors_name_the_key(name, keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.tunix(name, **keys)
