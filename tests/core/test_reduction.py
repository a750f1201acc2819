"""Reductions by hand on two sequences, of three tokens and of one, padded and packed."""

import math
from functools import partial
from itertools import combinations

import numpy as np
import pytest
from backends import Backend

from drpo_core import (
    DRPO,
    policy_loss_and_gradient,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_loss_and_gradient,
    token_mean,
)
from drpo_core.modes import Mode
from drpo_core.reduction import masked_sum, prompt_mean, reduction_coefficients, reduction_count

VALUES = np.array([[1.0, 2.0, 6.0, np.nan], [5.0, np.inf, np.nan, -np.inf]])
MASK = np.array([[True, True, True, False], [True, False, False, False]])
WEIGHTS = np.array([[1.0, 0.5, 2.0, np.nan], [4.0, np.nan, np.inf, 1.0]])
PACKED = VALUES[MASK]
IDS = np.array([7, 7, 7, -3])
token_sum_over_10 = partial(sequence_mean_token_sum, horizon=10)
REDUCTIONS = [token_mean, sequence_mean_token_mean, sequence_mean_token_sum, token_sum_over_10]
BY_HAND = [(1 + 2 + 6 + 5) / 4, ((1 + 2 + 6) / 3 + 5) / 2, ((1 + 2 + 6) + 5) / 2, ((1 + 2 + 6) / 10 + 5 / 10) / 2]
WEIGHTED = [(1 + 1 + 12 + 20) / 4, ((1 + 1 + 12) / 3 + 20) / 2, (14 + 20) / 2, (14 + 20) / 10 / 2]
NAMES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum over 10"]
# Σ m v with the denominator of each reduction replaced by a normalizer of 8
NORMALIZED = [14 / 8, (3 + 5) / 8, 14 / 8, 1.4 / 8]

each = pytest.mark.parametrize("reduction", REDUCTIONS, ids=NAMES)


@pytest.mark.parametrize(("reduction", "expected"), list(zip(REDUCTIONS, BY_HAND, strict=True)), ids=NAMES)
def test_by_hand_padded_and_packed(backend, reduction, expected):
    padded = backend.run(reduction, VALUES, MASK)
    packed = backend.run(reduction, PACKED, np.ones(4, dtype=bool), segment_ids=IDS)
    assert padded.shape == packed.shape == ()
    np.testing.assert_allclose([padded, packed], expected, rtol=1e-15)


@pytest.mark.parametrize(("reduction", "expected"), list(zip(REDUCTIONS, WEIGHTED, strict=True)), ids=NAMES)
def test_token_weights_multiply_values_and_enter_no_count(backend, reduction, expected):
    padded = backend.run(reduction, VALUES, MASK, token_weights=WEIGHTS)
    packed = backend.run(reduction, PACKED, np.ones(4, dtype=bool), token_weights=WEIGHTS[MASK], segment_ids=IDS)
    np.testing.assert_allclose([padded, packed], expected, rtol=1e-15)


@pytest.mark.parametrize(("reduction", "expected"), list(zip(REDUCTIONS, NORMALIZED, strict=True)), ids=NAMES)
@pytest.mark.parametrize("kind", ["int", "float", "0-d array", "0-d integer array"])
def test_normalizer_replaces_the_denominator(backend, reduction, expected, kind):
    normalizer = {"int": 8, "float": 8.0, "0-d array": np.array(8.0), "0-d integer array": np.array(8)}[kind]
    np.testing.assert_allclose(backend.run(reduction, VALUES, MASK, normalizer=normalizer), expected, rtol=1e-15)


def test_a_normalizer_may_be_less_than_1(backend):
    for normalizer in (0.25, np.array(0.25)):
        np.testing.assert_allclose(backend.run(token_mean, VALUES, MASK, normalizer=normalizer), 14 / 0.25, rtol=1e-15)


