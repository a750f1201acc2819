"""Proofs for `docs/derivations/ipo.md`."""

from __future__ import annotations

import pytest
import z3
from provers import (
    FORMATS,
    c,
    delta_high,
    delta_low,
    float_tokens,
    gradient_is_minus_a_r_w,
    prove,
    real_bounds,
    real_tokens,
    symbolic,
    sympy_tokens,
)

from drpo_core import DPPO
from drpo_core.objectives import IPO
from drpo_core.objectives.thresholds import Bounds

TOKENS, FACTS = real_tokens()
DELTA, POSITIVE = real_bounds()
MU = z3.Real("mu")
OF_IPO = symbolic(IPO, delta=DELTA)


def test_gradient():
    """SymPy + z3: ∂L/∂log π = −A r w with M held fixed, truncated or not."""
    tokens = sympy_tokens()
    for cap in (None, c):
        objective = symbolic(IPO, delta=Bounds(delta_low, delta_high), max_ratio=cap)
        gradient_is_minus_a_r_w(objective.loss(tokens), objective.weight(tokens))


def test_mask():
    """z3: w = 1 exactly where −δ_low ≤ π − μ ≤ δ_high, else 0; with a cap, min(1, c/r) there."""
    d, cap = TOKENS.shift, z3.Real("c")
    within = z3.And(d >= -DELTA.low, d <= DELTA.high)
    prove(OF_IPO.weight(TOKENS) == z3.If(within, z3.RealVal(1), z3.RealVal(0)), *FACTS, *POSITIVE)
    prove(OF_IPO.inside(TOKENS) == within, *FACTS, *POSITIVE)
    capped = symbolic(IPO, delta=DELTA, max_ratio=cap).weight(TOKENS)
    smaller = z3.If(TOKENS.ratio < cap, TOKENS.ratio, cap)
    prove(TOKENS.ratio * capped == z3.If(within, smaller, z3.RealVal(0)), *FACTS, *POSITIVE, cap > 0)


def test_within_dppo():
    """z3: what IPO keeps DPPO Binary-TV keeps; of a diverging token, each keeps what the other does."""
    dppo, ipo = symbolic(DPPO, delta=DELTA).weight(TOKENS), OF_IPO.weight(TOKENS)
    prove(z3.Implies(ipo == 1, dppo == 1), *FACTS, *POSITIVE)
    prove(ipo == dppo, *FACTS, *POSITIVE, TOKENS.advantages * (TOKENS.ratio - 1) > 0)


def test_rare_tokens_are_kept():
    """z3: where μ ≤ δ_low and π ≤ δ_high, w = 1 at any ratio."""
    prove(OF_IPO.weight(TOKENS) == 1, *FACTS, *POSITIVE, DELTA.low >= MU, MU * TOKENS.ratio <= DELTA.high)


def test_vacuous():
    """z3: at δ ≥ 1 IPO drops nothing."""
    prove(OF_IPO.weight(TOKENS) == 1, *FACTS, *POSITIVE, DELTA.low >= 1, DELTA.high >= 1)


@pytest.mark.parametrize("name", FORMATS)
def test_fails_closed(name):
    """z3 floats: a NaN in π − μ or A drops the token."""
    tokens, delta, given = float_tokens(name)
    unknown = z3.Or(tokens.shift.is_nan(), tokens.advantages.is_nan())
    prove(z3.Implies(unknown, symbolic(IPO, delta=delta).weight(tokens) == 0.0), *given)
