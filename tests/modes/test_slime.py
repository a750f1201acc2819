"""The modes of slime against its formulas, sequence by sequence, and its keys."""

import pytest
import torch
from framework_rows import assert_same, batch

from drpo_core import PPOClip, modes
from drpo_core.anchors import Behavior
from drpo_core.corrections import ImportanceWeight, NegativeSequenceMask
from drpo_core.modes import Mode
from drpo_core.modes._slime import DEFAULTS, ICEPOP, LOSSES


def theirs(name, **keys):
    c = {**DEFAULTS, **keys}
    high = c["eps_clip"] if c["eps_clip_high"] is None else c["eps_clip_high"]

    def of_row(row):
        old = row.mu if c["use_rollout_logprobs"] else row.old
        ell = row.x - old
        ratio = torch.exp(ell.mean().expand_as(ell) if name == "gspo" else ell)
        clipped = torch.clamp(ratio, 1.0 - c["eps_clip"], 1.0 + high)
        loss = torch.maximum(-ratio * row.a, -clipped * row.a)
        if c["eps_clip_c"] and row.a < 0:
            loss = torch.minimum(-c["eps_clip_c"] * row.a, loss)
        if name == "cispo":
            loss = -clipped.detach() * row.a * row.x
        if c["use_opsm"] and row.a < 0 and -ell.mean() > c["opsm_delta"]:
            loss = loss * 0.0
        if c["use_tis"]:
            rho = torch.exp(row.old - row.mu)
            inside = (rho >= c["tis_clip_low"]) & (rho <= c["tis_clip"])
            zeroed = torch.where(inside, rho, 0.0)
            truncated = torch.clamp(rho, c["tis_clip_low"], c["tis_clip"])
            loss = loss * (zeroed if c["custom_tis_function_path"] else truncated)
        if c["use_kl_loss"]:
            gap = row.x - row.ref
            kl = {"k1": gap, "k2": gap * gap / 2.0}.get(c["kl_loss_type"], torch.exp(-gap) - 1.0 + gap)
            loss = loss + c["kl_loss_coef"] * (torch.exp(ell) * kl if c["use_unbiased_kl"] else kl)
        return loss

    def loss(rows):
        losses = [of_row(row) for row in rows]
        return torch.cat(losses).mean() if c["calculate_per_token_loss"] else sum(each.mean() for each in losses) / len(rows)

    return loss


CLIP = {"eps_clip": 0.05, "eps_clip_high": 0.1}
VARIANTS = [
    CLIP,
    {"eps_clip": 0.1, "calculate_per_token_loss": True},
    {**CLIP, "use_rollout_logprobs": True, "use_opsm": True, "opsm_delta": 0.01},
    {**CLIP, "use_opsm": True, "opsm_delta": 0.01},
    {**CLIP, "use_tis": True, "tis_clip": 1.02},
    {**CLIP, "use_tis": True, "tis_clip": 1.02, "tis_clip_low": 0.99},
    {**CLIP, "use_tis": True, "tis_clip": 1.02, "tis_clip_low": 0.97, "custom_tis_function_path": ICEPOP},
    *({**CLIP, "use_kl_loss": True, "kl_loss_coef": 0.2, "kl_loss_type": kind} for kind in ("k1", "k2", "k3", "low_var_kl")),
    *({**CLIP, "use_kl_loss": True, "kl_loss_coef": 0.2, "kl_loss_type": k, "use_unbiased_kl": True} for k in ("k1", "k3")),
    {
        **CLIP,
        "use_kl_loss": True,
        "kl_loss_coef": 0.2,
        "kl_loss_type": "k3",
        "use_unbiased_kl": True,
        "use_rollout_logprobs": True,
    },
]


@pytest.mark.parametrize("keys", VARIANTS, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(name, keys):
    if name == "gspo" and "use_tis" in keys:
        with pytest.raises(ValueError, match=r"use_tis: .* differentiated as one"):
            modes.slime(name, **keys)
        return
    arrays = batch(drift=0.1, mismatch=0.03)
    assert_same(modes.slime(name, **keys), theirs(name, **keys), arrays=arrays)


def test_dual_clip():
    keys = {"eps_clip": 0.05, "eps_clip_c": 1.1}
    assert_same(modes.slime("grpo", **keys), theirs("grpo", **keys))


def test_mode_is_the_value():
    assert modes.slime("grpo", use_rollout_logprobs=True, use_opsm=True) == Mode(
        PPOClip(eps_low=0.2, eps_high=0.2),
        anchor=Behavior(),
        corrections=(NegativeSequenceMask(delta=1e-4),),
        reduction="sequence_mean_token_mean",
    )
    assert modes.slime(use_tis=True).corrections == (ImportanceWeight(high=2.0),)
    assert modes.slime(use_kl_loss=True).penalties == ()


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("sapo", {}, "advantage_estimator: expected 'grpo', .* got 'sapo'"),
        ("grpo", {"clip": 0.2}, "clip: expected keys of slime among eps_clip"),
        ("cispo", {"eps_clip_c": 3.0}, "eps_clip_c: slime's 'cispo' with these settings reads"),
        ("grpo", {"entropy_coef": 0.1}, "entropy_coef: .* logits"),
        ("grpo", {"use_tis": True, "use_rollout_logprobs": True}, "use_tis: .* refuses"),
        ("grpo", {"use_tis": True, "custom_tis_function_path": "mine"}, "custom_tis_function_path: expected None"),
        ("grpo", {"use_kl_loss": True, "kl_loss_type": "k2", "use_unbiased_kl": True}, "use_unbiased_kl: .* k2"),
        ("grpo", {"tis_clip": 3.0}, "tis_clip: slime's 'grpo'"),
    ],
)
def test_errors_name_the_key(name, keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        modes.slime(name, **keys)
