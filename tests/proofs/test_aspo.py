"""Proofs for `docs/derivations/aspo.md`."""

from __future__ import annotations

import pytest
import sympy
import z3
from provers import Term, c, delta_high, delta_low, prove, r, real_bounds, real_tokens, symbolic, sympy_tokens, to_z3

from drpo_core import PPOClip
from drpo_core.objectives import ASPO
from drpo_core.objectives.thresholds import Bounds

TINY = z3.RealVal("2.061153622438558e-09")  # e⁻²⁰, where 1/r saturates
REGION = Bounds(delta_low, delta_high)
a = sympy.Symbol("a", positive=True)
dual = sympy.Symbol("dual", positive=True)


def test_gradient():
    """SymPy + z3: without caps ∂L/∂log π = −A r w, off the kinks."""
    tokens, objective = sympy_tokens(), symbolic(ASPO, eps=REGION)
    gradient = r * sympy.diff(Term(objective.loss(tokens)).e, r)
    expected = -tokens.advantages.e * Term(objective.ratio_weight(tokens)).e
    ratio, low, high = z3.Reals("r delta_low delta_high")
    kinks = [ratio != 1 - low, ratio != 1 + high]
    given = [*real_tokens()[1], low > 0, high > 0, ratio > TINY, *kinks]
    prove(to_z3(gradient) == to_z3(expected), *given)
    weighted = to_z3(r * Term(objective.weight(tokens)).e)
    prove(weighted == to_z3(Term(objective.ratio_weight(tokens)).e), *given)


BRANCHES = {"A > 0, beyond c": (a, 0.1), "A > 0, between": (a, 0.9), "A < 0, beyond c'": (-a, 3), "A < 0, between": (-a, 1.5)}


@pytest.mark.parametrize("branch", BRANCHES)
def test_gradient_beyond_the_caps(branch):
    """SymPy: with caps ∂L/∂log π = −A r w, on each piece."""
    advantage, ratio = BRANCHES[branch]
    at = {r: ratio, c: 2, dual: 2, delta_low: 0.2, delta_high: 0.2, a: 1}
    tokens = sympy_tokens(at=at, advantages=advantage)
    objective = symbolic(ASPO, eps=REGION, max_ratio=c, dual_clip=dual)
    gradient = r * sympy.diff(objective.loss(tokens).e, r)
    assert sympy.simplify(gradient + advantage * objective.ratio_weight(tokens).e) == 0
    assert sympy.simplify(r * objective.weight(tokens).e - objective.ratio_weight(tokens).e) == 0


def test_product_is_bounded():
    """z3: 0 ≤ r w ≤ c for A > 0, and 0 ≤ r w ≤ c' for A < 0."""
    tokens, facts = real_tokens()
    eps, positive = real_bounds("eps")
    cap, other = z3.Reals("c dual")
    product = symbolic(ASPO, eps=eps, max_ratio=cap, dual_clip=other).ratio_weight(tokens)
    given = [*facts, *positive, cap > 1, other > 1]
    prove(z3.Implies(tokens.advantages > 0, z3.And(product >= 0, product <= cap)), *given)
    prove(z3.Implies(tokens.advantages < 0, z3.And(product >= 0, product <= other)), *given)


def test_continuity():
    """SymPy: loss and r w agree on both sides of the caps; at the bounds of the region the losses do."""
    objective = symbolic(ASPO, eps=REGION, max_ratio=c, dual_clip=dual)

    def piece(method, advantage, ratio):
        at = {r: ratio, c: 2, dual: 2, delta_low: 0.2, delta_high: 0.2, a: 1}
        return getattr(objective, method)(sympy_tokens(at=at, advantages=advantage)).e

    joints = [(a, 0.1, 0.9, 1 / c, True), (-a, 1.5, 3, dual, True), (a, 0.9, 1.5, 1 + delta_high, False)]
    joints += [(-a, 0.5, 0.9, 1 - delta_low, False)]
    for advantage, below, above, joint, smooth in joints:
        for method in ("loss", "ratio_weight")[: 1 + smooth]:
            difference = piece(method, advantage, below) - piece(method, advantage, above)
            assert sympy.simplify(difference.subs(r, joint)) == 0, (method, joint)


def test_same_mask_as_clipping():
    """z3: w = 0 iff PPO clipping at the same ε drops the token (A ≠ 0 or not)."""
    tokens, facts = real_tokens()
    eps, positive = real_bounds("eps")
    cap, other = z3.Reals("c dual")
    weight = symbolic(ASPO, eps=eps, max_ratio=cap, dual_clip=other).weight(tokens)
    clip = symbolic(PPOClip, eps=eps).weight(tokens)
    prove((weight == 0) == (clip == 0), *facts, *positive, cap > 1, other > 1)
