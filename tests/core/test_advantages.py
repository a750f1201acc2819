"""Group-relative advantages and their expansion, by hand."""

import math

import numpy as np
import pytest
from backends import Backend

from drpo_core import expand_advantages, group_advantages

# eager JAX compiles every operation by itself: that is slow, and the same operations as under jit
BACKENDS = [b for b in Backend if b is not Backend.JAX]

REWARDS = np.array([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])  # means 1 and 2
STD = math.sqrt((0 + 1 + 1 + 4) / 3)  # of the first group, n − 1 = 3
IDS = np.array([5, 5, 5, 5, -1, -1, -1, -1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.0, -1.0, -1.0, 2.0]),
        # the mean of the other three: 3/3, 4/3, 4/3, 1/3
        ({"leave_one_out": True}, [1 - 3 / 3, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3]),
        ({"divide_by_std": True, "std_offset": 0.0}, [0.0, -1 / STD, -1 / STD, 2 / STD]),
        ({"divide_by_std": True, "std_offset": 0.5}, [0.0, -1 / (STD + 0.5), -1 / (STD + 0.5), 2 / (STD + 0.5)]),
        ({"divide_by_std": True}, [0.0, -1 / (STD + 1e-6), -1 / (STD + 1e-6), 2 / (STD + 1e-6)]),
    ],
    ids=["mean", "leave one out", "std", "std with offset", "std with the default offset"],
)
def test_by_hand_in_rows_and_by_ids(backend, options, expected):
    expected = [expected, [0.0] * 4]
    rows = backend.run(group_advantages, REWARDS, **options)
    np.testing.assert_allclose(rows, expected, rtol=1e-14, atol=1e-16)
    by_ids = backend.run(group_advantages, np.reshape(REWARDS, -1), group_ids=IDS, **options)
    np.testing.assert_allclose(by_ids, np.ravel(expected), rtol=1e-14, atol=1e-16)


def test_groups_of_different_sizes_in_any_order(backend):
    rewards = np.array([1.0, 10.0, 0.0, 4.0, 2.0])
    ids = np.array([3, 8, 3, -2, 3])
    expected = [1.0 - 1.0, 0.0, 0.0 - 1.0, 0.0, 2.0 - 1.0]  # 8 and −2 are groups of one
    np.testing.assert_allclose(backend.run(group_advantages, rewards, group_ids=ids), expected, rtol=1e-15)
    std = backend.run(group_advantages, rewards, group_ids=ids, divide_by_std=True, std_offset=0.0)
    np.testing.assert_allclose(std, [0.0, 0.0, -1.0, 0.0, 1.0], rtol=1e-15)
    loo = backend.run(group_advantages, rewards, group_ids=ids, leave_one_out=True)
    np.testing.assert_allclose(loo, [1 - 2 / 2, 0.0, 0 - 3 / 2, 0.0, 2 - 1 / 2], rtol=1e-15)


def test_equal_rewards_whose_mean_rounds_are_exactly_zero(backend):
    """3 × 0.1 / 3 ≠ 0.1 in floating point; divided by a spread of 1e-17 that would be an advantage of size 1."""
    rewards = np.full((1, 3), 0.1)
    assert rewards[0].sum() / 3 != 0.1
    assert (backend.run(group_advantages, rewards, divide_by_std=True, std_offset=0.0) == 0.0).all()
    assert (backend.run(group_advantages, np.array([[7.0]]), divide_by_std=True, leave_one_out=True) == 0.0).all()


def test_groups_do_not_mix_when_the_batch_is_square(backend):
    rewards = np.array([[0.0, 2.0], [10.0, 30.0]])
    assert backend.run(group_advantages, rewards).tolist() == [[-1.0, 1.0], [-10.0, 10.0]]


def test_an_infinite_reward_stays_in_its_group(backend):
    rewards = np.array([np.inf, 1.0, 0.0, 2.0])
    with np.errstate(invalid="ignore"):
        result = backend.run(group_advantages, rewards, group_ids=np.array([0, 0, 1, 1]))
    assert not np.isfinite(result[:2]).any()
    assert result[2:].tolist() == [-1.0, 1.0]


def test_a_nan_reward_spoils_its_group_only(backend):
    result = backend.run(group_advantages, np.array([np.nan, 1.0, 0.0, 2.0]), group_ids=np.array([0, 0, 1, 1]))
    assert np.isnan(result[:2]).all()
    assert result[2:].tolist() == [-1.0, 1.0]


