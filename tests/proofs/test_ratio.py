"""Proofs for `docs/derivations/ratio.md`."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import sympy
import z3
from mpmath import iv
from provers import Term, prove, same, xp_at

from drpo_core import probability_shift
from drpo_core.tokens import Tokens

iv.dps = 40
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}  # the unit roundoff u: a correctly rounded result is x (1 + e), |e| ≤ u


x, b = sympy.symbols("x b", negative=True)


def computed(log_pi, log_mu) -> Tokens:
    return Tokens.of(Term(x), Term(b), Term(sympy.Symbol("A")), dtype=None, xp=xp_at({x: log_pi, b: log_mu}))


@pytest.mark.parametrize("point", [(-2, -1), (-1, -2)], ids=["where l < 0", "where l > 0"])
def test_quantities(point):
    """SymPy: the code's ℓ, r − 1 and d are x − b, eˡ − 1 and eˣ − eᵇ, on both branches."""
    tokens = computed(*point)
    same(tokens.log_ratio.e, x - b)
    same(tokens.ratio.e, sympy.exp(x - b))
    same(tokens.ratio_minus_one.e, sympy.exp(x - b) - 1)
    same(sympy.expand(tokens.shift.e), sympy.exp(x) - sympy.exp(b))


def test_saturated_ratio():
    """SymPy: the ratio is exp(ℓ) up to ℓ = 20 and e²⁰ beyond, to the rounding of a float64 constant."""
    for exponent, expected in ((sympy.Rational(199, 10), sympy.Rational(199, 10)), (20, 20), (21, 20), (41, 20)):
        ratio = computed(exponent - 45, -45).ratio.e.subs({x: exponent - 45, b: -45})
        assert abs(ratio / sympy.exp(expected) - 1).evalf(30) < 1e-15


def test_saturation_keeps_the_sign():
    """z3: −A min(r, S) w has the sign of −A r w, for every cap S > 0."""
    a, r, w, cap = z3.Reals("A r w S")
    used = z3.If(r > cap, cap, r)
    prove(z3.And((a * used * w > 0) == (a * r * w > 0), (a * used * w < 0) == (a * r * w < 0)), r > 0, cap > 0)


def test_gap_is_concave():
    """SymPy: g(s ℓ) − s g(ℓ), g(t) = 1 − e⁻ᵗ, is concave in s, 0 at s = 0 and 1: g(ℓ (1 + e))/g(ℓ) is within 1 ± |e|."""
    s, ell = sympy.symbols("s ell", positive=True)
    t = sympy.Symbol("t", positive=True)
    gap = sympy.Lambda(t, 1 - sympy.exp(-t))
    excess = gap(s * ell) - s * gap(ell)
    assert sympy.diff(excess, s, 2).is_negative
    assert excess.subs(s, 0) == 0
    assert sympy.simplify(excess.subs(s, 1)) == 0


@pytest.mark.parametrize(("ulp", "multiple"), [(0.5, 6), (1, 9), (2, 15)])
@pytest.mark.parametrize("dtype", UNIT)
def test_shift_error_bound(dtype, ulp, multiple):
    """iv: six roundings leave d within 6 u, 9 u, 15 u (1 + 10⁻⁵) if exp and expm1 are within ½, 1, 2 ulp (≤ 2 u each)."""
    u = UNIT[dtype]
    rounding, function = iv.mpf([1 - u, 1 + u]), iv.mpf([1 - 2 * ulp * u, 1 + 2 * ulp * u])
    # ℓ (passed on with a factor in 1 ± u, by concavity), expm1, exp, their quotient, exp, product
    error = rounding * function / function * rounding * function * rounding - 1
    assert abs(error).b <= multiple * u * (1 + 1e-5)


@pytest.mark.parametrize("dtype", UNIT)
def test_ratio_error_bound(dtype):
    """iv: exp(ℓ (1 + e)) is within (|ℓ| + 2) u (1 + 10⁻⁴) of r if exp is within 1 ulp, for |ℓ| ≤ 20."""
    u = UNIT[dtype]
    for k in range(80):
        ell = iv.mpf([k / 4, (k + 1) / 4])
        relative = iv.exp(ell * iv.mpf([-u, u])) * iv.mpf([1 - 2 * u, 1 + 2 * u]) - 1
        assert abs(relative).b <= ((k + 1) / 4 + 2) * u * (1 + 1e-4)


def test_shift_error_measured():
    """mpmath: numpy's float32 shift stays within 6 u of the exact one, from ℓ = 10⁻⁸ to 20."""
    rng = np.random.default_rng(0)
    behavior = -rng.exponential(2.0, 3000).astype(np.float32)
    ell = (10 ** rng.uniform(-8, 1.3, 3000) * rng.choice([-1, 1], 3000)).astype(np.float32)
    log_prob = np.minimum(behavior + ell, 0).astype(np.float32)
    shift = probability_shift(log_prob, behavior)
    with mpmath.workdps(40):
        for log_pi, log_mu, d in zip(log_prob, behavior, shift, strict=True):
            exact = mpmath.exp(float(log_pi)) - mpmath.exp(float(log_mu))
            assert abs(float(d) - exact) <= 6.01 * UNIT["float32"] * abs(exact)
