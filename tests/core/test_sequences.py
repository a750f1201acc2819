"""Sums, extrema and running sums over sequences, against loops over the valid tokens of each."""

import math

import numpy as np
import pytest
from array_api_compat import array_namespace
from backends import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from mode_oracles import packed, spoilt

from drpo_core._sequences import Segments, Sequences

FUZZ = settings(max_examples=80, derandomize=True, deadline=None)
GAMMA = 0.7


def each_of(function):
    """The same number for every token of a sequence."""
    return lambda tokens: [function([x for _, x in tokens])] * len(tokens)


ORACLES = {
    "total": each_of(math.fsum),
    "mean": each_of(lambda xs: math.fsum(xs) / max(len(xs), 1)),
    "length": each_of(len),
    "largest": each_of(lambda xs: max(xs, default=-math.inf)),
    "running_total": lambda tokens: [math.fsum(x for _, x in tokens[: i + 1]) for i in range(len(tokens))],
    "smallest_before": lambda tokens: [min((x for _, x in tokens[:i]), default=9.0) for i in range(len(tokens))],
    "discounted_future": lambda tokens: [
        math.fsum(GAMMA ** (there - here) * x for there, x in tokens[i:]) for i, (here, _) in enumerate(tokens)
    ],
}
"""Of the valid tokens of a sequence, as (place, number)."""

ARGUMENTS = {"smallest_before": {"nothing": 9.0}, "discounted_future": {"discount": GAMMA}}
each = pytest.mark.parametrize("method", ORACLES)


def run(backend, method, x, mask, segment_ids=None):
    """A method's result, spread over the tokens, and 0 at masked ones."""

    def of(x, mask, segment_ids=None):
        xp = array_namespace(x)
        found = getattr(Sequences(mask, segment_ids, xp=xp), method)(x, **ARGUMENTS.get(method, {}))
        return xp.where(mask, xp.broadcast_to(found, x.shape), 0.0)

    return backend.run(of, x, mask, **({} if segment_ids is None else {"segment_ids": segment_ids}))


def expected(method, x, mask):
    found = np.zeros(x.shape)
    for i, row in enumerate(mask):
        places = np.flatnonzero(row)
        found[i, places] = ORACLES[method]([(int(place), float(x[i, place])) for place in places])
    return found


def rows(shape=(4, 9), *, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.7
    if len(mask) > 1:
        mask[1] = False
    return spoilt({"values": rng.normal(size=shape), "mask": mask})


@each
def test_padded_and_packed(backend, method):
    for shape in ((4, 9), (1, 1), (3, 16), (2, 5)):
        arrays = rows(shape)
        wanted = expected(method, arrays["values"], arrays["mask"])
        np.testing.assert_allclose(run(backend, method, arrays["values"], arrays["mask"]), wanted, rtol=1e-13, atol=1e-15)
        flat, places = packed(arrays, seed=shape[1])
        found = run(backend, method, flat["values"], flat["mask"], flat["segment_ids"])
        np.testing.assert_allclose(found, wanted[places], rtol=1e-13, atol=1e-15)


@each
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (0, 0)], ids=str)
def test_nothing(backend, method, shape):
    x, mask = np.zeros(shape), np.zeros(shape, dtype=bool)
    assert run(backend, method, x, mask).shape == shape
    if len(shape) == 1:
        assert run(backend, method, x, mask, np.zeros(shape, dtype=np.int64)).shape == shape


@each
def test_more_axes_are_more_rows(method):
    arrays = rows((6, 5))
    deep = run(Backend.NUMPY, method, arrays["values"].reshape(2, 3, 5), arrays["mask"].reshape(2, 3, 5))
    np.testing.assert_array_equal(deep.reshape(6, 5), run(Backend.NUMPY, method, arrays["values"], arrays["mask"]))


