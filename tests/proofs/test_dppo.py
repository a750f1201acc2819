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
    sympy_tokens,
)

from drpo_core import dppo, policy_gradient, ppo
from drpo_core.dppo import BINARY_TV, PER_TOKEN
from drpo_core.thresholds import Bounds

TOKENS, FACTS = real_tokens()
DELTA, POSITIVE = real_bounds()
MU = z3.Real("mu")


def test_mask_binary_tv():
    """z3: M = 0 iff A > 0 and π − μ > δ_high, or A < 0 and π − μ < −δ_low."""
    a, d = TOKENS.advantages, TOKENS.shift
    dropped = z3.Or(z3.And(a > 0, d > DELTA.high), z3.And(a < 0, d < -DELTA.low))
    weight = dppo.weight(TOKENS, DELTA, BINARY_TV, None)
    prove(weight == z3.If(dropped, z3.RealVal(0), z3.RealVal(1)), *FACTS, *POSITIVE)


def test_mask_any_divergence():
    """z3: M = 0 iff A > 0, r > 1 and D > δ_high, or A < 0, r < 1 and D > δ_low: δ_high governs the side r > 1."""
    a, r, divergence = TOKENS.advantages, TOKENS.ratio, TOKENS.divergence
    dropped = z3.Or(z3.And(a > 0, r > 1, divergence > DELTA.high), z3.And(a < 0, r < 1, divergence > DELTA.low))
    weight = dppo.weight(TOKENS, DELTA, PER_TOKEN, None)
    prove(weight == z3.If(dropped, z3.RealVal(0), z3.RealVal(1)), *FACTS, *POSITIVE)


def test_binary_tv_is_a_divergence():
    """z3: the mask of Binary TV is the general one at D = |π − μ|."""
    absolute = z3.If(TOKENS.shift >= 0, TOKENS.shift, -TOKENS.shift)
    measured = TOKENS._replace(divergence=absolute)
    binary, general = (dppo.weight(measured, DELTA, kind, None) for kind in (BINARY_TV, PER_TOKEN))
    prove(binary == general, *FACTS, *POSITIVE)


def test_adaptive_clipping():
    """z3: DPPO Binary-TV(δ) has the weight of PPO-clip(ε = δ/μ), low and high."""
    eps = Bounds(DELTA.low / MU, DELTA.high / MU)
    prove(dppo.weight(TOKENS, DELTA, BINARY_TV, None) == ppo.weight(TOKENS, eps, None), *FACTS, *POSITIVE)


def test_gradient():
    """SymPy + z3: ∂L/∂log π = −A r w with M held fixed, truncated or not."""
    tokens, delta = sympy_tokens(), Bounds(delta_low, delta_high)
    for cap in (None, c):
        loss, weight = (f(tokens, delta, BINARY_TV, cap) for f in (dppo.loss, dppo.weight))
        gradient_is_minus_a_r_w(loss, weight)


def test_loss_is_masked_surrogate():
    """z3: L = −A r M."""
    surrogate = policy_gradient.loss(TOKENS, None)
    mask = dppo.weight(TOKENS, DELTA, BINARY_TV, None)
    prove(dppo.loss(TOKENS, DELTA, BINARY_TV, None) == surrogate * mask, *FACTS, *POSITIVE)


def test_kl_kept_within_tv_kept():
    """z3: given KL ≥ 2 (π − μ)², what Binary-KL(δ_KL) keeps Binary-TV(δ_TV) keeps, if δ_KL ≤ 2 δ_TV²."""
    kl_delta, kl_positive = real_bounds("kl")
    pinsker = TOKENS.divergence >= 2 * TOKENS.shift * TOKENS.shift
    linked = [kl <= 2 * tv * tv for kl, tv in zip(kl_delta, DELTA, strict=True)]
    kept_by_kl = dppo.weight(TOKENS, kl_delta, PER_TOKEN, None) == 1
    kept_by_tv = dppo.weight(TOKENS, DELTA, BINARY_TV, None) == 1
    prove(z3.Implies(kept_by_kl, kept_by_tv), *FACTS, *POSITIVE, *kl_positive, *linked, pinsker)


def test_vacuous():
    """z3: at δ ≥ 1 Binary TV drops nothing."""
    prove(dppo.weight(TOKENS, DELTA, BINARY_TV, None) == 1, *FACTS, *POSITIVE, DELTA.low >= 1, DELTA.high >= 1)


@pytest.mark.parametrize("name", FORMATS)
def test_fails_closed(name):
    """z3 floats: a NaN in r − 1 (so in ℓ) or A drops the token; so does a NaN divergence of a diverging one."""
    tokens, delta, given = float_tokens(name)
    a, excess = tokens.advantages, tokens.ratio_minus_one
    diverging = z3.Or(z3.And(a > 0.0, excess > 0.0), z3.And(a < 0.0, excess < 0.0))
    for kind, divergence in ((BINARY_TV, tokens.shift), (PER_TOKEN, tokens.divergence)):
        unknown = z3.Or(excess.is_nan(), a.is_nan(), z3.And(diverging, divergence.is_nan()))
        prove(z3.Implies(unknown, dppo.weight(tokens, delta, kind, None) == 0.0), *given)
