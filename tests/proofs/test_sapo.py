"""Proofs for `docs/derivations/sapo.md`."""

from __future__ import annotations

from types import SimpleNamespace

import sympy
import z3
from provers import A, mu, prove, r, real_tokens, same, symbolic, sympy_tokens, z3_xp

from drpo_core.objectives import SAPO

TAU = sympy.Symbol("tau", positive=True)
POINTS = {"below": sympy.Rational(1, 2), "above": 2}
X = TAU * (r - 1)
SIGMA = 1 / (1 + sympy.exp(-X))


def branches():
    """Loss and weight on either side of r = 1, for either sign of A, in which τ is the one that governs it."""
    for ratio in POINTS.values():
        for sign in (1, -1):
            tokens = sympy_tokens(at={r: ratio, A: sign, TAU: 1, mu: sympy.Rational(1, 4)})
            other = sympy.Symbol("other", positive=True)
            taus = {"tau_positive": TAU, "tau_negative": other} if sign > 0 else {"tau_positive": other, "tau_negative": TAU}
            objective = symbolic(SAPO, **taus)
            yield tuple(sympy.nsimplify(term(tokens).e, rational=True) for term in (objective.loss, objective.weight))


def test_gradient():
    """SymPy: ∂L/∂log π = r ∂L/∂r is −A r w, on both sides of r = 1 and for both signs of A."""
    for loss, weight in branches():
        same(sympy.simplify(r * sympy.diff(loss, r) / (A * r * weight)), -1)


def test_forms():
    """SymPy: the code's forms are L = −A (4/τ) σ(τ(r − 1)) and w = 4σ(1 − σ) = sech²(τ(r − 1)/2)."""
    for loss, weight in branches():
        assert sympy.simplify(loss / (-A * 4 / TAU * SIGMA)) == 1
        assert sympy.simplify(weight / (4 * SIGMA * (1 - SIGMA))) == 1
        assert sympy.simplify((weight / sympy.sech(X / 2) ** 2).rewrite(sympy.exp)) == 1


def real(name="", **fields):
    """A token over the reals, its weight, e^−abs(x) as an unknown of which the range is told, and what is given."""
    decay = z3.Real(f"decay{name}")
    tokens, facts = real_tokens(name, xp=SimpleNamespace(**{**vars(z3_xp), "exp": lambda _: decay}), **fields)
    taus = z3.Reals("tau_positive tau_negative")
    objective = symbolic(SAPO, tau_positive=taus[0], tau_negative=taus[1])
    known = [decay > 0, decay <= 1, (decay == 1) == (tokens.ratio == 1), *(tau > 0 for tau in taus)]
    return tokens, objective.weight(tokens), decay, [*facts, *known]


def test_weight_bounds():
    """z3: 0 < w ≤ 1, and w = 1 exactly at r = 1."""
    tokens, weight, _, given = real()
    prove(z3.And(weight > 0, weight <= 1, (weight == 1) == (tokens.ratio == 1)), *given)


def test_weight_is_even_and_falls():
    """z3 + SymPy: w depends on e^−τ·abs(r − 1) alone and grows with it; it is the same at r − 1 and 1 − r."""
    _, weight, decay, given = real()
    _, other, smaller, more = real("_other")
    prove(other < weight, *given, *more, smaller < decay)
    for _, formula in branches():
        assert sympy.simplify((formula / formula.subs(r, 2 - r)).rewrite(sympy.exp)) == 1


def test_limits():
    """z3 + SymPy: w ≤ 4 e^−abs(x), so r w → 0 as r → ∞; at r = 0, w = sech²(τ/2); w → 1 as τ → 0."""
    _, bounded, decay, given = real()
    prove(bounded <= 4 * decay, *given)
    assert sympy.limit(r * 4 * sympy.exp(-X), r, sympy.oo) == 0
    for _, weight in branches():
        assert sympy.simplify((weight.subs(r, 0) / sympy.sech(TAU / 2) ** 2).rewrite(sympy.exp)) == 1
        assert sympy.limit(weight, TAU, 0) == 1
