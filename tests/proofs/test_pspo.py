"""Proofs for `docs/derivations/pspo.md`."""

from __future__ import annotations

import sympy
from provers import gradient_is_minus_a_r_w, mu, r, symbolic, sympy_tokens

from drpo_core import PolicyGradient
from drpo_core.objectives import PSPO

share = sympy.Symbol("alpha", positive=True)


def test_gradient():
    """SymPy + z3: ∂L/∂log π = −A r (1 − α)."""
    tokens = sympy_tokens()
    objective = symbolic(PSPO, alpha=share)
    gradient_is_minus_a_r_w(objective.loss(tokens), objective.weight(tokens))


def test_scaled_surrogate():
    """SymPy: L = (1 − α)(−A r) − α A, and w = (1 − α) times that of PG-IS."""
    tokens, objective, surrogate = sympy_tokens(), symbolic(PSPO, alpha=share), PolicyGradient()
    difference = objective.loss(tokens).e - (1 - share) * surrogate.loss(tokens).e + share * tokens.advantages.e
    assert sympy.simplify(difference) == 0
    assert sympy.simplify(objective.weight(tokens).e - (1 - share) * surrogate.weight(tokens).e) == 0


def test_contraction():
    """SymPy: the ratio in the loss is that of (1 − α)π + αμ; it is α at r = 0, and moves 1 − α times as far as r."""
    tokens = sympy_tokens()
    mixed = symbolic(PSPO, alpha=share).loss(tokens).e / -tokens.advantages.e
    pi = r * mu
    assert sympy.simplify(mixed - ((1 - share) * pi + share * mu) / mu) == 0
    assert sympy.simplify(mixed.subs(r, 0) - share) == 0
    assert sympy.simplify(mixed - 1 - (1 - share) * (r - 1)) == 0
