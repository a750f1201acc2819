"""Proofs for `docs/derivations/up.md`."""

from __future__ import annotations

import sympy
import z3
from provers import A, mu, prove, real_tokens, symbolic, sympy_tokens

from drpo_core import PPOClip
from drpo_core.objectives import UP
from drpo_core.objectives.thresholds import Bounds

EPS, CAP = z3.Reals("eps c")
GIVEN = [EPS > 0, CAP > 1]


def test_gradient():
    """SymPy: for A > 0 the derivative of the code's loss in log π is −A, and the code's r w is 1."""
    log_pi, a = sympy.Symbol("log_pi", real=True), sympy.Symbol("a", positive=True)
    tokens = sympy_tokens(log_prob=log_pi, advantages=a)
    objective = symbolic(UP, eps_low=sympy.Rational(1, 5))
    # not at π = 0
    loss = objective.loss(tokens).e.subs(sympy.Eq(log_pi, -sympy.oo), sympy.false)
    assert sympy.simplify(sympy.diff(sympy.piecewise_fold(loss), log_pi) + a) == 0
    up, (tokens, facts) = symbolic(UP, eps_low=EPS, dual_clip=CAP), real_tokens()
    prove(up.ratio_weight(tokens) == 1, *facts, *GIVEN, tokens.advantages > 0)
    tiny = z3.RealVal("2.061153622438558e-09")
    prove(tokens.ratio * up.weight(tokens) == 1, *facts, *GIVEN, tokens.advantages > 0, tokens.ratio >= tiny)


def test_negative_side_is_clipping():
    """z3: for A < 0 weight, r w and loss are PPOClip's at any ε_high, with dual clip."""
    tokens, facts = real_tokens()
    up, clip = symbolic(UP, eps_low=EPS, dual_clip=CAP), symbolic(PPOClip, eps=Bounds(EPS, z3.Real("h")), dual_clip=CAP)
    given = [*facts, *GIVEN, z3.Real("h") > 0, tokens.advantages < 0]
    prove(up.weight(tokens) == clip.weight(tokens), *given)
    prove(up.ratio_weight(tokens) == tokens.ratio * clip.weight(tokens), *given)
    prove(up.loss(tokens) == clip.loss(tokens), *given)


def test_product_is_bounded():
    """z3: 0 ≤ r w ≤ c under a dual clip, for any r and A."""
    tokens, facts = real_tokens()
    product = symbolic(UP, eps_low=EPS, dual_clip=CAP).ratio_weight(tokens)
    prove(z3.And(product >= 0, product <= CAP), *facts, *GIVEN)


def test_expected_gradient_is_forward():
    """SymPy: for A > 0, μ ∂L/∂log π = −A μ, the derivative of A μ log(μ/π)."""
    log_pi, a = sympy.Symbol("log_pi", real=True), sympy.Symbol("a", positive=True)
    product = symbolic(UP, eps_low=sympy.Rational(1, 5)).ratio_weight(sympy_tokens(advantages=a)).e
    expected = mu * -a * sympy.simplify(product)
    divergence = a * mu * (sympy.log(mu) - log_pi)
    assert A not in expected.free_symbols
    assert sympy.simplify(expected - sympy.diff(divergence, log_pi)) == 0
