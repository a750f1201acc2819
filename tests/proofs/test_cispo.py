"""Proofs for `docs/derivations/cispo.md`."""

from __future__ import annotations

import sympy
import z3
from provers import A, c, mu, prove, r, symbolic, sympy_tokens, to_z3

from drpo_core import CISPO, PolicyGradient


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
