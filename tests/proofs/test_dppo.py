"""Proofs for `docs/derivations/dppo.md`."""

from __future__ import annotations

import pytest
import z3
from provers import (
    FORMATS,
    c,
    delta_high,
    delta_low,
    float_tokens,
    gradient_is_minus_a_r_w,
    prove,
    real_bounds,
    real_tokens,
    symbolic,
    sympy_tokens,
)

from drpo_core import DPPO, PolicyGradient, PPOClip
from drpo_core.objectives.thresholds import Bounds

TOKENS, FACTS = real_tokens()
DELTA, POSITIVE = real_bounds()
MU = z3.Real("mu")
BINARY_TV = symbolic(DPPO, delta=DELTA)
PER_TOKEN = symbolic(DPPO, delta=DELTA, divergence="per_token")


def test_mask_binary_tv():
    """z3: M = 0 iff A > 0 and π − μ > δ_high, or A < 0 and π − μ < −δ_low."""
    a, d = TOKENS.advantages, TOKENS.shift
    dropped = z3.Or(z3.And(a > 0, d > DELTA.high), z3.And(a < 0, d < -DELTA.low))
    weight = BINARY_TV.weight(TOKENS)
    prove(weight == z3.If(dropped, z3.RealVal(0), z3.RealVal(1)), *FACTS, *POSITIVE)


def test_mask_any_divergence():
    """z3: M = 0 iff A > 0, r > 1 and D > δ_high, or A < 0, r < 1 and D > δ_low: δ_high governs the side r > 1."""
    a, r, divergence = TOKENS.advantages, TOKENS.ratio, TOKENS.divergence
    dropped = z3.Or(z3.And(a > 0, r > 1, divergence > DELTA.high), z3.And(a < 0, r < 1, divergence > DELTA.low))
    weight = PER_TOKEN.weight(TOKENS)
    prove(weight == z3.If(dropped, z3.RealVal(0), z3.RealVal(1)), *FACTS, *POSITIVE)


def test_binary_tv_is_a_divergence():
    """z3: the mask of Binary TV is the general one at D = |π − μ|."""
    absolute = z3.If(TOKENS.shift >= 0, TOKENS.shift, -TOKENS.shift)
    measured = TOKENS._replace(divergence=absolute)
    binary, general = (objective.weight(measured) for objective in (BINARY_TV, PER_TOKEN))
    prove(binary == general, *FACTS, *POSITIVE)


def test_adaptive_clipping():
    """z3: DPPO Binary-TV(δ) has the weight of PPO-clip(ε = δ/μ), low and high."""
    eps = Bounds(DELTA.low / MU, DELTA.high / MU)
    prove(BINARY_TV.weight(TOKENS) == symbolic(PPOClip, eps=eps).weight(TOKENS), *FACTS, *POSITIVE)


def test_gradient():
    """SymPy + z3: ∂L/∂log π = −A r w with M held fixed, truncated or not."""
    tokens = sympy_tokens()
    for cap in (None, c):
        objective = symbolic(DPPO, delta=Bounds(delta_low, delta_high), max_ratio=cap)
        gradient_is_minus_a_r_w(objective.loss(tokens), objective.weight(tokens))


def test_loss_is_masked_surrogate():
    """z3: L = −A r M."""
    surrogate = PolicyGradient().loss(TOKENS)
    mask = BINARY_TV.weight(TOKENS)
    prove(BINARY_TV.loss(TOKENS) == surrogate * mask, *FACTS, *POSITIVE)


def test_kl_kept_within_tv_kept():
    """z3: given KL ≥ 2 (π − μ)², what Binary-KL(δ_KL) keeps Binary-TV(δ_TV) keeps, if δ_KL ≤ 2 δ_TV²."""
    kl_delta, kl_positive = real_bounds("kl")
    pinsker = TOKENS.divergence >= 2 * TOKENS.shift * TOKENS.shift
    linked = [kl <= 2 * tv * tv for kl, tv in zip(kl_delta, DELTA, strict=True)]
    kept_by_kl = symbolic(DPPO, delta=kl_delta, divergence="per_token").weight(TOKENS) == 1
    kept_by_tv = BINARY_TV.weight(TOKENS) == 1
    prove(z3.Implies(kept_by_kl, kept_by_tv), *FACTS, *POSITIVE, *kl_positive, *linked, pinsker)


def test_vacuous():
    """z3: at δ ≥ 1 Binary TV drops nothing."""
    prove(BINARY_TV.weight(TOKENS) == 1, *FACTS, *POSITIVE, DELTA.low >= 1, DELTA.high >= 1)


@pytest.mark.parametrize("name", FORMATS)
def test_fails_closed(name):
    """z3 floats: a NaN in r − 1 (so in ℓ) or A drops the token; so does a NaN divergence of a diverging one."""
    tokens, delta, given = float_tokens(name)
    a, excess = tokens.advantages, tokens.ratio_minus_one
    diverging = z3.Or(z3.And(a > 0.0, excess > 0.0), z3.And(a < 0.0, excess < 0.0))
    for kind, divergence in (("binary_tv", tokens.shift), ("per_token", tokens.divergence)):
        unknown = z3.Or(excess.is_nan(), a.is_nan(), z3.And(diverging, divergence.is_nan()))
        weight = symbolic(DPPO, delta=delta, divergence=kind).weight(tokens)
        prove(z3.Implies(unknown, weight == 0.0), *given)
