"""Proofs for `docs/derivations/tokenwise.md`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import sympy
import z3
from provers import mu, prove, r, real_tokens, symbolic, sympy_tokens, z3_xp
from test_ppo import larger, smaller

from drpo_core import DPPO, Tokens
from drpo_core.objectives import ChiSquareBounds, DCPOBounds, KLBounds, RIPOBounds, TokenwiseClip, TVBounds

delta, q, v, y = sympy.symbols("delta q v y", positive=True)


class Any:
    """Bounds that are any two positive numbers."""

    a, b = z3.Reals("a b")

    def largest(self, tokens):
        """By side."""
        return z3.If(tokens.ratio_minus_one >= 0, self.b, self.a)


def test_loss_and_weight_are_those_of_clipping():
    """z3: L = max(−A r, −A clip(r, 1 − a, 1 + b)) for any a, b > 0, and w = 0 iff r is beyond the bound along A."""
    tokens, facts = real_tokens()
    objective, a, ratio = symbolic(TokenwiseClip, bounds=Any()), tokens.advantages, tokens.ratio
    low, high = 1 - Any.a, 1 + Any.b
    given = [*facts, Any.a > 0, Any.b > 0]
    prove(objective.loss(tokens) == larger(-a * ratio, -a * smaller(larger(ratio, low), high)), *given)
    dropped = z3.Or(z3.And(a > 0, ratio > high), z3.And(a < 0, ratio < low))
    prove(objective.weight(tokens) == z3.If(dropped, z3.RealVal(0), z3.RealVal(1)), *given)
    prove(objective.inside(tokens) == z3.And(ratio >= low, ratio <= high), *given)


def test_tv_bounds_are_dppo():
    """z3: at the same δ, the weight and the region of TV bounds are those of DPPO Binary-TV."""
    tokens, facts = real_tokens()
    threshold, prob = z3.Real("delta"), z3.Real("mu")
    # the one exponential is 1/μ, which does not saturate here
    xp = SimpleNamespace(**{**vars(z3_xp), "exp": lambda _: 1 / prob})
    tokens = tokens._replace(xp=xp)
    clip = symbolic(TokenwiseClip, bounds=symbolic(TVBounds, delta=threshold))
    mask = symbolic(DPPO, delta=threshold)
    prove(clip.weight(tokens) == mask.weight(tokens), *facts, threshold > 0)
    prove(clip.inside(tokens) == mask.inside(tokens), *facts, threshold > 0)


def bound_of(kind, *, up, **numbers):
    """The code's formula of a bound, on the branches of one point."""
    at = {r: 2 if up else sympy.Rational(1, 2), mu: sympy.Rational(7, 10), delta: sympy.Rational(1, 20)}
    return sympy.nsimplify(symbolic(kind, **numbers).largest(sympy_tokens(at=at)).e, rational=True)


def test_chi_square():
    """SymPy: the divergence is μ (r − 1)²/(1 − μ), and is δ at the code's bound."""
    divergence = mu * (r - 1) ** 2 + (1 - mu) * ((1 - mu * r) / (1 - mu) - 1) ** 2
    assert sympy.simplify(divergence - mu * (r - 1) ** 2 / (1 - mu)) == 0
    for up, sign in ((True, 1), (False, -1)):
        bound = bound_of(ChiSquareBounds, up=up, delta=delta)
        assert sympy.simplify(divergence.subs(r, 1 + sign * bound) - delta) == 0


def test_dcpo():
    """SymPy: at the code's bounds |r − 1| r μ = ε; r (1 − r) is at most ¼, at the lower bound's limit ½."""
    for up, sign in ((True, 1), (False, -1)):
        bound = bound_of(DCPOBounds, up=up, eps_low=delta, eps_high=delta, max_ratio=sympy.Integer(10))
        ratio = 1 + sign * bound
        assert sympy.simplify(sympy.radsimp(sign * (ratio - 1) * ratio * mu - delta)) == 0
        published = sympy.Rational(1, 2) + sympy.sqrt(1 + sign * 4 * delta / mu) / 2
        assert sympy.simplify(sympy.radsimp(ratio - published)) == 0
    assert sympy.simplify(sympy.Rational(1, 4) - r * (1 - r) - (r - sympy.Rational(1, 2)) ** 2) == 0
    large = symbolic(DCPOBounds, eps_low=delta, eps_high=delta, max_ratio=sympy.Integer(10))
    at = {r: sympy.Rational(1, 2), mu: sympy.Rational(1, 100), delta: sympy.Rational(1, 20)}
    assert float(large.largest(sympy_tokens(at=at)).e) == 0.5


