"""Proofs for `docs/derivations/index.md`: what every objective shares."""

from __future__ import annotations

import pytest
import sympy
import z3
from provers import A, c, mu, prove, r, real_bounds, real_tokens, symbolic, sympy_tokens

from drpo_core import CISPO, DPPO, PolicyGradient, PPOClip
from drpo_core.objectives import OBJECTIVES, SAPO, IcePop, Reinforce

CAP = z3.Real("c")
VARIANTS = {
    "truncated": lambda _: symbolic(PolicyGradient, max_ratio=CAP),
    "dual clip": lambda bounds: symbolic(PPOClip, eps=bounds, dual_clip=CAP),
    "DPPO D": lambda bounds: symbolic(DPPO, delta=bounds, divergence="per_token"),
    "DPPO D, truncated": lambda bounds: symbolic(DPPO, delta=bounds, divergence="per_token", max_ratio=CAP),
}
NOT_IN_Z3 = {"DPPO-KL", "SAPO"}  # whose D is a logarithm: DPPO D is it, for any D; whose w is exponential: see test_sapo.py
LOGARITHMIC = {"CISPO", "REINFORCE", "TOPR", "truncated", "DPPO D, truncated"}  # losses
NAMES = [*(family.name for family in OBJECTIVES if family.name not in NOT_IN_Z3), *VARIANTS]


def objective(name, bounds):
    """An objective of the library's table or a variant of one, with symbols for thresholds."""
    if name in VARIANTS:
        return VARIANTS[name](bounds)
    (family,) = (family for family in OBJECTIVES if family.name == name)
    if family.objective is IcePop:
        return symbolic(IcePop, min_ratio=1 / CAP, max_ratio=CAP)
    thresholds = {family.threshold: CAP if family.threshold == "max_ratio" else bounds} if family.threshold else {}
    return symbolic(family.objective, **thresholds, **family.fixed)


@pytest.mark.parametrize("name", NAMES)
def test_on_policy(name):
    """z3: at π = μ, w = 1 and r = 1: every objective's gradient is −A (for caps c ≥ 1)."""
    tokens, facts = real_tokens()
    bounds, positive = real_bounds()
    prove(objective(name, bounds).weight(tokens) == 1, *facts, *positive, CAP >= 1, tokens.ratio == 1)


@pytest.mark.parametrize("name", NAMES)
def test_homogeneous(name):
    """z3: L(k A) = k L(A) and w(k A) = w(A) for k > 0; so the gradient scales with A, and at A = 0 loss and gradient are 0."""
    tokens, facts = real_tokens()
    bounds, positive = real_bounds()
    k = z3.Real("k")
    scaled = tokens._replace(advantages=k * tokens.advantages)
    given = [*facts, *positive, CAP > 1, k > 0]
    made = objective(name, bounds)
    prove(made.weight(scaled) == made.weight(tokens), *given)
    if name in LOGARITHMIC:
        return
    for sign in (tokens.advantages > 0, tokens.advantages < 0):
        prove(made.loss(scaled) == k * made.loss(tokens), *given, sign)
    prove(made.loss(tokens) == 0, *given, tokens.advantages == 0)


LINEAR = {
    "truncated": symbolic(PolicyGradient, max_ratio=c),
    "CISPO": symbolic(CISPO, max_ratio=c),
    "REINFORCE": Reinforce(),
    "SAPO": symbolic(SAPO, tau_positive=c, tau_negative=c),
}


@pytest.mark.parametrize("name", LINEAR)
def test_homogeneous_with_logarithm(name):
    """SymPy: a loss with a logarithm or an exponential is linear in A; on-policy w = 1."""
    for ratio in (1, 3):
        tokens = sympy_tokens(at={r: ratio, c: 2, mu: sympy.Rational(1, 4)})
        piece = LINEAR[name].loss(tokens).e
        assert sympy.simplify(piece - A * sympy.diff(piece, A)) == 0
        assert A not in sympy.diff(piece, A).free_symbols
    on_policy = sympy_tokens(at={r: 1, c: 2, mu: sympy.Rational(1, 4)})
    assert LINEAR[name].weight(on_policy).e.subs(r, 1) - 1 == 0
