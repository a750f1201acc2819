"""Proofs for `docs/derivations/topr.md`."""

from __future__ import annotations

import sympy
import z3
from provers import A, mu, prove, r, real_tokens, same, sympy_tokens

from drpo_core.objectives import TOPR

POINTS = [(sign, ratio) for sign in (1, -1) for ratio in (sympy.Rational(1, 2), 2)]


def test_gradient():
    """SymPy: ∂L/∂log π = r ∂L/∂r is −A r w, for either sign of A, on both sides of r = 1."""
    for sign, ratio in POINTS:
        tokens = sympy_tokens(at={A: sign, r: ratio, mu: sympy.Rational(1, 4)})
        loss, weight, factor = (term(tokens).e for term in (TOPR().loss, TOPR().weight, TOPR().ratio_weight))
        same(r * sympy.diff(loss, r), -A * factor)
        same(r * weight, factor)


def test_weight():
    """z3: r w = 1 where A > 0 and min(1, r) where A < 0; w = r w/r where r ≥ e^−20, else at most e²⁰."""
    tokens, facts = real_tokens()
    ratio, positive = tokens.ratio, tokens.advantages > 0
    smaller = z3.If(ratio < 1, ratio, z3.RealVal(1))
    weight, factor = TOPR().weight(tokens), TOPR().ratio_weight(tokens)
    prove(factor == z3.If(positive, z3.RealVal(1), smaller), *facts)
    prove(ratio * weight == factor, *facts, ratio >= 2.1e-9)
    prove(z3.And(weight > 0, weight <= 4.9e8, z3.Implies(z3.Not(positive), weight <= 1)), *facts)


def test_bounded_below():
    """SymPy: for A < 0, L ≥ 0, rises in r, and is 0 at r = 0; at r = 1 both pieces have the value −A and the slope −A."""
    below, beyond = (TOPR().loss(sympy_tokens(at={A: -1, r: at, mu: sympy.Rational(1, 4)})).e.subs(A, -1) for at in (0.5, 2))
    same(below, r)
    same(beyond, 1 + sympy.log(r))
    for order in (0, 1):
        same(sympy.diff(below - beyond, r, order).subs(r, 1), 0)
