"""Proofs for `docs/derivations/drpo.md`."""

from __future__ import annotations

import numpy as np
import pytest
import sympy
import z3
from provers import (
    A,
    Term,
    delta_high,
    delta_low,
    gradient_is_minus_a_r_w,
    mu,
    prove,
    r,
    real_bounds,
    real_tokens,
    refute,
    same,
    symbolic,
    sympy_tokens,
)

from drpo_core import DPPO, DRPO, SPO, MaskDRPO, PolicyGradient, Tokens
from drpo_core.objectives.thresholds import Bounds

TOKENS, FACTS = real_tokens()
DELTA, POSITIVE = real_bounds()
GIVEN = [*FACTS, *POSITIVE]
OBJECTIVE = symbolic(DRPO, delta=DELTA)
MASK = symbolic(MaskDRPO, delta=DELTA)
MASKED = symbolic(DPPO, delta=DELTA)
WEIGHT = OBJECTIVE.weight(TOKENS)
ADVANTAGE, RATIO, MU = TOKENS.advantages, TOKENS.ratio, z3.Real("mu")
PI = MU * RATIO
SYMMETRIC = symbolic(DRPO, delta=delta_high)


class ManyThresholds(Tokens):
    """Tokens each with its own threshold."""

    def by_advantage(self, low, high):  # noqa: ARG002
        """The threshold of each."""
        return high


def _weight(sign, shift, thresholds):
    advantages = np.full_like(thresholds, sign)
    tokens = ManyThresholds(*[None] * 2, advantages, *[None] * 3, shift, None, np)
    return symbolic(DRPO, delta=thresholds).weight(tokens)


def magnitude(x):
    return z3.If(x >= 0, x, -x)


def test_gradient():
    """SymPy + z3: ∂L/∂log π = −A r w."""
    tokens, objective = sympy_tokens(), symbolic(DRPO, delta=Bounds(delta_low, delta_high))
    gradient_is_minus_a_r_w(objective.loss(tokens), objective.weight(tokens))


def test_weight_is_the_published_one():
    """z3: for A ≠ 0, w = 1 − sign(A (r − 1)) |π − μ| / δ."""
    delta = z3.Real("delta")
    signed = z3.If(ADVANTAGE * (RATIO - 1) > 0, magnitude(PI - MU), -magnitude(PI - MU))
    prove(symbolic(DRPO, delta=delta).weight(TOKENS) == 1 - signed / delta, *FACTS, delta > 0, ADVANTAGE != 0)


def test_weight_bounds():
    """z3: 1 − 1/δ ≤ w ≤ 1 + 1/δ; for A > 0, 1 − (1 − μ)/δ ≤ w ≤ 1 + μ/δ; for A < 0, 1 − μ/δ ≤ w ≤ 1 + (1 − μ)/δ."""
    low, high = DELTA
    prove(z3.And(1 - (1 - MU) / high <= WEIGHT, 1 + MU / high >= WEIGHT), *GIVEN, ADVANTAGE > 0)
    prove(z3.And(1 - MU / low <= WEIGHT, 1 + (1 - MU) / low >= WEIGHT), *GIVEN, ADVANTAGE < 0)
    prove(z3.And(1 - 1 / low <= WEIGHT, 1 + 1 / low >= WEIGHT), *GIVEN, low == high)


def test_weight_bounds_are_tight():
    """z3: for any μ and δ each bound is the value of w at π = 1 or π = 0."""
    one, zero = ({"ratio": 1 / MU, "shift": 1 - MU}, {"ratio": z3.RealVal(0), "shift": -MU})
    for ends, sign in (((one, zero), ADVANTAGE > 0), ((zero, one), ADVANTAGE < 0)):
        least, most = (OBJECTIVE.weight(TOKENS._replace(**end)) for end in ends)
        bound = z3.And(least <= WEIGHT, most >= WEIGHT)
        prove(bound, *GIVEN, sign)


def test_same_region_as_dppo():
    """z3: w ≥ 0 iff DPPO Binary-TV at the same δ keeps the token."""
    prove((WEIGHT >= 0) == (MASKED.weight(TOKENS) == 1), *GIVEN)


