"""Log-ratio, importance ratio and probability shift on hand-computed tokens."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backends import Backend

from drpo_core import (
    Tokens,
    importance_ratio,
    log_ratio,
    policy_loss_and_gradient,
    probability_shift,
    token_diagnostics,
    token_loss_and_gradient,
)
from drpo_core.objectives import OBJECTIVES

# π = 1/2, 1/5, 3/10 and μ = 1/4, 1/5, 3/5
LOG_PROB, BEHAVIOR = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
FUNCTIONS = [log_ratio, importance_ratio, probability_shift]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (log_ratio, [math.log(2), 0.0, -math.log(2)]),
        (importance_ratio, [0.5 / 0.25, 1.0, 0.3 / 0.6]),
        (probability_shift, [0.5 - 0.25, 0.0, 0.3 - 0.6]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_by_hand(backend, function, expected):
    np.testing.assert_allclose(backend.run(function, LOG_PROB, BEHAVIOR), expected, rtol=1e-14)


def test_tokens_hold_all_four_quantities(backend):
    def four(log_prob, behavior, advantages):
        tokens = Tokens.checked(log_prob, behavior, advantages)
        return tokens.log_ratio, tokens.ratio, tokens.ratio_minus_one, tokens.shift

    ell, ratio, ratio_minus_one, shift = backend.run(four, LOG_PROB, BEHAVIOR, np.ones(3))
    np.testing.assert_allclose(ell, [math.log(2), 0.0, -math.log(2)], rtol=1e-14)
    np.testing.assert_allclose(ratio, [2.0, 1.0, 0.5], rtol=1e-14)
    np.testing.assert_allclose(ratio_minus_one, [2.0 - 1.0, 0.0, 0.5 - 1.0], rtol=1e-14)
    np.testing.assert_allclose(shift, [0.25, 0.0, -0.3], rtol=1e-14)


def test_the_ratio_saturates_at_e_to_the_20(backend):
    behavior = np.array([-19.0, -20.0, -21.0, -90.0, -800.0])
    ratio = backend.run(importance_ratio, np.zeros(5), behavior)
    np.testing.assert_allclose(ratio, [math.exp(19)] + [math.exp(20)] * 4, rtol=1e-14)


def test_the_log_ratio_does_not_saturate(backend):
    assert backend.run(log_ratio, np.array([-1.0]), np.array([-801.0])) == 800.0


INF = math.inf


@pytest.mark.parametrize(
    ("log_prob", "behavior", "ell", "ratio", "shift"),
    [
        (-INF, -INF, 0.0, 1.0, 0.0),  # both impossible: on-policy
        (-INF, -1.0, -INF, 0.0, -math.exp(-1)),
        (-INF, 0.0, -INF, 0.0, -1.0),
        (-1.0, -INF, INF, math.exp(20), math.exp(-1)),
        (-1.0, -1.0, 0.0, 1.0, 0.0),
        (-1.0, 0.0, -1.0, math.exp(-1), math.exp(-1) - 1.0),
        (0.0, -INF, INF, math.exp(20), 1.0),
        (0.0, -1.0, 1.0, math.exp(1), 1.0 - math.exp(-1)),
        (0.0, 0.0, 0.0, 1.0, 0.0),
    ],
)
def test_impossible_and_certain_tokens(backend, log_prob, behavior, ell, ratio, shift):
    x, b = np.array([log_prob]), np.array([behavior])
    assert backend.run(log_ratio, x, b) == ell
    np.testing.assert_allclose(backend.run(importance_ratio, x, b), [ratio], rtol=1e-14)
    np.testing.assert_allclose(backend.run(probability_shift, x, b), [shift], rtol=1e-14)


def test_nan_stays_nan(backend):
    for function in FUNCTIONS:
        result = backend.run(function, np.array([np.nan, -1.0]), np.array([-1.0, np.nan]))
        assert np.isnan(result).all(), function.__name__


def test_any_shape_is_kept(backend):
    for shape in [(), (0,), (2, 3), (2, 0), (2, 1, 3)]:
        assert backend.run(probability_shift, np.full(shape, -1.0), np.full(shape, -2.0)).shape == shape


def test_float32_stays_float32(backend):
    x, b = np.array([-1.0], dtype=np.float32), np.array([-2.0], dtype=np.float32)
    for function in FUNCTIONS:
        assert backend.run(function, x, b).dtype == np.float32


def test_half_precision_is_computed_in_float32(low_precision_backend):
    backend = low_precision_backend
    for dtype in ("float16", "bfloat16"):
        x, b = backend.asarray([-1.0, -0.5], dtype), backend.asarray([-1.0078125, -1.0], dtype)
        expected = [math.exp(-1.0) - math.exp(-1.0078125), math.exp(-0.5) - math.exp(-1.0)]
        result = backend.to_numpy(probability_shift(x, b))
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=5e-7)


def test_mixed_dtypes_are_promoted(backend):
    single, double = np.array([-1.0], dtype=np.float32), np.array([-2.1])
    for function in FUNCTIONS:
        for arrays in ((single, double), (double, single)):
            result = backend.run(function, *arrays)
            assert result.dtype == np.float64
            np.testing.assert_array_equal(result, backend.run(function, *(x.astype(float) for x in arrays)))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["log_prob", "behavior_log_prob", "advantages"])
def test_one_float64_array_makes_all_tokens_float64(backend, which):
    arrays = [np.array([v], dtype=np.float32) for v in (-0.5, -1.0, 2.0)]
    arrays[which] = arrays[which].astype(np.float64) * 1.1

    def fields(*arrays):
        tokens = Tokens.checked(*arrays)
        return tokens.log_prob, tokens.behavior_log_prob, tokens.advantages, tokens.ratio

    *given, ratio = backend.run(fields, *arrays)
    assert {array.dtype for array in given} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(given, arrays)
    np.testing.assert_allclose(ratio, np.exp(given[0] - given[1]), rtol=1e-15)


class OfDivergence:
    """An objective whose loss is of the measured divergence itself."""

    def loss(self, tokens):
        """A D."""
        return tokens.advantages * tokens.divergence

    def weight(self, tokens):
        """D."""
        return tokens.divergence


@pytest.mark.parametrize("requires_grad", [False, True])
def test_what_is_returned_has_no_graph_where_the_gradient_is_returned_with_it(requires_grad):
    """Autograd through CISPO's loss gave another gradient than the one beside it (fault 38); `Tokens` keep the graph."""
    arrays = {
        "log_prob": torch.tensor([[-1.0, -2.0]], requires_grad=requires_grad),
        "behavior_log_prob": torch.tensor([[-1.5, -1.5]], requires_grad=requires_grad),
        "advantages": torch.tensor([[1.0, -1.0]], requires_grad=requires_grad),
    }
    weights, measured = (torch.rand((1, 2), requires_grad=requires_grad) for _ in range(2))
    normalizer, mask = torch.tensor(2.0, requires_grad=requires_grad), torch.ones((1, 2), dtype=torch.bool)
    for made in (*(f.make(f.typical[0] if f.typical else None) for f in OBJECTIVES), OfDivergence()):
        tokens = arrays | {"mask": mask, "divergence": measured}
        options = {"engine": "arrays", "token_weights": weights, "normalizer": normalizer}
        reduced = policy_loss_and_gradient(made, **tokens, **options)
        figures = [*reduced.diagnostics.values(), *token_diagnostics(made, **tokens).values()]
        results = (*token_loss_and_gradient(made, **tokens), *reduced[:2], *(field for s in figures for field in s))
        assert not any(array.requires_grad for array in results), made
    assert Tokens.checked(**arrays).ratio.requires_grad == requires_grad


