"""Proofs for `docs/derivations/divergence.md`."""

from __future__ import annotations

from itertools import pairwise
from math import factorial
from types import SimpleNamespace

import pytest
import sympy
import z3
from mpmath import iv
from provers import Term, mu, prove, refute, same, sympy_tokens, to_z3, xp_at

from drpo_core.divergence import _kl_of_rest, _kl_term, binary_kl_of, k3_of

pi, t = sympy.Symbol("pi", positive=True), sympy.Symbol("t", real=True)
MU, PI = z3.Reals("mu pi")
INTERIOR = [MU > 0, MU < 1, PI > 0, PI < 1]
phi = sympy.exp(t) - 1 - t


FAR = {pi: sympy.Rational(9, 10), mu: sympy.Rational(3, 10)}


def binary_kl():
    """KL(μ‖π) as the code computes it away from its series, which only replaces terms by equal ones (V2, V5)."""
    tokens = sympy_tokens(at=FAR, log_prob=sympy.log(pi), log_ratio=sympy.log(pi / mu), shift=pi - mu)
    return sympy.nsimplify(binary_kl_of(tokens).e, rational=True)


def test_phi_is_not_negative():
    """SymPy: φ(t) = eᵗ − 1 − t has φ(0) = φ′(0) = 0 and φ″ > 0, so φ ≥ 0, 0 only at 0."""
    assert phi.subs(t, 0) == 0
    assert sympy.diff(phi, t).subs(t, 0) == 0
    assert sympy.diff(phi, t, 2).is_positive


def exact(expression):
    """The expression with what float64 makes of 1/n for the 1/n itself."""

    def rational(number):
        reciprocal = sympy.Integer(max(1, round(1 / number)))
        return 1 / reciprocal if float(1 / reciprocal) == float(number) else sympy.nsimplify(number, rational=True)

    return expression.replace(lambda e: e.is_Float, rational)


def with_terms_of(eps, xp):
    """The namespace of floats with this machine epsilon, which decides the number of terms."""
    return SimpleNamespace(**{**vars(xp), "finfo": lambda _: SimpleNamespace(eps=eps)})


# machine epsilon, terms of φ, terms of ψ
FORMATS = pytest.mark.parametrize(("eps", "terms", "rest_terms"), [(2.0**-23, 8, 9), (2.0**-52, 13, 20)], ids=["f32", "f64"])


@FORMATS
def test_kl_term(eps, terms, rest_terms):  # noqa: ARG001
    """SymPy: the code's term is d − μ ℓ = μ φ(ℓ), or the Taylor polynomial of μ φ, of as many terms as V3 assumes."""
    near, far = (
        _kl_term(
            Term(mu),
            Term(t),
            Term(mu * (sympy.exp(t) - 1)),
            xp=with_terms_of(eps, xp_at({t: at, mu: sympy.Rational(1, 4)})),
        ).e
        for at in (sympy.Rational(1, 4), 2)
    )
    same(far, mu * phi)
    taylor = sum(t ** (n + 2) / sympy.factorial(n + 2) for n in range(terms))
    assert sympy.expand(exact(near) - mu * taylor) == 0


@FORMATS
def test_series_truncation(eps, terms, rest_terms):  # noqa: ARG001
    """iv: for |t| < ½ the polynomial is within a machine epsilon of φ, relatively."""
    pieces = 128
    for k in range(-pieces, pieces):
        x = iv.mpf([k, k + 1]) / (2 * pieces)
        # φ(x) = x² Σ xⁿ/(n+2)!; what N terms leave is xᴺ/(N+2)! (1 + x/(N+3) + [0, x²/((N+3)(N+4)) · 1/(1 − |x|/(N+5))])
        n = terms
        rest = iv.mpf([0, 1]) * x**2 / ((n + 3) * (n + 4)) / (1 - iv.mpf([0, 0.5]) / (n + 5))
        left = x**n / factorial(n + 2) * (1 + x / (n + 3) + rest)
        value = sum((x**j / factorial(j + 2) for j in range(n)), iv.mpf(0)) + left
        assert value.a > 0
        assert abs(left / value).b <= eps


