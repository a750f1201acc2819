"""Proofs for `docs/derivations/reinforce.md`."""

from __future__ import annotations

import sympy
import z3
from provers import A, gradient_is_minus_a_r_w, mu, prove, r, real_tokens, same, sympy_tokens

from drpo_core import PolicyGradient
from drpo_core.objectives import Reinforce


def test_gradient():
    """SymPy + z3: ∂L/∂log π = −A r w with r w = 1, at every r, and with w = 1/r where r ≥ e^−20."""
    tokens = sympy_tokens()
    gradient_is_minus_a_r_w(Reinforce().loss(tokens), Reinforce().ratio_weight(tokens).e / r)
    gradient_is_minus_a_r_w(Reinforce().loss(tokens), Reinforce().weight(tokens), z3.Real("r") >= 2.1e-9)


def test_weight():
    """z3: r w = 1; the weight is min(1/r, e²⁰), positive and falling in r."""
    tokens, facts = real_tokens()
    objective = Reinforce()
    weight, r_w = objective.weight(tokens), objective.ratio_weight(tokens)
    in_range = tokens.ratio >= 2.1e-9
    prove(z3.And(r_w == 1, weight > 0), *facts)
    prove(tokens.ratio * weight == r_w, *facts, in_range)
    larger = tokens._replace(ratio=z3.Real("r_larger"))
    prove(objective.weight(larger) <= weight, *facts, larger.ratio > tokens.ratio)
    prove(objective.weight(larger) < weight, *facts, in_range, larger.ratio > tokens.ratio)


def test_expected_gradient():
    """SymPy: times μ, −A r w is −μ A for REINFORCE and −π A for PG-IS."""
    tokens, pi = sympy_tokens(), sympy.Symbol("pi", positive=True)
    of_reinforce = -mu * A * Reinforce().ratio_weight(tokens).e
    of_pg_is = (-mu * A * r * PolicyGradient().weight(tokens).e).subs(r, pi / mu)
    same(of_reinforce, -mu * A)
    same(of_pg_is, -pi * A)


def test_unbounded():
    """SymPy: for A < 0, L → −∞ as r → 0."""
    piece = Reinforce().loss(sympy_tokens(at={r: 1, mu: sympy.Rational(1, 2)})).e
    assert sympy.limit(piece.subs(A, -1), r, 0) == -sympy.oo