def test_masked_tokens_are_inert_and_on_policy(backend):
    def fields(log_prob, behavior, advantages, mask):
        tokens = Tokens.checked(log_prob, behavior, advantages, mask=mask)
        return tokens.advantages, tokens.log_ratio, tokens.ratio, tokens.shift

    nan, mask = np.array([-1.0, np.nan]), np.array([True, False])
    assert [array[1] for array in backend.run(fields, nan, nan, nan, mask)] == [0.0, 0.0, 1.0, 0.0]


def test_the_high_bound_governs_positive_and_zero_advantages(backend):
    def bound(*arrays):
        return Tokens.checked(*arrays).by_advantage(1.0, 2.0)

    assert backend.run(bound, np.zeros(3), np.zeros(3), np.array([-3.0, 0.0, 3.0])).tolist() == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_errors_name_the_argument_what_was_given_and_what_was_expected(backend, function):
    x = np.array([-1.0, -2.0])
    with pytest.raises(ValueError, match=r"(?m)^behavior_log_prob: expected the shape of log_prob, \(2,\), got \(1,\)$"):
        backend.run(function, x, x[:1])
    with pytest.raises(ValueError, match=r"(?m)^behavior_log_prob: expected the shape of log_prob, \(2,\), got \(2, 1\)$"):
        backend.run(function, x, x[:, None])
    with pytest.raises(TypeError, match=r"(?m)^log_prob: expected a real floating dtype, got .*int64"):
        backend.run(function, np.array([-1, -2]), x)
    with pytest.raises(TypeError, match=r"(?m)^behavior_log_prob: expected an array of real floating dtype, got list$"):
        backend.run(function, x, [-1.0, -2.0])
    with pytest.raises(TypeError, match=r"(?m)^log_prob: expected an array of real floating dtype, got float$"):
        backend.run(function, -1.0, x)