def test_dtype_and_shape_are_kept(backend):
    rewards = np.ones((2, 1, 3), dtype=np.float32)
    result = backend.run(group_advantages, rewards)
    assert result.dtype == np.float32
    assert result.shape == (2, 1, 3)
    assert backend.run(group_advantages, rewards[0, 0], group_ids=np.array([0, 0, 1])).dtype == np.float32


def test_no_rewards_give_no_advantages(backend):
    assert backend.run(group_advantages, np.zeros(0), group_ids=np.zeros(0, dtype=np.int64)).shape == (0,)
    assert backend.run(group_advantages, np.zeros((0, 4))).shape == (0, 4)


def test_group_errors(backend):
    with pytest.raises(TypeError, match=r"rewards: expected a real floating dtype, got .*int64"):
        backend.run(group_advantages, np.array([1, 0]))
    with pytest.raises(ValueError, match=r"(?m)^rewards: expected at least one axis, got a 0-d array$"):
        backend.run(group_advantages, np.array(1.0))
    with pytest.raises(ValueError, match=r"group_ids: expected the shape of rewards, \(2,\), got \(1,\)"):
        backend.run(group_advantages, np.array([1.0, 0.0]), group_ids=np.array([0]))
    with pytest.raises(TypeError, match=r"group_ids: expected a integral dtype, got .*float64"):
        backend.run(group_advantages, np.array([1.0, 0.0]), group_ids=np.array([0.0, 0.0]))
    with pytest.raises(ValueError, match=r"rewards: expected 1-D with group_ids, got shape \(2, 4\)"):
        backend.run(group_advantages, REWARDS, group_ids=np.zeros((2, 4), dtype=np.int64))


def test_expand_padded(backend):
    mask = np.array([[True, True, False], [False, True, False]])
    result = backend.run(expand_advantages, np.array([0.5, -0.25]), mask)
    assert result.tolist() == [[0.5, 0.5, 0.0], [0.0, -0.25, 0.0]]


def test_expand_packed(backend):
    ids, mask = np.array([1, 0, 1, 1]), np.array([True, True, False, True])
    result = backend.run(expand_advantages, np.array([0.5, -0.25]), mask, segment_ids=ids)
    assert result.tolist() == [-0.25, 0.5, 0.0, -0.25]


def test_what_a_masked_segment_id_says_does_not_matter(backend):
    ids, mask = np.array([1, 99, -7]), np.array([True, False, False])
    result = backend.run(expand_advantages, np.array([0.5, -0.25]), mask, segment_ids=ids)
    assert result.tolist() == [-0.25, 0.0, 0.0]
    assert backend.run(expand_advantages, np.array([0.5]), mask, segment_ids=ids - 1).tolist() == [0.5, 0.0, 0.0]


def test_a_square_batch_is_expanded_along_tokens(backend):
    result = backend.run(expand_advantages, np.array([1.0, 2.0]), np.ones((2, 2), dtype=bool))
    assert result.tolist() == [[1.0, 1.0], [2.0, 2.0]]


def test_expansion_keeps_the_advantages_dtype(backend):
    mask = np.ones((1, 2), dtype=bool)
    assert backend.run(expand_advantages, np.array([1.0], dtype=np.float32), mask).dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"mask": np.ones((3, 2), dtype=bool)},
            ValueError,
            r"mask: expected \(2, tokens\), one row per advantage, got \(3, 2\)",
        ),
        ({"mask": np.ones(2, dtype=bool)}, ValueError, r"mask: expected \(2, tokens\), one row per advantage, got \(2,\)"),
        ({"mask": np.ones((2, 2))}, TypeError, "mask: expected a bool dtype, got .*float64"),
        ({"advantages": np.ones((2, 1))}, ValueError, r"advantages: expected one per sequence, 1-D, got shape \(2, 1\)"),
        ({"advantages": np.array([1, 2])}, TypeError, "advantages: expected a real floating dtype, got .*int64"),
        (
            {"segment_ids": np.zeros((2, 2), dtype=np.int64)},
            ValueError,
            r"segment_ids: expected packed 1-D tokens, got shape \(2, 2\); padded rows need none",
        ),
        ({"segment_ids": np.zeros((2, 2))}, TypeError, "segment_ids: expected a integral dtype, got .*float64"),
        ({"segment_ids": np.array([0])}, ValueError, r"segment_ids: expected the shape of mask, \(2, 2\), got \(1,\)"),
    ],
)
def test_expand_errors(backend, changes, error, message):
    arguments = {"advantages": np.array([1.0, 2.0]), "mask": np.ones((2, 2), dtype=bool)} | changes
    with pytest.raises(error, match=message):
        backend.run(expand_advantages, **arguments)