def test_ripo():
    """SymPy: μ (r − 1)² = δ at the code's bound; its limits are taken below and above them."""
    numbers = {"min_eps": sympy.Rational(1, 5), "max_eps": sympy.Integer(10)}
    bound = bound_of(RIPOBounds, up=True, delta=delta, **numbers)
    assert sympy.simplify(mu * bound**2 - delta) == 0
    for value, expected in ((sympy.Rational(1, 10**6), numbers["min_eps"]), (sympy.Integer(10**6), numbers["max_eps"])):
        at = {r: 2, mu: sympy.Rational(7, 10), delta: value}
        assert symbolic(RIPOBounds, delta=delta, **numbers).largest(sympy_tokens(at=at)).e == expected


def test_kl_band_is_the_binary_kl():
    """SymPy: the f-divergence of f(u) = u − 1 − log u is μ log(μ/π) + (1 − μ) log((1 − μ)/(1 − π)), π = μ r."""

    def f(u):
        return u - 1 - sympy.log(u)

    pi = mu * r
    band = mu * f(r) + (1 - mu) * f((1 - mu * r) / (1 - mu))
    kl = -mu * sympy.log(r) - (1 - mu) * sympy.log((1 - pi) / (1 - mu))
    assert sympy.simplify(sympy.expand(band - kl)) == 0


def test_kl_equation():
    """SymPy: upwards and downwards the KL is g(v); g′ is the code's slope, positive, and g″ > 0."""
    g = v - q * sympy.log(1 + (sympy.exp(v) - 1) / q)
    shrunk = 1 - sympy.exp(-v)
    # the outcome of probability 1 − q shrinks by e^−v: the other has 1 − (1 − q) e^−v
    grown = 1 - (1 - q) * sympy.exp(-v)
    # KL = q log(q/grown) + (1 − q) v is g, because q/grown = e^v/(1 + (e^v − 1)/q); with e^v = y
    quotient = (q / grown - sympy.exp(v) / (1 + (sympy.exp(v) - 1) / q)).subs(v, sympy.log(y))
    assert sympy.cancel(quotient) == 0
    x = sympy.exp(v) - 1
    assert sympy.simplify(sympy.diff(g, v) - (1 - q) * x / (x + q)) == 0
    assert sympy.simplify(sympy.diff(g, v, 2) - (1 - q) * q * sympy.exp(v) / (x + q) ** 2) == 0
    # the token: upwards q = μ and it grows to μ (1 + b), downwards q = 1 − μ and it is what shrinks
    assert sympy.simplify(grown / q - 1 - (1 - q) / q * shrunk) == 0
    behavior = np.log(np.full(2, 0.7))
    up, down = KLBounds(delta=0.05).largest(Tokens.checked(behavior + np.array([0.1, -0.1]), behavior, np.ones(2)))
    for share, scale, found in ((0.7, 3 / 7, up), (0.3, 1.0, down)):
        root = sympy.nsolve(g.subs(q, share) - 0.05, v, 0.3)
        assert abs(found - scale * float(shrunk.subs(v, root))) < 1e-14


def test_start_is_above_the_root():
    """SymPy: g ≥ (1 − q) q y²/(2(1 + y)), y = v/q, because g′ ≥ (1 − q) v/(v + q); that is δ at the code's start."""
    # e^v − 1 ≥ v, and x/(x + q) rises with x
    assert sympy.simplify(sympy.diff(v / (v + q), v) - q / (v + q) ** 2) == 0
    lower = (1 - q) * (v - q * sympy.log(1 + v / q))
    assert sympy.simplify(sympy.diff(lower, v) - (1 - q) * v / (v + q)) == 0
    simpler = y**2 / (2 * (1 + y))
    assert sympy.simplify(sympy.diff(y - sympy.log(1 + y) - simpler, y) - y**2 / (2 * (1 + y) ** 2)) == 0
    k = delta / (1 - q)
    start = k * (1 + sympy.sqrt(1 + 2 * q / k))
    assert sympy.simplify((1 - q) * q * simpler.subs(y, start / q) - delta) == 0
