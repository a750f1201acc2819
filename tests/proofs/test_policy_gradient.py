"""Proofs for `docs/derivations/policy_gradient.md`."""

from __future__ import annotations

import sympy
import z3
from provers import c, gradient_is_minus_a_r_w, mu, prove, r, real_tokens, symbolic, sympy_tokens

from drpo_core import PolicyGradient


def test_gradient():
    """SymPy + z3: ∂L/∂log π = −A r."""
    tokens = sympy_tokens()
    gradient_is_minus_a_r_w(PolicyGradient().loss(tokens), PolicyGradient().weight(tokens))


def test_truncated_gradient():
    """SymPy + z3: with a cap, ∂L/∂log π = −A r w with w = min(1, c/r), at every r."""
    tokens = sympy_tokens()
    truncated = symbolic(PolicyGradient, max_ratio=c)
    gradient_is_minus_a_r_w(truncated.loss(tokens), truncated.weight(tokens))


def test_truncated_weight():
    """z3: r w = min(r, c), and 0 < w ≤ 1."""
    tokens, facts = real_tokens()
    cap = z3.Real("c")
    weight = symbolic(PolicyGradient, max_ratio=cap).weight(tokens)
    smaller = z3.If(tokens.ratio < cap, tokens.ratio, cap)
    prove(z3.And(tokens.ratio * weight == smaller, weight > 0, weight <= 1), *facts, cap > 0)


def test_truncated_continuity():
    """SymPy: at r = c the value −A c and the slope −A of both pieces agree."""
    truncated = symbolic(PolicyGradient, max_ratio=c)
    below, beyond = (truncated.loss(sympy_tokens(at={r: at, c: 2})).e for at in (1, 3))
    for order in (0, 1):
        difference = sympy.diff(beyond, r, order) - sympy.diff(below, r, order)
        assert sympy.simplify(difference.subs(r, c)) == 0


def test_expected_loss():
    """SymPy: under μ the expected loss is −Σ π A, term by term."""
    tokens = sympy_tokens()
    expected = mu * PolicyGradient().loss(tokens).e
    pi = sympy.Symbol("pi", positive=True)
    assert sympy.simplify(expected.subs(r, pi / mu) + tokens.advantages.e * pi) == 0
