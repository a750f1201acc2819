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
    symbolic,
    sympy_tokens,
)

from drpo_core import SPO, PolicyGradient, PPOClip
from drpo_core.objectives.thresholds import Bounds


def test_gradient():
    """SymPy + z3: ∂L/∂log π = −A r w."""
    tokens, objective = sympy_tokens(), symbolic(SPO, eps=Bounds(delta_low, delta_high))
    gradient_is_minus_a_r_w(objective.loss(tokens), objective.weight(tokens))


def test_same_region_as_ppo():
    """z3: w ≥ 0 iff PPO's clip keeps the token (A ≠ 0 or not)."""
    tokens, facts = real_tokens()
    eps, positive = real_bounds("eps")
    smooth, clip = (symbolic(kind, eps=eps).weight(tokens) for kind in (SPO, PPOClip))
    prove((smooth >= 0) == (clip == 1), *facts, *positive)


def test_unbounded():
    """z3: no constant bounds w; 10⁶ is exceeded at ε = 0.2."""
    tokens, facts = real_tokens()
    refute(symbolic(SPO, eps=z3.RealVal("0.2")).weight(tokens) >= -(10**6), *facts)


def test_minimum():
    """z3: L ≥ L(r*), r* = 1 + sign(A) ε, at every r."""
    tokens, facts = real_tokens()
    eps, positive = real_bounds("eps")
    at = z3.If(tokens.advantages > 0, 1 + eps.high, 1 - eps.low)
    best = tokens._replace(ratio=at, ratio_minus_one=at - 1)
    objective = symbolic(SPO, eps=eps)
    prove(objective.loss(tokens) >= objective.loss(best), *facts, *positive, tokens.advantages != 0)


def test_expected_penalty():
    """SymPy: under μ the penalty is Σ |A| (π − μ)²/(2 ε μ), an advantage-weighted χ²."""
    a, pi = sympy.symbols("a pi", positive=True)
    for sign in (1, -1):
        tokens = sympy_tokens(advantages=sign * a)
        penalty = symbolic(SPO, eps=delta_high).loss(tokens) - PolicyGradient().loss(tokens)
        expected = (mu * Term(penalty).e).subs(r, pi / mu)
        assert sympy.simplify(expected - a * (pi - mu) ** 2 / (2 * delta_high * mu)) == 0