@FORMATS
def test_rest_term(eps, terms, rest_terms):  # noqa: ARG001
    """SymPy: the rest's term is μ ψ(d/μ) = d − μ log(π/μ), or μ z (s − 2z² Σ z²ⁿ/(2n + 3)) with s = d/μ, z = s/(2 + s)."""
    for masses in (FAR, {pi: sympy.Rational(1, 10), mu: sympy.Rational(3, 10)}):
        far = _kl_of_rest(Term(pi), Term(mu), Term(pi - mu), xp=with_terms_of(eps, xp_at(masses)))
        same(far.e, pi - mu - mu * sympy.log(pi / mu))
    s = sympy.Symbol("s", real=True)
    near = _kl_of_rest(Term(pi), Term(mu), Term(mu * s), xp=with_terms_of(eps, xp_at({s: 0, mu: 1, pi: 1})))
    z = s / (2 + s)
    series = sum(z ** (2 * n) / (2 * n + 3) for n in range(rest_terms))
    difference = exact(near.e) - mu * z * (s - 2 * z**2 * series)
    # times (2 + s)²ᴺ⁺¹ it is a polynomial of degree 2N + 2 at most, 0 where it is 0 at more points than that
    assert all(difference.subs({s: sympy.Rational(k, 7), mu: 1}) == 0 for k in range(2 * rest_terms + 4))


def test_rest_identity():
    """SymPy: with z = s/(2 + s), s − 2z = s z and log(1 + s) = 2 artanh(z), whose series is 2 Σ z²ⁿ⁺¹/(2n + 1)."""
    s = sympy.Symbol("s", positive=True)
    z = s / (2 + s)
    assert sympy.simplify(s - 2 * z - s * z) == 0
    assert sympy.simplify((1 + z) / (1 - z) - (1 + s)) == 0
    y = sympy.Symbol("y")
    series = sum(y ** (2 * n + 1) / (2 * n + 1) for n in range(5))
    assert sympy.series(sympy.atanh(y), y, 0, 11).removeO() == series