def test_same_region_strict():
    """z3: w > 0 iff a strict mask, which drops the boundary too, keeps the token."""
    d = TOKENS.shift
    dropped = z3.Or(z3.And(ADVANTAGE > 0, d >= DELTA.high), z3.And(ADVANTAGE < 0, d <= -DELTA.low))
    prove((WEIGHT > 0) == z3.Not(dropped), *GIVEN)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_region_is_exact_in_floating_point(dtype):
    """enumeration: computed w is 0 at sign(A) d = δ and negative at the next float, for all δ (float32: all significands)."""
    if dtype is np.float16:
        thresholds = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)
    else:  # scaling by a power of 2 is exact, so one binade stands for all normal ones
        significands = np.arange(0x800000, dtype=np.uint32)
        subnormal, lowest, usual = significands, significands + 0x800000, significands + 0x3F000000
        thresholds = np.concatenate((subnormal[1:], lowest, usual)).view(np.float32)
    thresholds = thresholds[thresholds < np.finfo(dtype).max]
    beyond = np.nextafter(thresholds, dtype(np.inf))
    for sign in (1, -1):
        at_boundary, outside = (_weight(sign, sign * d, thresholds) for d in (thresholds, beyond))
        assert (at_boundary == 0).all()
        assert (outside < 0).all()


def test_reciprocal_form_is_not_exact():
    """enumeration: 1 − d (1/δ), which a compiler may make of 1 − d/δ, misses the boundary for a quarter of all float32 δ."""
    thresholds = (np.arange(0x800000, dtype=np.uint32) + 0x3F000000).view(np.float32)
    beyond = np.nextafter(thresholds, np.float32(np.inf))
    assert (1 - beyond * (1 / thresholds) >= 0).mean() > 0.2


def test_adaptive_spo():
    """z3: DRPO(δ) = SPO(ε = δ/μ), loss and weight, low and high."""
    eps = Bounds(DELTA.low / MU, DELTA.high / MU)
    spo = symbolic(SPO, eps=eps)
    prove(z3.And(spo.weight(TOKENS) == WEIGHT, OBJECTIVE.loss(TOKENS) == spo.loss(TOKENS)), *GIVEN)


def test_converging_and_diverging():
    """z3: converging tokens have w > 1, diverging ones w < 1, and w < 0 only diverging ones beyond δ."""
    moved = ADVANTAGE * (RATIO - 1)
    prove(z3.Implies(moved < 0, WEIGHT > 1), *GIVEN)
    prove(z3.Implies(moved > 0, WEIGHT < 1), *GIVEN)
    prove(z3.Implies(WEIGHT < 0, z3.And(moved > 0, z3.Or(DELTA.high < PI - MU, DELTA.low < MU - PI))), *GIVEN)


def test_lipschitz():
    """z3: |w(π) − w(π′)| = |π − π′|/δ, so w is continuous, at r = 1 too."""
    other, facts = real_tokens("2", mu=MU)
    threshold = TOKENS.by_advantage(*DELTA)
    change = magnitude(WEIGHT - OBJECTIVE.weight(other)) * threshold
    prove(change == magnitude(TOKENS.shift - other.shift), *GIVEN, *facts, ADVANTAGE != 0)


def test_symmetry_in_advantage():
    """z3: w(A) + w(−A) = 2 with one δ."""
    objective, opposite = symbolic(DRPO, delta=DELTA.high), TOKENS._replace(advantages=-ADVANTAGE)
    prove(objective.weight(TOKENS) + objective.weight(opposite) == 2, *GIVEN)


def test_symmetry_in_policies():
    """z3: w(π, μ) + w(μ, π) = 2."""
    swapped = TOKENS._replace(ratio=1 / RATIO, ratio_minus_one=1 / RATIO - 1, shift=PI * (1 / RATIO - 1))
    prove(WEIGHT + OBJECTIVE.weight(swapped) == 2, *GIVEN, RATIO > 0)