@each
def test_float32_stays_float32(backend, method):
    arrays = rows()
    x = arrays["values"].astype(np.float32)
    assert run(backend, method, x, arrays["mask"]).dtype == np.float32
    flat, _ = packed(arrays)
    assert run(backend, method, flat["values"].astype(np.float32), flat["mask"], flat["segment_ids"]).dtype == np.float32


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.sampled_from(list(ORACLES)))
@FUZZ
def test_packed_of_any_lengths(lengths, seed, method):
    """Every length around a power of two, where the steps of a scan change in number."""
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    x = rng.normal(size=mask.shape)
    arrays, places = packed({"values": x, "mask": mask}, seed=seed % 97)
    keep = arrays["mask"]
    found = run(Backend.NUMPY, method, *(arrays[name][keep] for name in ("values", "mask", "segment_ids")))
    np.testing.assert_allclose(found, expected(method, x, mask)[places][keep], rtol=1e-12, atol=1e-13)


def test_first_of_each_counts_sequences(backend):
    """One element of each sequence that has a valid token, padded and packed."""

    def count(mask, segment_ids=None):
        xp = array_namespace(mask)
        first = Sequences(mask, segment_ids, xp=xp).first_of_each()
        return xp.sum(xp.astype(first, xp.float32))

    arrays = rows((5, 6))
    flat, _ = packed(arrays)
    wanted = arrays["mask"].any(axis=1).sum()
    assert backend.run(count, arrays["mask"]) == wanted
    assert backend.run(count, flat["mask"], segment_ids=flat["segment_ids"]) == wanted


def test_ids_at_the_ends_of_their_dtype():
    ids = np.array([2**31 - 1, -(2**31), 2**31 - 1], dtype=np.int32)
    found = run(Backend.NUMPY, "total", np.array([1.0, 5.0, 2.0]), np.ones(3, dtype=bool), ids)
    assert found.tolist() == [3.0, 5.0, 3.0]


def test_what_is_infinite_in_one_sequence_stays_in_it():
    """Overflow of one sum is no NaN of another."""
    x, mask, ids = np.array([np.inf, 1.0, 2.0, np.nan]), np.ones(4, dtype=bool), np.array([0, 1, 1, 2])
    assert run(Backend.NUMPY, "total", x, mask, ids)[1:3].tolist() == [3.0, 3.0]
    assert run(Backend.NUMPY, "running_total", x, mask, ids)[1:3].tolist() == [1.0, 3.0]
    assert run(Backend.NUMPY, "discounted_future", x, mask, ids)[1:3].tolist() == [1.0 + 2.0 * GAMMA, 2.0]


def test_errors():
    ones = np.ones(3, dtype=bool)
    with pytest.raises(ValueError, match="mask: expected at least one axis, the tokens of a sequence, got a 0-d array"):
        Sequences(np.array(True), None, xp=np)  # noqa: FBT003 -- an array's value
    with pytest.raises(TypeError, match="segment_ids: expected an integral dtype"):
        Sequences(ones, np.zeros(3), xp=np)
    with pytest.raises(ValueError, match=r"segment_ids: expected the shape of mask, \(3,\), got \(2,\)"):
        Sequences(ones, np.zeros(2, dtype=int), xp=np)
    with pytest.raises(ValueError, match="segment_ids: expected None with `across`"):
        Sequences(ones, np.zeros(3, dtype=int), across=lambda array, _: array, xp=np)
    divided = Sequences(ones, None, across=lambda array, _: array, xp=np)
    for method in ("running_total", "smallest_before", "discounted_future"):
        with pytest.raises(ValueError, match="across: what depends on an order of the tokens needs the whole"):
            getattr(divided, method)(np.zeros(3), **ARGUMENTS.get(method, {}))


def test_segments_give_back_what_they_order():
    ids, x = np.array([3, 1, 3, 2, 1]), np.arange(5.0)
    segments = Segments(ids, xp=np)
    assert segments.ordered(x).tolist() == [1.0, 4.0, 3.0, 0.0, 2.0]
    assert segments.restored(segments.ordered(x)).tolist() == x.tolist()
    assert segments.whole(x, np.maximum).tolist() == [2.0, 4.0, 2.0, 3.0, 4.0]