@FORMATS
def test_rest_truncation(eps, terms, rest_terms):  # noqa: ARG001
    """iv: for −0.6 < s < 1, that is −3/7 < z < ⅓, the polynomial is within half a machine epsilon of ψ, relatively."""
    pieces = 512
    for k in range(-pieces * 3 // 7 - 1, pieces // 3 + 1):
        z = iv.mpf([k, k + 1]) / pieces
        square = z**2
        # divided by z: ψ/z² = 2/(1 − z) − 2 z Σ z²ⁿ/(2n + 3), as s = 2z/(1 − z)
        kept = sum((square**n / (2 * n + 3) for n in range(rest_terms)), iv.mpf(0))
        left = iv.mpf([0, 1]) * square**rest_terms / (2 * rest_terms + 3) / (1 - square)
        value = 2 / (1 - z) - 2 * z * (kept + left)
        assert value.a > 0
        assert abs(2 * z * left / value).b <= eps / 2


def test_cancellation_of_the_rest():
    """iv: for −1 < s ≤ −0.6 and 1 ≤ s computing s − log(1 + s) amplifies the relative errors of both at most 6 times."""
    below = [(-1 + 0.4 * 0.995**k, -1 + 0.4 * 0.995 ** (k + 1)) for k in range(4500)]
    above = [(1.005**k, 1.005 ** (k + 1)) for k in range(2500)]
    for edges in (*below, *above):
        s = iv.mpf([min(edges), max(edges)])
        condition = (abs(s) + abs(iv.log(1 + s))) / (s - iv.log(1 + s))
        assert condition.b <= 6


def test_cancellation_far_from_zero():
    """iv: for ½ ≤ |t| ≤ 70 computing d − μ ℓ amplifies the relative errors of d and μ ℓ at most 8.5 times."""
    edges = [0.5 * 1.002**k for k in range(2500)]
    for low, high in pairwise(edges):
        for x in (iv.mpf([low, high]), -iv.mpf([low, high])):
            condition = (abs(iv.exp(x) - 1) + abs(x)) / (iv.exp(x) - 1 - x)
            assert condition.b <= 8.5


def test_binary_kl_formula():
    """SymPy: the code's Binary KL is μ log(μ/π) + (1 − μ) log((1 − μ)/(1 − π))."""
    expected = mu * sympy.log(mu / pi) + (1 - mu) * sympy.log((1 - mu) / (1 - pi))
    assert sympy.simplify(sympy.diff(binary_kl() - expected, pi)) == 0
    assert sympy.simplify((binary_kl() - expected).subs(pi, mu)) == 0


def test_binary_kl_monotone():
    """SymPy + z3: ∂KL/∂π has the sign of π − μ, so KL is 0 at μ only and grows away from it."""
    slope = to_z3(sympy.together(sympy.diff(binary_kl(), pi)))
    prove(z3.And((slope > 0) == (PI > MU), (slope < 0) == (PI < MU)), *INTERIOR)
    assert sympy.simplify(binary_kl().subs(pi, mu)) == 0


def test_pinsker():
    """SymPy + z3: KL − 2 (π − μ)² is 0 at π = μ and its slope has the sign of π − μ or is 0: KL ≥ 2 TV²."""
    gap = binary_kl() - 2 * (pi - mu) ** 2
    slope = to_z3(sympy.together(sympy.diff(gap, pi)))
    prove(slope * (PI - MU) >= 0, *INTERIOR)
    assert sympy.simplify(gap.subs(pi, mu)) == 0


def test_bretagnolle_huber():
    """SymPy + z3: KL + log(1 − (π − μ)²) is 0 at π = μ and its slope has the sign of π − μ or is 0: TV² ≤ 1 − e⁻ᴷᴸ."""
    gap = binary_kl() + sympy.log(1 - (pi - mu) ** 2)
    slope = to_z3(sympy.together(sympy.diff(gap, pi)))
    prove(slope * (PI - MU) >= 0, *INTERIOR)
    assert sympy.simplify(gap.subs(pi, mu)) == 0


def test_kl_as_sum_of_phi():
    """SymPy: Σ μ φ(log(π/μ)) = Σ μ log(μ/π) where both sum to 1 (3 outcomes)."""
    m, p = sympy.symbols("m1:3", positive=True), sympy.symbols("p1:3", positive=True)
    mus, pis = (*m, 1 - sum(m)), (*p, 1 - sum(p))
    pairs = list(zip(pis, mus, strict=True))
    difference = sum(y * phi.subs(t, sympy.log(x / y)) + y * sympy.log(x / y) for x, y in pairs)
    assert sympy.simplify(difference) == 0


def test_k3():
    """SymPy: the code's k3 is r − 1 − ℓ = φ(ℓ), so E_μ of it is KL (the sum of φ above); beyond ℓ = 20 it is φ's tangent."""
    tokens = sympy_tokens(at=FAR, log_ratio=sympy.log(pi / mu), ratio_minus_one=pi / mu - 1)
    same(k3_of(tokens).e, pi / mu - 1 - sympy.log(pi / mu))
    beyond = k3_of(sympy_tokens(at={t: 30}, log_ratio=t, ratio_minus_one=sympy.exp(20) - 1)).e
    assert sympy.diff(beyond, t, 2) == 0
    assert abs(sympy.diff(beyond, t) / sympy.diff(phi, t).subs(t, 20) - 1).evalf(30) < 1e-15
    assert abs(beyond.subs(t, 20) / phi.subs(t, 20) - 1).evalf(30) < 1e-15


def test_merging_tv():
    """z3: merging two outcomes does not increase Σ |π − μ|: Binary ≤ Top-K ≤ full TV, monotone in K."""
    x, y = z3.Reals("x y")

    def size(z):
        return z3.If(z >= 0, z, -z)

    prove(size(x + y) <= size(x) + size(y))


def test_merging_kl():
    """z3: merging two outcomes does not increase Σ μ log(μ/π), given log x ≥ 1 − 1/x: Binary ≤ Top-K ≤ full KL."""
    m, n, p, q, log_m, log_n = z3.Reals("m n p q log_m log_n")
    # KL before − KL after = m log x + n log y with x = m (p + q)/(p (m + n)), y = n (p + q)/(q (m + n))
    bounds = [log_m >= 1 - p * (m + n) / (m * (p + q)), log_n >= 1 - q * (m + n) / (n * (p + q))]
    prove(m * log_m + n * log_n >= 0, m > 0, n > 0, p > 0, q > 0, *bounds)


def test_sampled_token_must_be_forced_in():
    """z3: without the sampled token among the K, Top-K TV can be below Binary TV (K = 1, 3 outcomes)."""
    top, sampled = z3.Reals("top sampled")  # shifts of the one listed outcome and of the sampled one
    rest = -top  # everything else, the sampled outcome included

    def size(z):
        return z3.If(z >= 0, z, -z)

    third = -top - sampled
    refute((size(top) + size(rest)) / 2 >= size(sampled), size(top) < 1, size(sampled) < 1, size(third) < 1)
