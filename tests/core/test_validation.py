"""validate: what is reported, with counts and the first index, and what is not."""

import math

import numpy as np
import pytest
from backends import Backend

from drpo_core import validate
from drpo_core.validation import LOWEST, UNLIKELY, Problem, find_problems

GOOD = {
    "log_prob": np.array([[-1.0, -2.0], [0.0, -3.0]]),
    "behavior_log_prob": np.array([[-1.5, -30.0], [-1.0, -3.0]]),
    "advantages": np.array([[1.0, -1.0], [0.0, 1e30]]),
}
# values are read: not under jit
BACKENDS = [b for b in Backend if b is not Backend.JAX_JIT]


def with_value(name, value, *indices):
    arrays = {key: array.copy() for key, array in GOOD.items()}
    for index in indices:
        arrays[name][index] = value
    return arrays


def call(backend, arrays, **options):
    validate(**{name: backend.asarray(array) for name, array in arrays.items()}, **options)


def test_good_values_pass(backend):
    call(backend, GOOD)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "-inf")])
def test_one_bad_value(backend, name, value, kind):
    with pytest.raises(ValueError, match=rf"^{name}: 1 {kind} at valid tokens, at index \(1, 1\)$"):
        call(backend, with_value(name, value, (1, 1)))


@pytest.mark.parametrize("name", ["log_prob", "behavior_log_prob"])
def test_a_log_prob_above_0(backend, name):
    with pytest.raises(ValueError, match=rf"^{name}: 2 above 1e-05 at valid tokens, the first at index \(0, 1\)$"):
        call(backend, with_value(name, 0.5, (0, 1), (1, 1)))
    call(backend, with_value("advantages", 0.5, (0, 1)))


def test_every_problem_is_reported_at_once(backend):
    arrays = with_value("log_prob", math.nan, (0, 0), (1, 1))
    arrays["log_prob"][0, 1] = 2.0
    arrays["advantages"][1, 0] = -math.inf
    message = (
        r"^log_prob: 2 NaN at valid tokens, the first at index \(0, 0\); "
        r"log_prob: 1 above 1e-05 at valid tokens, at index \(0, 1\); "
        r"advantages: 1 -inf at valid tokens, at index \(1, 0\)$"
    )
    with pytest.raises(ValueError, match=message):
        call(backend, arrays)


def test_masked_positions_may_hold_anything(backend):
    mask = np.array([[True, False], [True, True]])
    for name in GOOD:
        for value in (math.nan, math.inf, -math.inf, 5.0):
            call(backend, with_value(name, value, (0, 1)), mask=backend.asarray(mask))
    with pytest.raises(ValueError, match=r"^log_prob: 1 NaN at valid tokens, at index \(1, 1\)$"):
        call(backend, with_value("log_prob", math.nan, (0, 1), (1, 1)), mask=backend.asarray(mask))


def test_rounding_above_0_is_tolerated_and_the_tolerance_can_be_set(backend):
    arrays = with_value("log_prob", 9e-6, (0, 0))
    call(backend, arrays)
    with pytest.raises(ValueError, match="log_prob: 1 above 1e-06 at valid tokens"):
        call(backend, arrays, tolerance=1e-6)
    with pytest.raises(ValueError, match="log_prob: 1 above 0 at valid tokens"):
        call(backend, arrays, tolerance=0.0)
    call(backend, with_value("log_prob", 0.5, (0, 0)), tolerance=1.0)


def test_the_default_tolerance_follows_the_dtype(low_precision_backend):
    """16 machine epsilons: 0.125 in bfloat16, 1/64 in float16."""
    backend = low_precision_backend
    for dtype, tolerance in (("bfloat16", 0.125), ("float16", 0.015625)):
        ok, above = (backend.asarray([v], dtype) for v in (tolerance, 2 * tolerance))
        zero = backend.asarray([0.0], dtype)
        validate(ok, zero, zero)
        with pytest.raises(ValueError, match=f"log_prob: 1 above {tolerance:g}"):
            validate(above, zero, zero)


def test_the_default_tolerance_is_inclusive_and_16_epsilons():
    zero, slack = np.zeros(1, dtype=np.float16), 16 * np.finfo(np.float16).eps
    validate(np.array([slack], dtype=np.float16), zero, zero)
    with pytest.raises(ValueError, match=r"^log_prob: 1 above 0\.015625 at valid tokens, at index \(0,\)$"):
        validate(np.array([np.nextafter(slack, np.float16(1))]), zero, zero)