def test_arrays_of_two_libraries_are_refused(low_precision_backend):
    other = low_precision_backend.asarray([-1.0])
    with pytest.raises(
        TypeError, match=r"^expected arrays of one library, but log_prob is a numpy.ndarray of shape \(1,\), behavior_log_prob"
    ):
        log_ratio(np.array([-1.0]), other)


def test_the_libraries_of_refused_arrays_are_named():
    message = (
        r"^expected arrays of one library, but log_prob is a numpy.ndarray of shape \(1,\), "
        r"behavior_log_prob is a array_api_\w+\..*Array of shape \(1,\)$"
    )
    with pytest.raises(TypeError, match=message):
        log_ratio(np.array([-1.0]), Backend.STRICT.asarray([-1.0]))


MIXED = {
    "log_prob": ("real floating", np.array([-1.0])),
    "advantages": ("real floating", np.array([1.0])),
    "mask": ("bool", np.array([True])),
    "divergence": ("real floating", np.array([1.0])),
}


@pytest.mark.filterwarnings("ignore:You are comparing a array_api_strict dtype")
@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("foreign", [Backend.NUMPY, Backend.TORCH, Backend.STRICT], ids=lambda b: b.value)
@pytest.mark.parametrize("own", [Backend.NUMPY, Backend.TORCH, Backend.STRICT], ids=lambda b: b.value)
def test_one_array_of_another_library_is_told_from_one_of_another_dtype(own, foreign, name):
    """A mask of NumPy beside tensors was "a bool dtype, got bool"."""
    if own is foreign:
        pytest.skip("one library")
    tokens = {"log_prob": np.array([-1.0]), "behavior_log_prob": np.array([-1.5]), "advantages": np.array([1.0])}
    given = {key: own.asarray(array) for key, array in tokens.items()} | {name: foreign.asarray(MIXED[name][1])}
    message = r"^expected arrays of one library, but log_prob is a "
    if name == "mask":
        message = r"^mask: expected an array of bool dtype of the library of the other arguments, got .* and dtype .*bool$"
    with pytest.raises(TypeError, match=message):
        Tokens.checked(**given)


def test_a_dtype_that_the_library_has_not():
    """NumPy's arrays may hold bfloat16 of the package ml_dtypes."""
    x = np.array([-1.0], dtype=jnp.bfloat16)
    with pytest.raises(TypeError, match=r"^log_prob: expected an array of real floating dtype .*, got .* and dtype bfloat16$"):
        log_ratio(x, x)


def test_more_than_double_precision_is_computed_in_double():
    """Not in single, as all that was not float64 was."""
    x = np.array([-1.0], dtype=np.longdouble)
    assert log_ratio(x, x - np.longdouble(1e-12)) == pytest.approx(1e-12, rel=1e-3)
    result = token_loss_and_gradient(OBJECTIVES[0].make(), x, x, -x)
    assert result.loss.dtype == np.float64