def test_stationary_point():
    """z3: L ≥ L(r*) at every r, with equality only at r* = 1 + sign(A) δ/μ, i.e. π* = μ + sign(A) δ, where w = 0."""
    star = z3.If(ADVANTAGE > 0, 1 + DELTA.high / MU, 1 - DELTA.low / MU)
    at_star = TOKENS._replace(ratio=star, ratio_minus_one=star - 1, shift=MU * (star - 1))
    loss, best = OBJECTIVE.loss(TOKENS), OBJECTIVE.loss(at_star)
    prove(z3.And(loss >= best, (loss == best) == (star == RATIO)), *GIVEN, ADVANTAGE != 0)
    prove(OBJECTIVE.weight(at_star) == 0, *GIVEN, ADVANTAGE != 0)


def test_stationary_point_reachable():
    """z3: 0 ≤ π* ≤ 1 iff μ ≤ 1 − δ (A > 0), iff μ ≥ δ (A < 0)."""
    star = z3.If(ADVANTAGE > 0, MU + DELTA.high, MU - DELTA.low)
    reachable = z3.If(ADVANTAGE > 0, 1 - DELTA.high >= MU, DELTA.low <= MU)
    prove(z3.And(star >= 0, star <= 1) == reachable, *GIVEN, ADVANTAGE != 0)


def test_second_derivative():
    """SymPy: ∂²(−L)/∂(log π)² = r A [1 − sign(A) (2π − μ)/δ]."""
    a = sympy.Symbol("a", positive=True)
    for sign in (1, -1):
        objective = -SYMMETRIC.loss(sympy_tokens(advantages=sign * a)).e
        second = r * sympy.diff(r * sympy.diff(objective, r), r)
        same(second, r * sign * a * (1 - sign * (2 * mu * r - mu) / delta_high))


def test_gradient_bound():
    """z3: |∂L/∂log π| μ = |A| π |w| ≤ |A| (1 + 1/δ)."""
    delta = z3.Real("delta")
    weight = symbolic(DRPO, delta=delta).weight(TOKENS)
    gradient = magnitude(ADVANTAGE * RATIO * weight)
    prove(gradient * MU <= magnitude(ADVANTAGE) * (1 + 1 / delta), *FACTS, delta > 0)


def test_gradient_unbounded():
    """z3: no constant bounds r w; 10⁶ is exceeded at δ = 0.15."""
    delta = z3.RealVal("0.15")
    refute(magnitude(RATIO * symbolic(DRPO, delta=delta).weight(TOKENS)) <= 10**6, *FACTS, ADVANTAGE > 0)


def test_vacuous():
    """z3: at δ ≥ 1, w ≥ 0: nothing is corrected; at δ = 12.5, 0.92 ≤ w ≤ 1.08."""
    prove(WEIGHT >= 0, *GIVEN, DELTA.low >= 1, DELTA.high >= 1)
    paper = z3.RealVal("12.5")
    weight = symbolic(DRPO, delta=paper).weight(TOKENS)
    prove(z3.And(weight >= z3.RealVal("0.92"), weight <= z3.RealVal("1.08")), *FACTS)


def test_limits():
    """SymPy: w → 1 and L → −A r as δ → ∞; δ L → |A| μ (r − 1)²/2 as δ → 0."""
    a = sympy.Symbol("a", positive=True)
    for sign in (1, -1):
        tokens = sympy_tokens(advantages=sign * a)
        loss, weight = SYMMETRIC.loss(tokens).e, SYMMETRIC.weight(tokens).e
        assert sympy.limit(weight, delta_high, sympy.oo) == 1
        same(sympy.limit(loss, delta_high, sympy.oo), -sign * a * r)
        same(sympy.limit(sympy.expand(delta_high * loss), delta_high, 0), a * mu * (r - 1) ** 2 / 2)


def test_expected_penalty():
    """SymPy: under μ the penalty is Σ |A| (π − μ)²/(2δ), an advantage-weighted ℓ₂²."""
    a, pi = sympy.symbols("a pi", positive=True)
    for sign in (1, -1):
        tokens = sympy_tokens(advantages=sign * a)
        penalty = Term(SYMMETRIC.loss(tokens) - PolicyGradient().loss(tokens)).e
        same((mu * penalty).subs(r, pi / mu), a * (pi - mu) ** 2 / (2 * delta_high))


