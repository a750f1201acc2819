"""Proofs for `docs/derivations/ppo.md`."""

from __future__ import annotations

import pytest
import z3
from provers import c, delta_high, delta_low, gradient_is_minus_a_r_w, prove, real_bounds, real_tokens, symbolic, sympy_tokens

from drpo_core import PPOClip
from drpo_core.objectives.thresholds import Bounds


def smaller(x, y):
    return z3.If(x <= y, x, y)


def larger(x, y):
    return z3.If(x >= y, x, y)


@pytest.mark.parametrize("dual", [False, True], ids=["clip", "dual clip"])
def test_loss_is_the_published_one(dual):
    """z3: the code's loss is max(−A r, −A clip(r)), and min(that, −A c) where A < 0 under dual clip."""
    tokens, facts = real_tokens()
    eps, positive = real_bounds("eps")
    a, ratio, cap = tokens.advantages, tokens.ratio, z3.Real("c")
    clipped = smaller(larger(ratio, 1 - eps.low), 1 + eps.high)
    published = larger(-a * ratio, -a * clipped)
    if dual:
        published = z3.If(a < 0, smaller(published, -a * cap), published)
    objective = symbolic(PPOClip, eps=eps, dual_clip=cap if dual else None)
    prove(objective.loss(tokens) == published, *facts, *positive, cap > 1)


def test_weight():
    """z3: w = 0 iff A > 0 and r > 1 + ε_high, A < 0 and r < 1 − ε_low, or A < 0 and r > c; else w = 1."""
    tokens, facts = real_tokens()
    eps, positive = real_bounds("eps")
    a, ratio, cap = tokens.advantages, tokens.ratio, z3.Real("c")
    dropped = z3.Or(z3.And(a > 0, ratio > 1 + eps.high), z3.And(a < 0, ratio < 1 - eps.low), z3.And(a < 0, ratio > cap))
    weight = symbolic(PPOClip, eps=eps, dual_clip=cap).weight(tokens)
    prove(weight == z3.If(dropped, z3.RealVal(0), z3.RealVal(1)), *facts, *positive, cap > 1)


def test_gradient():
    """SymPy + z3: ∂L/∂log π = −A r w off the kinks r = 1 − ε_low, 1 + ε_high, c."""
    tokens, objective = sympy_tokens(), symbolic(PPOClip, eps=Bounds(delta_low, delta_high), dual_clip=c)
    ratio, low, high, cap = z3.Reals("r delta_low delta_high c")
    kinks = [ratio != 1 - low, ratio != 1 + high, ratio != cap]
    gradient_is_minus_a_r_w(objective.loss(tokens), objective.weight(tokens), *kinks)
