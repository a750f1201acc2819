"""Proofs for `docs/derivations/icepop.md`."""

from __future__ import annotations

import pytest
import z3
from provers import FORMATS, c, float_tokens, gradient_is_minus_a_r_w, prove, real_tokens, symbolic, sympy_tokens

from drpo_core import PPOClip
from drpo_core.objectives import IcePop
from drpo_core.objectives.thresholds import Bounds

TOKENS, FACTS = real_tokens()
LOW, HIGH = z3.Reals("c_low c_high")
ICEPOP = symbolic(IcePop, min_ratio=LOW, max_ratio=HIGH)
GIVEN = [*FACTS, LOW > 0, LOW <= HIGH]


def test_gradient():
    """SymPy + z3: ∂L/∂log π = −A r w with M held fixed."""
    tokens, objective = sympy_tokens(), symbolic(IcePop, min_ratio=c / 2, max_ratio=c)
    gradient_is_minus_a_r_w(objective.loss(tokens), objective.weight(tokens))


def test_mask():
    """z3: w = 1 exactly where c_low ≤ r ≤ c_high, else 0, whatever the sign of A; L = −A r w."""
    within = z3.And(TOKENS.ratio >= LOW, TOKENS.ratio <= HIGH)
    weight = ICEPOP.weight(TOKENS)
    prove(weight == z3.If(within, z3.RealVal(1), z3.RealVal(0)), *GIVEN)
    prove(ICEPOP.inside(TOKENS) == within, *GIVEN)
    prove(ICEPOP.loss(TOKENS) == -TOKENS.advantages * TOKENS.ratio * weight, *GIVEN)


def test_within_ppo_clip():
    """z3: what IcePop keeps PPO clip keeps; of a diverging token, each keeps what the other does."""
    clip = symbolic(PPOClip, eps=Bounds(1 - LOW, HIGH - 1)).weight(TOKENS)
    around_one = [LOW < 1, HIGH > 1]
    prove(z3.Implies(ICEPOP.weight(TOKENS) == 1, clip == 1), *GIVEN, *around_one)
    prove(ICEPOP.weight(TOKENS) == clip, *GIVEN, *around_one, TOKENS.advantages * (TOKENS.ratio - 1) > 0)


def test_vacuous():
    """z3: at bounds that no ratio of the token's μ reaches, nothing is dropped."""
    prove(ICEPOP.weight(TOKENS) == 1, *GIVEN, HIGH * z3.Real("mu") >= 1, TOKENS.ratio >= LOW)


@pytest.mark.parametrize("name", FORMATS)
def test_fails_closed(name):
    """z3 floats: a NaN in r or A drops the token."""
    tokens, bounds, given = float_tokens(name)
    unknown = z3.Or(tokens.ratio.is_nan(), tokens.advantages.is_nan())
    weight = symbolic(IcePop, min_ratio=bounds.low, max_ratio=bounds.high).weight(tokens)
    prove(z3.Implies(unknown, weight == 0.0), *given)
