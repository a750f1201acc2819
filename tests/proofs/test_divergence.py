"""Proofs for `docs/derivations/divergence.md`."""

from __future__ import annotations

from itertools import pairwise
from math import factorial

import sympy
import z3
from mpmath import iv
from provers import Term, mu, prove, refute, same, sympy_tokens, to_z3, xp_at

from drpo_core.divergence import _kl_term, _log_quotient, binary_kl_of, k3_of

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
        reciprocal = sympy.Integer(round(1 / number))
        return 1 / reciprocal if float(1 / reciprocal) == float(number) else sympy.nsimplify(number, rational=True)

    return expression.replace(lambda e: e.is_Float and 0 < e < 1, rational)


def test_kl_term():
    """SymPy: the code's term is d − μ ℓ = μ φ(ℓ), or the Taylor polynomial of μ φ up to ℓ¹⁴."""
    near, far = (
        _kl_term(Term(mu), Term(t), Term(mu * (sympy.exp(t) - 1)), xp=xp_at({t: at, mu: sympy.Rational(1, 4)})).e
        for at in (sympy.Rational(1, 4), 2)
    )
    same(far, mu * phi)
    taylor = sum(t**n / sympy.factorial(n) for n in range(2, 15))
    assert sympy.expand(exact(near) - mu * taylor) == 0


def test_series_truncation():
    """iv: for |t| < ½ the polynomial is within 2⁻⁵² of φ, relatively."""
    pieces = 128
    for k in range(-pieces, pieces):
        x = iv.mpf([k, k + 1]) / (2 * pieces)
        # φ(x) = x² Σ xⁿ/(n+2)!; what the polynomial leaves is x¹⁵/15! (1 + x/16 + [0, x²/272 · 1/(1 − |x|/18)])
        rest = iv.mpf([0, 1]) * x**2 / 272 / (1 - iv.mpf([0, 0.5]) / 18)
        left = x**13 / factorial(15) * (1 + x / 16 + rest)
        value = sum((x**n / factorial(n + 2) for n in range(13)), iv.mpf(0)) + left
        assert value.a > 0
        assert abs(left / value).b <= 2.0**-52


def test_cancellation_far_from_zero():
    """iv: for ½ ≤ |t| ≤ 70 computing d − μ ℓ amplifies the relative errors of d and μ ℓ at most 8.5 times."""
    edges = [0.5 * 1.002**k for k in range(2500)]
    for low, high in pairwise(edges):
        for x in (iv.mpf([low, high]), -iv.mpf([low, high])):
            condition = (abs(iv.exp(x) - 1) + abs(x)) / (iv.exp(x) - 1 - x)
            assert condition.b <= 8.5


def test_log_quotient():
    """SymPy: both branches of log(π/μ), from the shift and from the masses, are the same number."""
    for masses in (FAR, {pi: sympy.Rational(3, 10), mu: sympy.Rational(1, 4)}):
        same(_log_quotient(Term(pi), Term(mu), Term(pi - mu), xp=xp_at(masses)).e, sympy.log(pi / mu))


def test_binary_kl_formula():
    """SymPy: the code's Binary KL is μ log(μ/π) + (1 − μ) log((1 − μ)/(1 − π))."""
    expected = mu * sympy.log(mu / pi) + (1 - mu) * sympy.log((1 - mu) / (1 - pi))
    assert sympy.simplify(sympy.diff(binary_kl() - expected, pi)) == 0
    assert sympy.simplify((binary_kl() - expected).subs(pi, mu)) == 0


def test_binary_kl_series():
    """SymPy: the rest's term, where it is a series, is the Taylor polynomial of (1 − μ) φ(log((1 − π)/(1 − μ)))."""
    point = {pi: sympy.Rational(2, 100), mu: sympy.Rational(1, 100)}
    tokens = sympy_tokens(at=point, log_prob=sympy.log(pi), log_ratio=sympy.log(pi / mu), shift=pi - mu)
    rest = exact(binary_kl_of(tokens).e) - (pi - mu - mu * sympy.log(pi / mu))
    ell_rest = sympy.log(sympy.factor((1 - pi) / (1 - mu)))
    taylor = sum(ell_rest**n / sympy.factorial(n) for n in range(2, 15))
    with_one_logarithm = rest.replace(sympy.log, lambda z: sympy.log(sympy.factor(z)))
    assert sympy.expand(with_one_logarithm - (1 - mu) * taylor) == 0


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
    """SymPy: the code's k3 is r − 1 − ℓ = φ(ℓ); so E_μ of it is KL (the sum of φ above)."""
    tokens = sympy_tokens(at=FAR, log_ratio=sympy.log(pi / mu), ratio_minus_one=pi / mu - 1)
    same(k3_of(tokens).e, pi / mu - 1 - sympy.log(pi / mu))


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
