"""Proofs for `docs/derivations/index.md`: what every objective shares."""

from __future__ import annotations

import pytest
import sympy
import z3
from provers import A, c, mu, prove, r, real_bounds, real_tokens, sympy_tokens

from drpo_core import cispo, dppo, drpo, policy_gradient, ppo, spo
from drpo_core.dppo import BINARY_TV, PER_TOKEN

CAP = z3.Real("c")
OBJECTIVES = {
    "PG-IS": (lambda t, _: policy_gradient.loss(t, None), lambda t, _: policy_gradient.weight(t, None)),
    "truncated": (None, lambda t, _: policy_gradient.weight(t, CAP)),
    "PPO clip": (lambda t, b: ppo.loss(t, b, None), lambda t, b: ppo.weight(t, b, None)),
    "dual clip": (lambda t, b: ppo.loss(t, b, CAP), lambda t, b: ppo.weight(t, b, CAP)),
    "SPO": (spo.loss, spo.weight),
    "DPPO TV": (lambda t, b: dppo.loss(t, b, BINARY_TV, None), lambda t, b: dppo.weight(t, b, BINARY_TV, None)),
    "DPPO D": (lambda t, b: dppo.loss(t, b, PER_TOKEN, None), lambda t, b: dppo.weight(t, b, PER_TOKEN, CAP)),
    "DRPO": (drpo.loss, drpo.weight),
    "Mask-DRPO": (drpo.mask_loss, drpo.mask_weight),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_policy(name):
    """z3: at π = μ, w = 1 and r = 1: every objective's gradient is −A (for caps c ≥ 1)."""
    tokens, facts = real_tokens()
    bounds, positive = real_bounds()
    prove(OBJECTIVES[name][1](tokens, bounds) == 1, *facts, *positive, CAP >= 1, tokens.ratio == 1)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "truncated"])
def test_homogeneous(name):
    """z3: L(k A) = k L(A) and w(k A) = w(A) for k > 0; so the gradient scales with A, and at A = 0 loss and gradient are 0."""
    tokens, facts = real_tokens()
    bounds, positive = real_bounds()
    k = z3.Real("k")
    scaled = tokens._replace(advantages=k * tokens.advantages)
    given = [*facts, *positive, CAP > 1, k > 0]
    loss, weight = OBJECTIVES[name]
    prove(weight(scaled, bounds) == weight(tokens, bounds), *given)
    for sign in (tokens.advantages > 0, tokens.advantages < 0):
        prove(loss(scaled, bounds) == k * loss(tokens, bounds), *given, sign)
    prove(loss(tokens, bounds) == 0, *given, tokens.advantages == 0)


def test_homogeneous_with_logarithm():
    """SymPy: the truncated and the CISPO loss are linear in A."""
    for loss in (policy_gradient.loss, cispo.loss):
        for ratio in (1, 3):
            piece = loss(sympy_tokens(at={r: ratio, c: 2, mu: sympy.Rational(1, 4)}), c).e
            assert sympy.simplify(piece - A * sympy.diff(piece, A)) == 0
            assert A not in sympy.diff(piece, A).free_symbols