LOG_PROBS = ["log_prob", "behavior_log_prob"]


@pytest.mark.parametrize("name", LOG_PROBS)
@pytest.mark.parametrize("value", [-9999.0, -1e4, -1e30, np.nextafter(LOWEST, -np.inf)])
def test_a_sentinel_for_a_log_prob_that_is_missing(backend, name, value):
    """−9999 passed, and gave gradients of 1e9."""
    message = rf"^{name}: 2 below -1000 \(a sentinel, such as -9999, .*\) at valid tokens, the first at index \(0, 1\)$"
    with pytest.raises(ValueError, match=message):
        call(backend, with_value(name, value, (0, 1), (1, 1)))
    call(backend, with_value(name, value, (0, 1), (1, 1)), mask=backend.asarray(np.array([[True, False], [True, False]])))
    call(backend, with_value(name, LOWEST, (0, 1)))
    call(backend, with_value("advantages", value, (0, 1)))


@pytest.mark.parametrize("name", LOG_PROBS)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_missing_log_prob_that_was_filled_with_0(backend, name, zero):
    (other,) = set(LOG_PROBS) - {name}
    message = (
        rf"^{name}: 1 exactly 0 where the other policy's is below -1 \(a missing .*\) at valid tokens, at index \(1, 1\)$"
    )
    with pytest.raises(ValueError, match=message):
        call(backend, with_value(name, zero, (1, 1)))
    arrays = with_value(name, zero, (1, 1))
    arrays[other][1, 1] = UNLIKELY  # e⁻¹ and 1 may both be right
    call(backend, arrays)
    arrays[other][1, 1] = np.nextafter(UNLIKELY, -np.inf)
    with pytest.raises(ValueError, match=message):
        call(backend, arrays)
    call(backend, arrays, mask=backend.asarray(np.array([[True, True], [True, False]])))
    arrays[name][1, 1] = -1e-300  # a token that is all but certain
    call(backend, arrays)


def test_every_kind_of_problem_is_found_by_its_own_name(backend):
    """All at once in one array: each token is one kind of problem, and an advantage has none of a log-prob's kinds."""
    values = np.array([-0.5, np.nan, np.inf, -np.inf, 0.5, -9999.0, 0.0])
    others = np.array([-0.5, -0.5, -0.5, -0.5, -0.5, -0.5, -2.0])
    for name in GOOD:
        arrays = {"log_prob": others, "behavior_log_prob": others, "advantages": np.ones(7), name: values}
        problems = find_problems(**{key: backend.asarray(array) for key, array in arrays.items()})
        assert all(type(problem) is Problem for problem in problems)
        kinds = 3 if name == "advantages" else 6
        assert [(p.argument, p.occurrences, p.first) for p in problems] == [(name, 1, (i,)) for i in range(1, 1 + kinds)]


def test_index_of_a_packed_and_of_a_single_token():
    bad = np.array([-1.0, -1.0, np.nan])
    with pytest.raises(ValueError, match=r"at index \(2,\)$"):
        validate(bad, np.full(3, -0.5), np.zeros(3))
    with pytest.raises(ValueError, match=r"at index \(\)$"):
        validate(bad[2:].reshape(()), np.zeros(()), np.zeros(()))


def test_empty_and_fully_masked_arrays_pass():
    validate(np.zeros(0), np.zeros(0), np.zeros(0))
    nan = np.full((2, 3), np.nan)
    validate(nan, nan, nan, mask=np.zeros((2, 3), dtype=bool))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": np.ones((2, 2))}, TypeError, "mask: expected a bool dtype, got .*float64"),
        ({"mask": np.ones(2, dtype=bool)}, ValueError, r"mask: expected the shape of log_prob, \(2, 2\), got \(2,\)"),
        ({"advantages": np.ones(2)}, ValueError, r"advantages: expected the shape of log_prob, \(2, 2\), got \(2,\); per-seq"),
        ({"behavior_log_prob": -np.ones(2)}, ValueError, r"behavior_log_prob: expected the shape of log_prob, \(2, 2\)"),
        ({"log_prob": np.ones((2, 2), dtype=np.int64)}, TypeError, "log_prob: expected a real floating dtype, got .*int64"),
    ],
)
def test_errors(backend, changes, error, message):
    with pytest.raises(error, match=message):
        call(backend, GOOD | changes)
