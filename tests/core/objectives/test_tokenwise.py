"""Bounds as functions of μ: against 60 digits, at the ends of μ, in float32, and as values."""

import dataclasses

import mpmath
import numpy as np
import pytest

from drpo_core import DPPO, Tokens, policy_loss_and_gradient, token_loss_and_gradient
from drpo_core.engines.numba_loop import compilations
from drpo_core.engines.trace import Trace, floats_of, parametrised, statics_of
from drpo_core.objectives import ChiSquareBounds, DCPOBounds, KLBounds, RIPOBounds, TokenwiseClip, TVBounds

EVERY = [
    RIPOBounds(delta=0.05),
    DCPOBounds(eps_low=0.16, eps_high=0.2),
    ChiSquareBounds(delta=0.05),
    KLBounds(delta=0.05),
    TVBounds(delta=0.15),
]
each_bounds = pytest.mark.parametrize("bounds", EVERY, ids=lambda bounds: type(bounds).__name__)
BEHAVIOR = [-40.0, -20.0, -5.0, -1.0, -0.5, -0.1, -1e-3, -1e-6]

mp = mpmath.mp.clone()
mp.dps = 60


def largest(bounds, behavior, side, dtype=np.float64):
    """The bound on one side of μ."""
    b = np.asarray(behavior, dtype)
    return bounds.largest(Tokens.checked(b + dtype(0.01 * side), b, np.ones_like(b)))


def kl_root(b, delta, side):
    """The r beyond μ at which the divergence of f(u) = u − 1 − log u reaches δ, by bisection on the log-odds."""
    mu = mp.exp(mp.mpf(float(b)))

    def ratio_minus_one(t):
        return (1 - mu) * mp.expm1(t) / (1 + mu * mp.expm1(t))

    def divergence(t):
        r = 1 + ratio_minus_one(t)
        f = lambda u: u - 1 - mp.log(u)
        return mu * f(r) + (1 - mu) * f((1 - mu * r) / (1 - mu))

    near, far = mp.mpf(0), mp.mpf(1)
    while far < 60 and divergence(side * far) < delta:
        far *= 2
    for _ in range(120):
        middle = (near + far) / 2
        near, far = (middle, far) if divergence(side * middle) < delta else (near, middle)
    return abs(ratio_minus_one(side * near))


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("delta", [1e-4, 0.05, 1.0])
@pytest.mark.parametrize("side", [1, -1], ids=["up", "down"])
def test_kl_bounds_are_the_roots(dtype, delta, side):
    behavior = np.array(BEHAVIOR, dtype)
    found = largest(KLBounds(delta=delta), behavior, side, dtype)
    expected = np.array([float(kl_root(b, delta, side)) for b in behavior])
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=float(np.finfo(dtype).eps) * 8 * (1 + 1 / delta))


@each_bounds
def test_bounds_are_finite_for_every_probability(bounds):
    with np.errstate(all="raise", under="ignore"):
        for dtype in (np.float64, np.float32):
            for side in (1, -1):
                found = largest(bounds, [-np.inf, -1e4, -100.0, -1.0, -1e-30, 0.0], side, dtype)
                assert np.isfinite(found).all()
                assert (found >= 0.0).all()
                assert (np.diff(found[:4]) <= 0.0).all(), "a rare token has no less room than a common one"


def test_at_certainty():
    """At μ = 1 nothing can grow, and the KL is −log π."""
    assert largest(KLBounds(delta=0.05), [0.0], 1) == 0.0
    np.testing.assert_allclose(largest(KLBounds(delta=0.05), [0.0], -1), -np.expm1(-0.05), rtol=1e-14)
    assert largest(ChiSquareBounds(delta=0.05), [0.0], -1) == 0.0


@each_bounds
def test_nan_drops_its_token(bounds):
    nan, one = np.array([np.nan]), np.array([-1.0])
    for arrays in ((nan, one), (one, nan)):
        assert token_loss_and_gradient(TokenwiseClip(bounds=bounds), *arrays, np.ones(1)).weight == 0.0


@pytest.mark.parametrize(("bounds", "kind"), [(TVBounds(delta=0.15), "binary_tv"), (KLBounds(delta=0.05), "binary_kl")])
def test_the_tv_and_kl_bands_are_dppo(bounds, kind):
    rng = np.random.default_rng(3)
    behavior = -rng.exponential(2.0, 20000)
    arrays = np.minimum(behavior + rng.normal(0.0, 1.0, 20000), -1e-9), behavior, rng.normal(size=20000)
    clip, mask = TokenwiseClip(bounds=bounds), DPPO(delta=bounds.delta, divergence=kind)
    weights = [token_loss_and_gradient(objective, *arrays).weight for objective in (clip, mask)]
    assert 0.05 < weights[0].mean() < 0.95
    np.testing.assert_array_equal(*weights)


def test_numbers_of_the_bounds_are_arguments_of_the_compiled_loop():
    rng = np.random.default_rng(4)
    arrays = np.log(rng.uniform(0.01, 1.0, 50)), np.log(rng.uniform(0.01, 1.0, 50)), rng.normal(size=50)
    mask = np.ones(50, dtype=bool)

    def both(delta):
        objective = TokenwiseClip(bounds=KLBounds(delta=delta))
        engines = ("compiled", "arrays")
        return [policy_loss_and_gradient(objective, *arrays, mask=mask, engine=engine).gradient for engine in engines]

    both(0.05)
    before = compilations()
    for delta in (0.01, 0.2, 1.0):
        np.testing.assert_allclose(*both(delta), rtol=1e-13)
    assert compilations() == before


def test_a_nested_value_is_traced_by_its_numbers():
    one, two = (TokenwiseClip(bounds=DCPOBounds(eps_low=low, eps_high=0.2)) for low in (0.1, 0.16))
    assert floats_of(one) == [0.1, 0.2, 10.0]
    assert statics_of(one) == statics_of(two) != statics_of(TokenwiseClip(bounds=KLBounds(delta=0.1)))
    copy = parametrised(one, Trace())
    assert [copy.bounds.eps_low.name, copy.bounds.eps_high.name, copy.bounds.max_ratio.name] == ["p0", "p1", "p2"]
    assert one.bounds.eps_low == 0.1


@each_bounds
def test_bounds_are_hashable_values(bounds):
    assert bounds == dataclasses.replace(bounds)
    assert hash(TokenwiseClip(bounds=bounds)) == hash(TokenwiseClip(bounds=dataclasses.replace(bounds)))
    for field in dataclasses.fields(bounds):
        with pytest.raises(ValueError, match=f"{field.name}: expected a finite number greater than"):
            dataclasses.replace(bounds, **{field.name: 0.0})
        with pytest.raises(TypeError, match=f"{field.name}: expected a real number"):
            dataclasses.replace(bounds, **{field.name: "1"})


@pytest.mark.parametrize("given", [0.2, None, KLBounds])
def test_what_are_no_bounds(given):
    with pytest.raises(TypeError, match=r"bounds: expected an instance such as KLBounds\(delta=0.05\), got "):
        TokenwiseClip(bounds=given)


def test_limits_of_ripo_are_in_order():
    with pytest.raises(ValueError, match="min_eps: expected a number of at most max_eps = 10, got 11"):
        RIPOBounds(delta=0.05, min_eps=11.0)