@pytest.mark.parametrize("backend", [b for b in Backend if b is not Backend.STRICT], ids=lambda b: b.value, indirect=True)
def test_a_numpy_scalar_normalizer_such_as_mask_sum(backend):
    """`mask.sum()` of a NumPy mask is an np.int64, which is neither an int nor an array; strict arrays know no NumPy."""
    for scalar in (MASK.sum(), np.float32(4.0), np.float64(4.0)):
        np.testing.assert_allclose(backend.run(token_mean, VALUES, MASK, normalizer=scalar), BY_HAND[0], rtol=1e-15)


@each
def test_micro_batches_with_the_normalizer_of_the_batch_add_up(backend, reduction):
    whole = backend.run(reduction, VALUES, MASK)
    normalizer = 4 if reduction is token_mean else 2
    parts = [backend.run(reduction, VALUES[i : i + 1], MASK[i : i + 1], normalizer=normalizer) for i in (0, 1)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-15)


def test_masked_sum(backend):
    total, count = backend.run(masked_sum, VALUES, MASK)
    assert (total, count) == (14.0, 4.0)
    assert total.shape == count.shape == ()
    total, count = backend.run(masked_sum, VALUES, MASK, token_weights=WEIGHTS)
    assert (total, count) == (34.0, 4.0)


@each
def test_fully_masked_is_zero(backend, reduction):
    for normalizer in (None, 0, 0.0, np.array(0.0)):
        nothing = np.zeros((2, 4), dtype=bool)
        assert backend.run(reduction, VALUES, nothing, normalizer=normalizer) == 0.0
        packed = backend.run(reduction, PACKED, nothing[0], segment_ids=IDS, normalizer=normalizer)
        assert packed == 0.0


@each
def test_empty_arrays_are_zero(backend, reduction):
    for shape in [(0,), (2, 0), (0, 3)]:
        assert backend.run(reduction, np.zeros(shape), np.zeros(shape, dtype=bool)) == 0.0
    ids = np.zeros(0, dtype=np.int64)
    assert backend.run(reduction, np.zeros(0), np.zeros(0, dtype=bool), segment_ids=ids) == 0.0


@each
def test_appended_empty_rows_and_a_wider_pad_change_nothing(backend, reduction):
    expected = backend.run(reduction, VALUES, MASK)
    taller = [np.concatenate([x, np.zeros_like(x)]) for x in (VALUES, MASK)]
    wider = [np.concatenate([x, np.zeros_like(x)], axis=1) for x in (VALUES, MASK)]
    np.testing.assert_array_equal(backend.run(reduction, *taller), expected)
    np.testing.assert_allclose(backend.run(reduction, *wider), expected, rtol=1e-15)


@each
def test_a_leading_axis_more_changes_nothing(backend, reduction):
    expected = backend.run(reduction, VALUES, MASK)
    np.testing.assert_allclose(backend.run(reduction, VALUES[None], MASK[None]), expected, rtol=1e-15)


@each
def test_segments_in_any_order_with_any_ids_and_masked_tokens(backend, reduction):
    """Interleaved sequences 7 and −3, masked tokens of both and of a third sequence that is then empty."""
    values = np.array([1.0, np.nan, 5.0, 2.0, np.nan, 6.0, np.inf])
    ids = np.array([7, 7, -3, 7, 99, 7, -3])
    mask = np.array([True, False, True, True, False, True, False])
    expected = backend.run(reduction, VALUES, MASK)
    np.testing.assert_allclose(backend.run(reduction, values, mask, segment_ids=ids), expected, rtol=1e-15)


def with_extreme_ids(dtype):
    """The two sequences with the least and the largest id of a dtype, and a masked token."""
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    values, mask = np.array([1.0, 2.0, 6.0, np.nan, 5.0]), np.array([True, True, True, False, True])
    return (values, mask), {"segment_ids": np.array([most, most, most, most, least], dtype=dtype)}


