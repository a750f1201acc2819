"""Proofs for `docs/derivations/cispo.md`."""

from __future__ import annotations

import sympy
import z3
from provers import A, c, mu, prove, r, real_tokens, symbolic, sympy_tokens, to_z3

from drpo_core import CISPO, PolicyGradient
from drpo_core.objectives import Reinforce


def test_gradient():
    """SymPy + z3: with r held fixed, as stop-gradient does, ∂L/∂log π = −A min(r, c) = −A r w."""
    log_pi = sympy.Symbol("log_pi", real=True)
    tokens = sympy_tokens(log_prob=log_pi)
    gradient = sympy.diff(symbolic(CISPO, max_ratio=c).loss(tokens).e, log_pi)
    weight = symbolic(CISPO, max_ratio=c).weight(tokens).e
    positive = [z3.Real(name) > 0 for name in ("r", "c")]
    prove(to_z3(gradient) == to_z3(-A * r * weight), *positive)


def test_score_and_ratio_forms_differ():
    """SymPy: −sg(r) A log π and −r A share their gradient; values and second derivatives differ."""
    log_pi, held = sympy.symbols("log_pi r_held", real=True)
    score = -held * A * log_pi
    ratio = PolicyGradient().loss(sympy_tokens(ratio=sympy.exp(log_pi) / mu)).e
    at = {held: sympy.exp(log_pi) / mu}
    assert sympy.simplify((sympy.diff(score, log_pi) - sympy.diff(ratio, log_pi)).subs(at)) == 0
    assert sympy.diff(score, log_pi, 2) == 0
    assert sympy.simplify(sympy.diff(ratio, log_pi, 2) - ratio) == 0
    assert sympy.simplify((score - ratio).subs(at)) != 0


def test_two_sided():
    """SymPy + z3: with a lower bound, ∂L/∂log π = −A clip(r, c_low, c) = −A r w; w < 1, 1 or > 1 above, within and below."""
    low, log_pi = sympy.Symbol("c_low", positive=True), sympy.Symbol("log_pi", real=True)
    objective = symbolic(CISPO, max_ratio=c, min_ratio=low)
    tokens = sympy_tokens(log_prob=log_pi)
    gradient = to_z3(sympy.diff(objective.loss(tokens).e, log_pi))
    weight, factor = to_z3(objective.weight(tokens).e), to_z3(objective.ratio_weight(tokens).e)
    ratio, lower, upper, advantage = z3.Reals("r c_low c A")
    given = [ratio >= 2.1e-9, lower > 0, lower <= upper]
    clipped = z3.If(ratio < lower, lower, z3.If(ratio > upper, upper, ratio))
    prove(z3.And(factor == clipped, ratio * weight == clipped, gradient == -advantage * clipped), *given)
    prove(z3.And((weight < 1) == (ratio > upper), (weight > 1) == (ratio < lower)), *given)


def test_limits_of_the_bounds():
    """z3: without a token below it the lower bound changes nothing; at c_low = c = 1, w is REINFORCE's."""
    tokens, facts = real_tokens()
    low, cap = z3.Reals("c_low c")
    one_sided = symbolic(CISPO, max_ratio=cap)
    two_sided = symbolic(CISPO, max_ratio=cap, min_ratio=low)
    given = [*facts, low > 0, low <= cap]
    for method in ("weight", "ratio_weight"):
        same = getattr(two_sided, method)(tokens) == getattr(one_sided, method)(tokens)
        prove(same, *given, tokens.ratio >= low)
        of_reinforce = getattr(two_sided, method)(tokens) == getattr(Reinforce(), method)(tokens)
        prove(of_reinforce, *given, low == 1, cap == 1)
