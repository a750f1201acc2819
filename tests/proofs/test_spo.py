"""Proofs for `docs/derivations/spo.md`."""

from __future__ import annotations

import sympy
import z3
from provers import (
    Term,
    delta_high,
    delta_low,
    gradient_is_minus_a_r_w,
    mu,
    prove,
    r,
    real_bounds,
    real_tokens,
    refute,
    sympy_tokens,
)

from drpo_core import policy_gradient, ppo, spo
from drpo_core.thresholds import Bounds


def test_gradient():
    """SymPy + z3: ∂L/∂log π = −A r w."""
    tokens, eps = sympy_tokens(), Bounds(delta_low, delta_high)
    gradient_is_minus_a_r_w(spo.loss(tokens, eps), spo.weight(tokens, eps))


def test_same_region_as_ppo():
    """z3: w ≥ 0 iff PPO's clip keeps the token (A ≠ 0 or not)."""
    tokens, facts = real_tokens()
    eps, positive = real_bounds("eps")
    prove((spo.weight(tokens, eps) >= 0) == (ppo.weight(tokens, eps, None) == 1), *facts, *positive)


def test_unbounded():
    """z3: no constant bounds w; 10⁶ is exceeded at ε = 0.2."""
    tokens, facts = real_tokens()
    eps = Bounds(z3.RealVal("0.2"), z3.RealVal("0.2"))
    refute(spo.weight(tokens, eps) >= -(10**6), *facts)


def test_minimum():
    """z3: L ≥ L(r*), r* = 1 + sign(A) ε, at every r."""
    tokens, facts = real_tokens()
    eps, positive = real_bounds("eps")
    at = z3.If(tokens.advantages > 0, 1 + eps.high, 1 - eps.low)
    best = tokens._replace(ratio=at, ratio_minus_one=at - 1)
    prove(spo.loss(tokens, eps) >= spo.loss(best, eps), *facts, *positive, tokens.advantages != 0)


def test_expected_penalty():
    """SymPy: under μ the penalty is Σ |A| (π − μ)²/(2 ε μ), an advantage-weighted χ²."""
    a, pi = sympy.symbols("a pi", positive=True)
    for sign in (1, -1):
        tokens = sympy_tokens(advantages=sign * a)
        penalty = spo.loss(tokens, Bounds(delta_high, delta_high)) - policy_gradient.loss(tokens, None)
        expected = (mu * Term(penalty).e).subs(r, pi / mu)
        assert sympy.simplify(expected - a * (pi - mu) ** 2 / (2 * delta_high * mu)) == 0