def test_segment_ids_at_the_ends_of_their_dtype(backend):
    """Ids are "any integers": the largest of the dtype too, where adding 1 wraps around."""
    arrays, ids = with_extreme_ids(np.int32)
    for reduction, expected in zip(REDUCTIONS, BY_HAND, strict=True):
        np.testing.assert_allclose(backend.run(reduction, *arrays, **ids), expected, rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_segment_ids_of_any_integer_dtype(dtype):
    arrays, ids = with_extreme_ids(dtype)
    for reduction, expected in zip(REDUCTIONS, BY_HAND, strict=True):
        np.testing.assert_allclose(reduction(*arrays, **ids), expected, rtol=1e-15)


def test_padded_rows_do_not_share_a_denominator(backend):
    """Row means of 10 and 0 over 1 and 3 tokens: 5, where a token mean gives 2.5."""
    values = np.array([[10.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = np.array([[True, False, False], [True, True, True]])
    assert backend.run(sequence_mean_token_mean, values, mask) == 5.0
    assert backend.run(token_mean, values, mask) == 2.5


def test_half_precision_is_reduced_in_float32(low_precision_backend):
    """4096 ones: float16 holds the count but not the sum of larger values, bfloat16 stops counting at 256."""
    backend = low_precision_backend
    for dtype in ("float16", "bfloat16"):
        values = backend.asarray(np.full((2, 2048), 60.0), dtype)
        mask = backend.asarray(np.ones((2, 2048), dtype=bool))
        weights = backend.asarray(np.full((2, 2048), 2.0), dtype)
        total, count = masked_sum(values, mask)
        assert (float(total), float(count)) == (60.0 * 4096, 4096.0)
        for reduction, expected in (
            (token_mean, 60.0),
            (sequence_mean_token_mean, 60.0),
            (sequence_mean_token_sum, 60.0 * 2048),
        ):
            result = reduction(values, mask)
            assert backend.to_numpy(result).dtype == np.float32
            assert float(result) == expected
            assert float(reduction(values, mask, token_weights=weights)) == 2 * expected


def test_float32_counts_exactly_and_stays_float32(backend):
    values, mask = np.ones((3, 5), dtype=np.float32), np.ones((3, 5), dtype=bool)
    packed, ids = (values[0], mask[0]), np.zeros(5, dtype=np.int64)
    empty = (values[0][:0], mask[0][:0])
    for reduction in REDUCTIONS:
        for normalizer in (None, np.array(3.0)):
            options = {"token_weights": values, "normalizer": normalizer}
            assert backend.run(reduction, values, mask, **options).dtype == np.float32
            assert backend.run(reduction, *packed, segment_ids=ids, normalizer=normalizer).dtype == np.float32
        assert backend.run(reduction, *empty, segment_ids=ids[:0]).dtype == np.float32
    assert backend.run(masked_sum, values, mask).count.dtype == np.float32


def test_nan_at_a_valid_token_is_not_hidden(backend):
    for reduction in REDUCTIONS:
        assert np.isnan(backend.run(reduction, np.array([[1.0, np.nan]]), np.ones((1, 2), dtype=bool)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": MASK * 1.0}, TypeError, r"mask: expected a bool dtype, got .*float64.*; pass `mask != 0`"),
        ({"mask": MASK[0]}, ValueError, r"mask: expected the shape of values, \(2, 4\), got \(4,\)"),
        ({"mask": MASK[:, None]}, ValueError, r"mask: expected the shape of values, \(2, 4\), got \(2, 1, 4\)"),
        ({"values": np.array([[1, 2, 3, 4]] * 2)}, TypeError, "values: expected a real floating dtype, got .*int64"),
        ({"values": 1.0}, TypeError, "values: expected an array of real floating dtype, got float"),
        ({"token_weights": WEIGHTS[:1]}, ValueError, r"token_weights: expected the shape of mask, \(2, 4\), got \(1, 4\)"),
        ({"token_weights": MASK}, TypeError, "token_weights: expected a real floating dtype, got .*bool"),
        ({"segment_ids": np.zeros((2, 4))}, TypeError, "segment_ids: expected an integral dtype, got .*float64"),
        ({"segment_ids": IDS}, ValueError, r"segment_ids: expected the shape of mask, \(2, 4\), got \(4,\)"),
        (
            {"segment_ids": np.zeros((2, 4), dtype=np.int64)},
            ValueError,
            r"segment_ids: expected packed 1-D tokens, got shape \(2, 4\); padded rows need none",
        ),
        ({"normalizer": -1}, ValueError, "normalizer: expected a finite number, 0 or more, got -1"),
        ({"normalizer": math.nan}, ValueError, "normalizer: expected a finite number, 0 or more, got nan"),
        ({"normalizer": math.inf}, ValueError, "normalizer: expected a finite number, 0 or more, got inf"),
        ({"normalizer": np.ones(2)}, (TypeError, ValueError), r"normalizer: expected a .*number.*, got .*shape \(2,\)"),
        ({"normalizer": np.ones(1)}, (TypeError, ValueError), r"normalizer: expected a .*number.*, got .*shape \(1,\)"),
        ({"normalizer": "4"}, TypeError, "normalizer: expected a real number, got str"),
    ],
)
def test_errors(backend, changes, error, message):
    arguments = {"values": VALUES, "mask": MASK} | changes
    for reduction in REDUCTIONS:
        with pytest.raises(error, match=message):
            backend.run(reduction, **arguments)


@pytest.mark.parametrize("horizon", [0.0, -1.0, math.nan, math.inf])
def test_horizon_errors(horizon):
    with pytest.raises(ValueError, match="horizon: expected a finite number greater than 0, got"):
        sequence_mean_token_sum(VALUES, MASK, horizon=horizon)


def test_masked_sum_errors(backend):
    with pytest.raises(TypeError, match="mask: expected a bool dtype"):
        backend.run(masked_sum, VALUES, MASK * 1.0)
    with pytest.raises(ValueError, match="token_weights: expected the shape of mask"):
        backend.run(masked_sum, VALUES, MASK, token_weights=WEIGHTS[0])


KNOWN = [token_mean, sequence_mean_token_mean, sequence_mean_token_sum, partial(sequence_mean_token_sum, horizon=3.0)]


@pytest.mark.parametrize("reduction", KNOWN)
@pytest.mark.parametrize("normalizer", [None, 7.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_coefficients_are_what_each_value_is_multiplied_with(reduction, normalizer, weighted, packed):
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=(2, 3, 5))
    mask = np.array([[True] * 5, [True, False, True, False, False], [False] * 5])
    weights = np.where(mask, weights, np.nan)
    options = {"normalizer": normalizer, "token_weights": weights if weighted else None, "segment_ids": None}
    if packed:
        values, mask, weights = values.ravel(), mask.ravel(), weights.ravel()
        options |= {"segment_ids": np.repeat(np.arange(3), 5), "token_weights": weights if weighted else None}
    coefficients = reduction_coefficients(reduction, mask, dtype=np.float64, **options)
    total = np.where(mask, coefficients * values, 0.0).sum()
    np.testing.assert_allclose(total, reduction(values, mask, **options), rtol=1e-15)


@pytest.mark.parametrize("reduction", KNOWN)
def test_what_is_counted_are_tokens_or_sequences(reduction):
    mask = np.array([[True, True, False], [True, False, False], [False, False, False]])
    expected = 3.0 if reduction is token_mean else 2.0
    assert reduction_count(reduction, mask, dtype=np.float32) == expected
    assert reduction_count(reduction, mask.ravel(), dtype=np.float32, segment_ids=np.repeat(np.arange(3), 3)) == expected
    assert reduction_count(reduction, np.zeros((2, 2), dtype=bool), dtype=np.float32) == 0.0
    assert reduction_count(reduction, mask, dtype=np.float32).dtype == np.float32
    with pytest.raises(TypeError, match="mask: expected a bool dtype"):
        reduction_count(reduction, np.ones((2, 2)), dtype=np.float32)


def test_coefficients_have_the_dtype_that_was_asked_for():
    mask, weights = np.array([[True, False]]), np.array([[0.5, 1.0]])
    assert reduction_coefficients(token_mean, mask, dtype=np.float32, token_weights=weights).dtype == np.float32


RNG = np.random.default_rng(0)
TOKENS = {
    "log_prob": -RNG.random((3, 5)),
    "behavior_log_prob": -RNG.random((3, 5)),
    "advantages": RNG.normal(size=(3, 5)),
    "mask": np.array([[True] * 5, [True, False, True, False, False], [False] * 5]),
}
PACKED_TOKENS = {name: array.ravel() for name, array in TOKENS.items()}
OBJECTIVE = DRPO(delta=0.5)
ENGINES = ["arrays", "compiled"]
FACTORS = RNG.random(15)
OPTIONS = {
    "normalizer": 7.0,
    "token_weights": FACTORS,
    "segment_ids": np.repeat([4, -1, 9], 5),
}
THREE = [token_mean, sequence_mean_token_mean, sequence_mean_token_sum]
each_engine = pytest.mark.parametrize("engine", ENGINES)


def loss_and_gradient(reduction, tokens=TOKENS, *, engine="arrays", **options):
    """As bytes would be compared: the same arithmetic gives the same numbers."""
    result = policy_loss_and_gradient(OBJECTIVE, **tokens, reduction=reduction, engine=engine, **options)
    return result.loss, result.gradient


@each_engine
@pytest.mark.parametrize("reduction", THREE, ids=lambda r: r.__name__)
@pytest.mark.parametrize("names", [n for k in range(4) for n in combinations(OPTIONS, k)], ids="+".join)
def test_what_partial_has_bound_is_what_is_passed(reduction, names, engine):
    """A bound normalizer was ignored, which made the loss 500 times too large (fault 06)."""
    given = {name: OPTIONS[name] for name in names}
    # a horizon can only be bound
    horizon = {"horizon": 3.0} if reduction is sequence_mean_token_sum else {}
    bound = partial(partial(reduction, **horizon), **given)
    expected = loss_and_gradient(partial(reduction, **horizon), PACKED_TOKENS, engine=engine, **given)
    assert_equal(loss_and_gradient(bound, PACKED_TOKENS, engine=engine), expected)
    values = token_loss_and_gradient(OBJECTIVE, **PACKED_TOKENS).loss
    np.testing.assert_allclose(expected[0], bound(values, PACKED_TOKENS["mask"]), rtol=1e-13)
    if "normalizer" in given:
        with pytest.raises(ValueError, match=r"reduction: expected one that counts .*, got one with normalizer=7.0 bound"):
            reduction_count(bound, PACKED_TOKENS["mask"], dtype=np.float64)
        return
    count = reduction_count(bound, PACKED_TOKENS["mask"], dtype=np.float64)
    ids = {"segment_ids": given["segment_ids"]} if "segment_ids" in given else {}
    assert count == reduction_count(reduction, PACKED_TOKENS["mask"], dtype=np.float64, **ids)


def assert_equal(got, expected):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_passed_goes_before_what_is_bound(name):
    other = {"normalizer": 100.0, "token_weights": np.full(15, np.nan), "segment_ids": np.arange(15)}[name]
    bound = partial(sequence_mean_token_mean, **{name: other})
    expected = loss_and_gradient(sequence_mean_token_mean, PACKED_TOKENS, **{name: OPTIONS[name]})
    assert_equal(loss_and_gradient(bound, PACKED_TOKENS, **{name: OPTIONS[name]}), expected)


def test_a_bound_namespace_changes_nothing():
    assert_equal(loss_and_gradient(partial(token_mean, xp=np)), loss_and_gradient(token_mean))


def largest(values, *_, **__):
    return values.max()


class NotHashable:
    """A callable without a hash."""

    __hash__ = None

    def __call__(self, values, mask, **_):
        """A sum."""
        return (values * mask).sum()


@pytest.mark.parametrize(
    "unknown",
    [
        largest,
        lambda values, mask, **_: (values * mask).sum(),
        partial(largest, horizon=3.0),
        partial(token_mean, np.ones(3)),
        NotHashable(),
        "token_mean",
        3,
        [],
        np.sum,
        np.ones(3),
        type("Class", (), {}),
        type("Attribute", (), {"coefficients": 3.0})(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_error_for_every_reduction_that_is_not_known(unknown):
    message = (
        r"^reduction: expected token_mean, sequence_mean_token_mean, sequence_mean_token_sum, prompt_mean \(arguments may be "
        r"bound by functools\.partial\) or a linear_reduction, whose coefficients are known beforehand, got "
    )
    mask = TOKENS["mask"]
    for call in (
        lambda: reduction_coefficients(unknown, mask, dtype=np.float64),
        lambda: reduction_count(unknown, mask, dtype=np.float64),
        *(partial(loss_and_gradient, unknown, engine=engine) for engine in (*ENGINES, "auto")),
    ):
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        (partial(token_mean, horizon=3.0), "^reduction: token_mean has no argument horizon$"),
        (partial(sequence_mean_token_mean, horizon=3.0), "^reduction: sequence_mean_token_mean has no argument horizon$"),
        (partial(token_mean, dim=0), "^reduction: token_mean has no argument dim$"),
        (partial(token_mean, group_ids=np.arange(3)), "^reduction: token_mean has no argument group_ids$"),
        (partial(prompt_mean, horizon=3.0), "^reduction: prompt_mean has no argument horizon$"),
        (
            prompt_mean,
            r"^reduction: expected group_ids bound, as in functools.partial\(prompt_mean, group_ids=ids\), got <func",
        ),
        (partial(token_mean, dim=0, axis=1), "^reduction: token_mean has no argument axis, dim$"),
    ],
)
def test_a_bound_argument_that_there_is_not(reduction, message):
    for call in (loss_and_gradient, partial(reduction_count, mask=TOKENS["mask"], dtype=np.float64)):
        with pytest.raises(TypeError, match=message):
            call(reduction)


# --- prompts ------------------------------------------------------------------------------------------------------------


def prompts(seed):
    """Seven rows of four prompts, with masked tokens that hold junk; the last prompt, and one row of another, have none."""
    rng = np.random.default_rng(seed)
    mask = rng.random((7, 6)) < 0.6
    ids = rng.permutation([-5, 40, -5, 7, 40, 40, 99])
    mask[ids == 99] = False
    mask[int(np.flatnonzero(ids == 40)[0])] = False
    mask[int(np.flatnonzero(ids == 7)[0]), 0] = True
    values, weights = np.where(mask, rng.normal(size=(2, *mask.shape)), np.nan)
    return values, mask, ids, weights


def mean_over_prompts(values, mask, ids, weights=None, normalizer=None):
    """One prompt after the other, one token after the other."""
    means = []
    for prompt in sorted(set(ids.tolist())):
        tokens = [(i, t) for i, t in zip(*np.nonzero(mask), strict=True) if ids[i] == prompt]
        if tokens:
            means.append(math.fsum(values[k] * (1.0 if weights is None else weights[k]) for k in tokens) / len(tokens))
    return math.fsum(means) / (len(means) if normalizer is None else normalizer)


# eager JAX compiles every operation by itself: that is slow, and the same operations as under jit
NOT_EAGER_JAX = pytest.mark.parametrize(
    "backend", [b for b in Backend if b is not Backend.JAX], ids=lambda b: b.value, indirect=True
)


@NOT_EAGER_JAX
@pytest.mark.parametrize("given", [(), ("normalizer", "token_weights")], ids=["", "normalised and weighted"])
def test_a_mean_over_prompts_of_each_ones_tokens(backend, given):
    """Padded, and packed in any order: the samples of a prompt share a denominator."""
    values, mask, ids, weights = prompts(seed=len(given))
    options = {name: {"normalizer": 5.0, "token_weights": weights}[name] for name in given}
    wanted = mean_over_prompts(values, mask, ids, options.get("token_weights"), options.get("normalizer"))
    order = np.random.default_rng(3).permutation(mask.size)
    flat = {name: value.ravel()[order] if name == "token_weights" else value for name, value in options.items()}
    for arrays, own in (
        ((values, mask), options | {"group_ids": ids}),
        ((values.ravel()[order], mask.ravel()[order]), flat | {"group_ids": np.repeat(ids, 6)[order]}),
    ):
        np.testing.assert_allclose(backend.run(prompt_mean, *arrays, **own), wanted, rtol=1e-13)
        bound = partial(prompt_mean, **own)
        coefficients = reduction_coefficients(bound, arrays[1], dtype=np.float64)
        np.testing.assert_allclose(np.where(arrays[1], coefficients * arrays[0], 0.0).sum(), wanted, rtol=1e-13)
        counts = partial(prompt_mean, **{name: option for name, option in own.items() if name != "normalizer"})
        assert reduction_count(counts, arrays[1], dtype=np.float64) == 3.0


def test_rows_of_prompts_may_have_several_axes():
    values, mask, ids, _ = prompts(seed=1)
    found = prompt_mean(values.reshape(7, 1, 6), mask.reshape(7, 1, 6), group_ids=ids.reshape(7, 1))
    np.testing.assert_allclose(found, mean_over_prompts(values, mask, ids), rtol=1e-13)


def test_a_prompt_is_not_the_mean_of_its_sequences():
    """Rows of 3 and 1 tokens of one prompt: 14/4, not (3 + 5)/2."""
    assert prompt_mean(VALUES, MASK, group_ids=np.array([2, 2])) == 14 / 4
    assert prompt_mean(VALUES, MASK, group_ids=np.array([2, 1])) == (3 + 5) / 2


@NOT_EAGER_JAX
def test_prompts_without_tokens_count_nothing(backend):
    for shape in ((0, 3), (2, 3)) if backend is Backend.JAX_JIT else ((0,), (0, 3), (2, 0), (2, 3)):
        ids = np.zeros(shape[:1], dtype=np.int64)
        assert backend.run(prompt_mean, np.ones(shape), np.zeros(shape, dtype=bool), group_ids=ids) == 0.0


@each_engine
def test_a_loss_over_prompts_and_over_its_micro_batches(engine):
    """A mode takes the coefficients of the whole batch as token weights, and so do parts that divide a prompt."""
    ids = np.array([8, 8, -2])
    bound = partial(prompt_mean, group_ids=ids)
    loss, gradient = loss_and_gradient(bound, engine=engine)
    parts = token_loss_and_gradient(OBJECTIVE, **TOKENS)
    np.testing.assert_allclose(loss, mean_over_prompts(parts.loss, TOKENS["mask"], ids), rtol=1e-13)
    coefficients = reduction_coefficients(bound, TOKENS["mask"], dtype=np.float64)
    shares = np.broadcast_to(coefficients, TOKENS["mask"].shape)
    np.testing.assert_allclose(gradient, np.where(TOKENS["mask"], shares * parts.gradient, 0.0), rtol=1e-13)
    mode = Mode(OBJECTIVE, reduction="token_sum")
    found = [
        policy_loss_and_gradient(
            mode, **{n: a[i : i + 1] for n, a in TOKENS.items()}, token_weights=shares[i : i + 1], engine=engine
        )
        for i in range(3)
    ]
    np.testing.assert_allclose(sum(part.loss for part in found), loss, rtol=1e-13)
    np.testing.assert_allclose(np.concatenate([part.gradient for part in found]), gradient, rtol=1e-13)


@pytest.mark.parametrize(
    ("ids", "mask", "error", "message"),
    [
        (np.zeros(2), MASK, TypeError, "group_ids: expected an integral dtype, got .*float64"),
        (np.zeros(3, int), MASK, ValueError, r"group_ids: expected one a row of the mask, shape \(2,\), got \(3,\)"),
        (np.zeros((2, 4), int), MASK, ValueError, r"group_ids: expected one a row of the mask, shape \(2,\), got \(2, 4\)"),
        (np.zeros(1, int), MASK[0], ValueError, r"group_ids: expected one a token, shape \(4,\), got \(1,\)"),
        (np.zeros((), int), MASK[0, 0], ValueError, "mask: expected at least one axis, the tokens of a sequence"),
    ],
)
def test_group_ids_are_checked(backend, ids, mask, error, message):
    with pytest.raises(error, match=message):
        backend.run(prompt_mean, np.zeros(np.shape(mask)), np.asarray(mask), group_ids=ids)


class Own:
    """A reduction of the caller's own: it multiplies with these, and keeps what it was asked."""

    def __init__(self, factors):
        """Of any shape that broadcasts to a mask's."""
        self.factors, self.asked = factors, None

    def coefficients(self, mask, **asked):
        """The factors."""
        assert str(mask.dtype).endswith("bool")
        self.asked = asked
        return self.factors


@each_engine
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 1), (3, 1), (1, 5), (3, 5)])
def test_a_reduction_of_ones_own_is_known_by_its_coefficients(shape, dtype, engine):
    """The compiled loop took coefficients of a column for those of rows, and read beyond the end of others."""
    own = Own(np.random.default_rng(2).random(shape))
    tokens = {name: array if array.dtype == bool else array.astype(dtype) for name, array in TOKENS.items()}
    loss, gradient = loss_and_gradient(own, tokens, engine=engine)
    assert {loss.dtype, gradient.dtype} == {np.dtype(dtype)}
    parts = token_loss_and_gradient(OBJECTIVE, **tokens)
    tolerance = {"rtol": 1e-12 if dtype is np.float64 else 1e-5, "atol": 1e-7 if dtype is np.float32 else 1e-16}
    np.testing.assert_allclose(loss, (own.factors * parts.loss).sum(), **tolerance)
    np.testing.assert_allclose(gradient, np.where(tokens["mask"], own.factors * parts.gradient, 0.0), **tolerance)


@each_engine
def test_a_reduction_of_ones_own_is_asked_with_what_was_given(engine):
    own = Own(np.asarray(0.5))
    loss_and_gradient(own, PACKED_TOKENS, engine=engine, **OPTIONS)
    assert own.asked.keys() == {"dtype", "xp", *OPTIONS}
    assert own.asked["dtype"] == np.float64
    assert all(own.asked[name] is value for name, value in OPTIONS.items())
    loss_and_gradient(own, engine=engine)
    assert [own.asked[name] for name in OPTIONS] == [None] * 3


@each_engine
@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        (np.ones(3), ValueError, r"expected a shape that broadcasts to the mask's, \(3, 5\), got \(3,\)"),
        (np.ones(0), ValueError, r"got \(0,\)"),
        (np.ones((15,)), ValueError, r"got \(15,\)"),
        (np.ones((2, 3, 5)), ValueError, r"got \(2, 3, 5\)"),
        (np.ones((1, 3, 5)), ValueError, r"got \(1, 3, 5\)"),
        (0.5, TypeError, "expected an array of real floating dtype, got float"),
        ([1.0], TypeError, "expected an array of real floating dtype, got list"),
        (None, TypeError, "expected an array of real floating dtype, got NoneType"),
        (np.array(1), TypeError, "expected a real floating dtype, got int64"),
        (np.ones((3, 5), dtype=bool), TypeError, "expected a real floating dtype, got bool"),
    ],
)
def test_coefficients_of_ones_own_are_checked(factors, error, message, engine):
    with pytest.raises(error, match=rf"^coefficients of the reduction: .*{message}"):
        loss_and_gradient(Own(factors), engine=engine)


def test_masked_tokens_may_have_any_coefficient(backend):
    """NaN and infinity included, in every engine."""
    clean, mask = RNG.random((3, 5)), TOKENS["mask"]
    for garbage in (np.nan, np.inf, -np.inf, 1e300):
        for engine in ENGINES:
            expected = loss_and_gradient(Own(clean), engine=engine)
            assert_equal(loss_and_gradient(Own(np.where(mask, clean, garbage)), engine=engine), expected)

        def run(factors, **tokens):
            return tuple(policy_loss_and_gradient(OBJECTIVE, **tokens, reduction=Own(factors), engine="arrays")[:2])

        with np.errstate(invalid="ignore"):  # of array-api-strict, whose arrays are NumPy's
            got = backend.run(run, np.where(mask, clean, garbage), **TOKENS)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-16)
