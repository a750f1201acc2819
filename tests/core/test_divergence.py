"""Binary, Top-K and full-vocabulary divergences and the KL estimators on hand-computed distributions."""

import math
from math import log

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch
from array_api_compat import torch as torch_namespace
from backends import Backend

from drpo_core import (
    binary_kl,
    binary_tv,
    full_kl,
    full_tv,
    k1,
    k2,
    k3,
    sampled_in_top_k,
    top_k_kl,
    top_k_tv,
)
from drpo_core.divergence import rest_of

# eager JAX compiles every operation by itself: that is slow, and the same operations as under jit
BACKENDS = [b for b in Backend if b is not Backend.JAX]

# sampled tokens: π = 1/2, 1/5, 3/10 and μ = 1/4, 1/5, 3/5
LOG_PROB, BEHAVIOR = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
# one distribution over five tokens
PI, MU = [0.5, 0.2, 0.15, 0.1, 0.05], [0.4, 0.3, 0.1, 0.15, 0.05]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (binary_tv, [0.5 - 0.25, 0.0, 0.6 - 0.3]),
        (binary_kl, [0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5), 0.0, 0.6 * log(0.6 / 0.3) + 0.4 * log(0.4 / 0.7)]),
        (k1, [-log(2), 0.0, log(2)]),
        (k2, [log(2) ** 2 / 2, 0.0, log(2) ** 2 / 2]),
        (k3, [2 - 1 - log(2), 0.0, 0.5 - 1 + log(2)]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_of_sampled_tokens(backend, function, expected):
    np.testing.assert_allclose(backend.run(function, LOG_PROB, BEHAVIOR), expected, rtol=2e-15, atol=1e-16)


def test_full_vocabulary(backend):
    tv = (0.1 + 0.1 + 0.05 + 0.05 + 0.0) / 2
    kl = 0.4 * log(0.4 / 0.5) + 0.3 * log(0.3 / 0.2) + 0.1 * log(0.1 / 0.15) + 0.15 * log(0.15 / 0.1)
    x, b = np.log([PI, PI]), np.log([MU, PI])
    np.testing.assert_allclose(backend.run(full_tv, x, b), [tv, 0.0], rtol=1e-14)
    np.testing.assert_allclose(backend.run(full_kl, x, b), [kl, 0.0], rtol=1e-14)


@pytest.mark.parametrize(
    ("sampled", "inside", "tv", "kl"),
    [
        # the two most likely of μ and the rest: (0.5, 0.2, 0.3) against (0.4, 0.3, 0.3)
        (0, True, (0.1 + 0.1 + 0.0) / 2, 0.4 * log(0.4 / 0.5) + 0.3 * log(0.3 / 0.2)),
        # token 2 is forced in: (0.5, 0.2, 0.15, 0.15) against (0.4, 0.3, 0.1, 0.2)
        (
            2,
            False,
            (0.1 + 0.1 + 0.05 + 0.05) / 2,
            0.4 * log(0.4 / 0.5) + 0.3 * log(0.3 / 0.2) + 0.1 * log(0.1 / 0.15) + 0.2 * log(0.2 / 0.15),
        ),
    ],
    ids=["sampled token among the K", "sampled token forced in"],
)
def test_top_two(backend, sampled, inside, tv, kl):
    arguments = [np.log([p[sampled]]) for p in (PI, MU)]
    top = {"top_k_log_prob": np.log([PI[:2]]), "top_k_behavior_log_prob": np.log([MU[:2]])}
    for function, expected in ((top_k_tv, tv), (top_k_kl, kl)):
        result = backend.run(function, *arguments, **top, sampled_in_top_k=np.array([inside]))
        np.testing.assert_allclose(result, [expected], rtol=2e-14)


def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(backend):
    x, b = np.log([PI]), np.log([MU])
    top = {"top_k_log_prob": x, "top_k_behavior_log_prob": b, "sampled_in_top_k": np.array([True])}
    np.testing.assert_allclose(backend.run(top_k_tv, x[:, 3], b[:, 3], **top), backend.run(full_tv, x, b), rtol=1e-14)
    np.testing.assert_allclose(backend.run(top_k_kl, x[:, 3], b[:, 3], **top), backend.run(full_kl, x, b), rtol=1e-14)


def test_top_one_with_the_sampled_token_inside_is_the_binary_divergence(backend):
    top = {"top_k_log_prob": LOG_PROB[:, None], "top_k_behavior_log_prob": BEHAVIOR[:, None]}
    top["sampled_in_top_k"] = np.ones(3, dtype=bool)
    for top_1, binary in ((top_k_tv, binary_tv), (top_k_kl, binary_kl)):
        result = backend.run(top_1, LOG_PROB, BEHAVIOR, **top)
        np.testing.assert_allclose(result, backend.run(binary, LOG_PROB, BEHAVIOR), rtol=2e-15, atol=1e-16)


def test_an_outcome_without_mass_under_the_behavior_policy(backend):
    """Π = (0.5, 0.3, 0.2), μ = (0.5, 0.5, 0): the third outcome adds nothing to KL(μ‖π) but its π to TV."""
    x, b = np.log([[0.5, 0.3, 0.2]]), np.array([[log(0.5), log(0.5), -math.inf]])
    np.testing.assert_allclose(backend.run(full_tv, x, b), [0.2], rtol=1e-14)
    np.testing.assert_allclose(backend.run(full_kl, x, b), [0.5 * log(0.5 / 0.3)], rtol=1e-14)


def test_a_rest_without_mass_under_the_behavior_policy(backend):
    """The same with the third outcome as the rest of the top two: the share of the rest is its π."""
    x, b = np.log([0.5]), np.log([0.5])
    top = {"top_k_log_prob": np.log([[0.5, 0.3]]), "top_k_behavior_log_prob": np.log([[0.5, 0.5]])}
    top["sampled_in_top_k"] = np.array([True])
    np.testing.assert_allclose(backend.run(top_k_tv, x, b, **top), [0.2], rtol=1e-14)
    np.testing.assert_allclose(backend.run(top_k_kl, x, b, **top), [0.5 * log(0.5 / 0.3)], rtol=1e-14)


def test_top_k_kl_of_a_whole_vocabulary_is_not_negative():
    """With nothing in the rest, rounding of Σ (π − μ) exceeds a KL this small and must not show."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 1, (500, 6))
    x, b = (z - np.log(np.exp(z).sum(axis=-1, keepdims=True)) for z in (logits + rng.normal(0, 1e-9, logits.shape), logits))
    top = {"top_k_log_prob": x, "top_k_behavior_log_prob": b, "sampled_in_top_k": np.ones(500, dtype=bool)}
    kl = top_k_kl(x[:, 0], b[:, 0], **top)
    assert (kl >= 0.0).all()
    assert (kl < 1e-15).all()


def test_a_rest_is_resolved_beside_a_nearly_certain_token(backend):
    """μ = (1 − 1e-6, 1e-6 − 1e-12) with a rest of 1e-12, which π doubles: the rounding of the rest is that of 1e-6."""
    x, b = (np.array([[math.log1p(-1e-6 - excess), log(1e-6 - 1e-12)]]) for excess in (1e-12, 0.0))
    top = {"top_k_log_prob": x, "top_k_behavior_log_prob": b, "sampled_in_top_k": np.array([True])}
    result = backend.run(top_k_kl, x[:, 0], b[:, 0], **top)
    np.testing.assert_allclose(result, [1e-12 * (1 - log(2))], rtol=1e-6)


def test_the_number_of_tokens_does_not_change_what_a_rest_is(backend):
    """A rest of 3e-15 under π is above the rounding of three outcomes, however many tokens are beside it."""
    x, b = np.log([[0.5, 0.5 - 3e-15]]), np.log([[0.5, 0.3]])

    def kl(shape):
        tops = [np.broadcast_to(top, (*shape, 2)).copy() for top in (x, b)]
        top = dict(zip(("top_k_log_prob", "top_k_behavior_log_prob"), tops, strict=True))
        return backend.run(top_k_kl, *(t[..., 0] for t in tops), **top, sampled_in_top_k=np.ones(shape, dtype=bool))

    np.testing.assert_allclose(kl((2, 40)), np.full((2, 40), kl((1,))), rtol=1e-15)


def test_an_outcome_without_mass_under_the_trained_policy_costs_infinitely_much(backend):
    x, b = np.array([[log(0.5), log(0.5), -math.inf]]), np.log([[0.5, 0.3, 0.2]])
    np.testing.assert_allclose(backend.run(full_tv, x, b), [0.2], rtol=1e-14)
    assert backend.run(full_kl, x, b) == math.inf
    assert backend.run(binary_kl, np.array([-math.inf]), np.array([log(0.2)])) == math.inf


def test_binary_kl_beside_certainty(backend):
    """π → 1, where an offset of 1e-8 inside the logarithm gives 1.4386 instead of 2.3151."""
    rest = 1e-12
    mu = 0.9
    exact = mu * log(mu / (1 - rest)) + (1 - mu) * (log(1 - mu) - log(rest))
    result = backend.run(binary_kl, np.array([math.log1p(-rest)]), np.log([mu]))
    np.testing.assert_allclose(result, [exact], rtol=1e-12)


CERTAIN = {"float32": 2.0**-25, "float64": 2.0**-54}  # half a unit in the last place below 1


@pytest.mark.parametrize("log_pi", [0.0, -0.0, 1e-7])
@pytest.mark.parametrize("dtype", CERTAIN)
def test_a_log_prob_of_0_is_the_probability_nearest_mu_that_rounds_to_1(backend, dtype, log_pi):
    """Not infinitely far: one rounding below certainty under μ would have dropped the token (fault 34)."""
    half = CERTAIN[dtype]
    mu_rest = np.concatenate((half * np.array([0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 1e3]), 10.0 ** np.arange(-12.0, 0.0), [0.9]))
    behavior = np.log1p(-mu_rest).astype(dtype)
    result = backend.run(binary_kl, np.full_like(behavior, log_pi), behavior)
    with mpmath.workdps(50):
        for got, b in zip(result.tolist(), behavior.tolist(), strict=True):
            mu = mpmath.exp(mpmath.mpf(b))
            pi = 1 - min(mpmath.mpf(half), 1 - mu)
            rest = (1 - mu) * mpmath.log((1 - mu) / (1 - pi)) if mu < 1 else mpmath.mpf(0)
            exact = mu * mpmath.log(mu / pi) + rest
            assert got >= 0.0
            # a log π above 0, and the difference of that π from 1, are within rounding
            assert abs(got - exact) <= 4.0 * np.finfo(dtype).eps * (1.0 + exact) + max(log_pi, 0.0), (b, got, float(exact))


def test_a_token_that_is_certain_under_both_policies_has_a_binary_kl_of_0(backend):
    certain = np.array([0.0, -0.0, 0.0, -0.0])
    assert (backend.run(binary_kl, certain, certain[::-1].copy()) == 0.0).all()


def test_binary_kl_is_not_negative_near_certainty(backend):
    """Every pair of log-probs within a thousand roundings of 0, both signs."""
    for dtype in CERTAIN:
        eps = np.finfo(dtype).eps
        near = np.array([0.0, *(sign * eps * step for sign in (1, -1) for step in (1e-3, 0.1, 0.5, 1.0, 2.0, 100.0))])
        x, b = (array.ravel().astype(dtype) for array in np.meshgrid(near, near))
        kl = backend.run(binary_kl, x, b)
        assert (kl >= 0.0).all()
        assert (kl < 2e3 * eps).all()


def test_k3_goes_on_along_its_tangent_where_the_ratio_saturates(backend):
    ell = np.array([-700.0, 0.0, 19.0, 20.0, 20.5, 40.0, 100.0, 700.0])
    log_prob = np.minimum(ell, 0.0)
    slope = math.expm1(20.0)
    expected = [math.expm1(min(t, 20.0)) - min(t, 20.0) + slope * max(t - 20.0, 0.0) for t in ell.tolist()]
    for dtype in ("float64", "float32"):
        result = backend.run(k3, log_prob.astype(dtype), (log_prob - ell).astype(dtype))
        np.testing.assert_allclose(result, expected, rtol=80 * np.finfo(dtype).eps)


@pytest.mark.parametrize("of", ["torch", "jax"])
def test_k3_keeps_its_gradient_beyond_20_nats(of):
    """It was 0: as a penalty k3 let go of exactly those tokens that had moved the furthest."""
    ell = [-30.0, -1.0, 0.0, 1.0, 19.9, 20.1, 30.0, 100.0]
    if of == "torch":
        x = torch.tensor(ell, dtype=torch.float64, requires_grad=True)
        k3(x, torch.zeros_like(x)).sum().backward()
        gradient = x.grad.numpy()
    else:
        gradient = jax.grad(lambda x: k3(x, jnp.zeros_like(x)).sum())(jnp.asarray(ell))
    np.testing.assert_allclose(gradient, [math.expm1(min(t, 20.0)) for t in ell], rtol=1e-12, atol=1e-15)


def test_nan_is_not_hidden(backend):
    x, b = np.array([np.nan, -1.0]), np.array([-1.0, np.nan])
    for function in (binary_tv, binary_kl, k1, k2, k3):
        assert np.isnan(backend.run(function, x, b)).all(), function.__name__
    for function in (full_tv, full_kl):
        assert np.isnan(backend.run(function, x[None], b[None])).all(), function.__name__


def test_rounding_above_certainty_is_no_nan(backend):
    """A log-softmax in float32 can round a log-prob to just above 0."""
    x, b = np.array([1e-7, 1e-7, 1e-7], dtype=np.float32), np.array([-0.1, 1e-7, 0.0], dtype=np.float32)
    divergence = backend.run(binary_kl, x, b)
    exact = math.exp(-0.1) * -0.1 + -math.expm1(-0.1) * (math.log(-math.expm1(-0.1)) + 25 * log(2))
    np.testing.assert_allclose(divergence[0], exact, rtol=1e-6)
    assert np.isfinite(divergence[1])
    assert 0.0 <= divergence[2] < 1e-6
    assert np.isfinite(backend.run(binary_tv, x, b)).all()


def test_a_behavior_policy_rounded_above_certainty_has_no_rest(backend):
    """Then KL(μ‖π) is μ log(μ/π), without a share of the other tokens."""
    b = 1e-7
    result = backend.run(binary_kl, np.array([-0.1, -2.0]), np.array([b, b]))
    np.testing.assert_allclose(result, [math.exp(b) * (b + 0.1), math.exp(b) * (b + 2.0)], rtol=1e-14)


def test_half_precision_is_computed_in_float32(low_precision_backend):
    backend = low_precision_backend
    for dtype in ("float16", "bfloat16"):
        x, b = backend.asarray([[-0.5, -1.0]], dtype), backend.asarray([[-1.0, -0.5]], dtype)
        top = {"top_k_log_prob": x[:, :1], "top_k_behavior_log_prob": b[:, :1], "sampled_in_top_k": backend.asarray([True])}
        for result in (
            binary_tv(x, b),
            binary_kl(x, b),
            k1(x, b),
            k2(x, b),
            k3(x, b),
            full_tv(x, b),
            full_kl(x, b),
            top_k_tv(x[:, 0], b[:, 0], **top),
            top_k_kl(x[:, 0], b[:, 0], **top),
        ):
            assert backend.to_numpy(result).dtype == np.float32
        gap = math.exp(-0.5) - math.exp(-1.0)
        np.testing.assert_allclose(backend.to_numpy(binary_tv(x, b)), [[gap, gap]], rtol=5e-7)


TOP_K = ("top_k_log_prob", "top_k_behavior_log_prob")


@pytest.mark.parametrize("function", [binary_tv, binary_kl, full_tv, full_kl, k1, k2, k3, top_k_tv, top_k_kl])
def test_float32_stays_float32_unless_an_argument_is_float64(backend, function):
    arrays = [np.array([[-0.7, -1.1]]), np.array([[-0.8, -0.9]])]
    if function in {top_k_tv, top_k_kl}:
        arrays = [*(array[:, 0] for array in arrays), *arrays]

    def run(arrays):
        top = dict(zip(TOP_K, arrays[2:], strict=True)) | {"sampled_in_top_k": np.array([False])} if arrays[2:] else {}
        return backend.run(function, *arrays[:2], **top)

    singles = [array.astype(np.float32) for array in arrays]
    assert run(singles).dtype == np.float32
    for i, double in enumerate(arrays):
        mixed = [*singles[:i], double, *singles[i + 1 :]]
        result = run(mixed)
        assert result.dtype == np.float64
        np.testing.assert_array_equal(result, run([array.astype(np.float64) for array in mixed]))


def test_sampled_in_top_k(backend):
    result = backend.run(sampled_in_top_k, np.array([7, 8, 9]), np.array([[7, 2], [1, 2], [1, 9]]))
    assert result.tolist() == [True, False, True]


def top_k_arguments(**changes):
    top = {"top_k_log_prob": np.log([PI[:2]]), "top_k_behavior_log_prob": np.log([MU[:2]])}
    return top | {"sampled_in_top_k": np.array([True])} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sampled_in_top_k": np.array([1])}, TypeError, "sampled_in_top_k: expected a bool dtype, got .*int64"),
        (
            {"sampled_in_top_k": np.array([[True]])},
            ValueError,
            r"sampled_in_top_k: expected the shape of log_prob, \(1,\), got \(1, 1\)",
        ),
        (
            {"top_k_behavior_log_prob": np.log([MU])},
            ValueError,
            r"top_k_behavior_log_prob: expected the shape of top_k_log_prob, \(1, 2\), got \(1, 5\)",
        ),
        (
            {"top_k_log_prob": np.log(PI), "top_k_behavior_log_prob": np.log(MU)},
            ValueError,
            r"top_k_log_prob: expected the shape of log_prob and one more axis, \(1, 'K'\), got \(5,\)",
        ),
        (
            {"top_k_log_prob": np.log([PI, PI]), "top_k_behavior_log_prob": np.log([MU, MU])},
            ValueError,
            r"top_k_log_prob: expected the shape of log_prob and one more axis, \(1, 'K'\), got \(2, 5\)",
        ),
        ({"top_k_log_prob": np.array([[1, 2]])}, TypeError, "top_k_log_prob: expected a real floating dtype, got .*int64"),
        ({"log_prob": np.array([-1])}, TypeError, "log_prob: expected a real floating dtype, got .*int64"),
        (
            {"behavior_log_prob": np.log(MU)},
            ValueError,
            r"behavior_log_prob: expected the shape of log_prob, \(1,\), got \(5,\)",
        ),
    ],
)
def test_top_k_errors(backend, changes, error, message):
    arguments = {"log_prob": np.log([0.5]), "behavior_log_prob": np.log([0.4])} | top_k_arguments(**changes)
    for function in (top_k_tv, top_k_kl):
        with pytest.raises(error, match="^" + message):
            backend.run(function, **arguments)


def test_sampled_in_top_k_errors(backend):
    with pytest.raises(TypeError, match=r"tokens: expected an integral dtype, got .*float64"):
        backend.run(sampled_in_top_k, np.array([7.0]), np.array([[7]]))
    with pytest.raises(TypeError, match=r"top_k_ids: expected an integral dtype, got .*float64"):
        backend.run(sampled_in_top_k, np.array([7]), np.array([[7.0]]))
    for wrong in (np.array([[7, 8]]), np.array([7, 8]), np.array(7)):
        message = r"^top_k_ids: expected the shape of tokens and one more axis, \(2, 'K'\), got \("
        with pytest.raises(ValueError, match=message):
            backend.run(sampled_in_top_k, np.array([7, 8]), wrong)
    with pytest.raises(ValueError, match=r"(?m)one more axis, \('K',\), got \(\)$"):
        backend.run(sampled_in_top_k, np.array(7), np.array(7))


@pytest.mark.parametrize("function", [binary_tv, binary_kl, full_tv, full_kl, k1, k2, k3], ids=lambda f: f.__name__)
def test_errors_name_the_argument(backend, function):
    x = np.array([[-1.0, -2.0]])
    with pytest.raises(ValueError, match=r"behavior_log_prob: expected the shape of log_prob, \(1, 2\), got \(1, 1\)"):
        backend.run(function, x, x[:, :1])
    with pytest.raises(TypeError, match=r"behavior_log_prob: expected a real floating dtype, got .*int64"):
        backend.run(function, x, np.array([[1, 2]]))
    with pytest.raises(TypeError, match=r"^log_prob: expected a real floating dtype, got .*int64"):
        backend.run(function, np.array([[-1, -2]]), x)


@pytest.mark.parametrize("log_mu", [0.0, -1e-300, -1e-40, -1e-38, -9e-38, -1.1e-37, -1e-36])
def test_binary_kl_beside_certainty_does_not_lose_the_rest(backend, log_mu):
    kl = backend.run(binary_kl, np.array([math.log(0.7), log_mu]), np.array([log_mu, log_mu]))
    np.testing.assert_allclose(kl, [-math.log(0.7), 0.0], rtol=1e-14)


def test_the_rest_and_its_derivative_where_outcomes_tie():
    log_p = torch.log(torch.tensor([0.3, 0.1, 0.3], dtype=torch.float64)).requires_grad_()
    rest, rounding = rest_of(log_p, xp=torch_namespace)
    rest.backward()
    assert abs(float(rest.detach()) - 0.3) <= float(rounding.detach())
    np.testing.assert_allclose(log_p.grad, [-0.3, -0.1, -0.3], rtol=1e-14)