def test_population_optimum():
    """SymPy: d = δ (sign A − λ/|A|), λ = Σ sign A / Σ 1/|A|, maximises the expected objective over Σ π = 1 (3 outcomes)."""
    sizes = sympy.symbols("a1:4", positive=True)
    pi = sympy.Symbol("pi", positive=True)
    for signs in ((1, 1, 1), (1, 1, -1), (1, -1, -1), (-1, -1, -1)):
        multiplier = sum(signs) / sum(1 / size for size in sizes)
        shifts = [delta_high * (sign - multiplier / size) for sign, size in zip(signs, sizes, strict=True)]
        assert sympy.simplify(sum(shifts)) == 0
        for sign, size, shift in zip(signs, sizes, shifts, strict=True):
            loss = SYMMETRIC.loss(sympy_tokens(advantages=sign * size)).e
            share = (-mu * loss).subs(r, pi / mu)  # of the objective Σ μ (−L)
            assert sympy.simplify(sympy.diff(share, pi).subs(pi, mu + shift) - multiplier) == 0
            assert sympy.simplify(sympy.diff(share, pi, 2)).is_negative


def test_mask_drpo_weight():
    """z3: Mask-DRPO's w is 1 where DPPO Binary-TV keeps the token, DRPO's where it drops it."""
    kept = MASKED.weight(TOKENS) == 1
    prove(MASK.weight(TOKENS) == z3.If(kept, z3.RealVal(1), WEIGHT), *GIVEN)


def test_mask_drpo_loss():
    """z3: Mask-DRPO's L is −A r where kept, −A r + |A| μ ((r − 1)² − (δ/μ)²)/(2δ) where dropped."""
    threshold = TOKENS.by_advantage(*DELTA)
    squares = (RATIO - 1) * (RATIO - 1) - threshold * threshold / (MU * MU)
    penalty = magnitude(ADVANTAGE) * MU * squares / (2 * threshold)
    dropped = MASKED.weight(TOKENS) == 0
    expected = -ADVANTAGE * RATIO + z3.If(dropped, penalty, z3.RealVal(0))
    for sign in (ADVANTAGE > 0, ADVANTAGE < 0):
        prove(MASK.loss(TOKENS) == expected, *GIVEN, sign)


@pytest.mark.parametrize("shift", [-0.4, -0.1, 0.1, 0.4])
@pytest.mark.parametrize("sign", [1, -1], ids=["A > 0", "A < 0"])
def test_mask_drpo_gradient(sign, shift):
    """SymPy: ∂L/∂log π = −A r w on every branch: outside or inside on either side of μ, either sign of A."""
    point = {A: sign, mu: sympy.Rational(1, 2), r: 1 + 2 * shift, delta_high: sympy.Rational(1, 4)}
    tokens, objective = sympy_tokens(at=point), symbolic(MaskDRPO, delta=delta_high)
    gradient = r * sympy.diff(objective.loss(tokens).e, r)
    same(gradient, -A * r * objective.weight(tokens).e)


@pytest.mark.parametrize("sign", [1, -1], ids=["A > 0", "A < 0"])
def test_mask_drpo_continuity(sign):
    """SymPy: from outside, L tends to −A r at the boundary and w to 0; inside w is 1."""
    a, h = sympy.symbols("a h", positive=True)
    objective = symbolic(MaskDRPO, delta=delta_high)
    for beyond, expected in ((h, 0), (-delta_high * h / (1 + h), 1)):
        shift = sign * (delta_high + beyond)
        tokens = sympy_tokens(advantages=sign * a, ratio=1 + shift / mu, ratio_minus_one=shift / mu, shift=shift)
        loss, weight = (sympy.simplify(f(tokens).e) for f in (objective.loss, objective.weight))
        same(sympy.limit(loss, h, 0), -sign * a * (1 + sign * delta_high / mu))
        same(sympy.limit(weight, h, 0), expected)
