"""Group-relative advantages and their expansion: by hand, and against a loop over groups."""

import itertools
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import Backend

from drpo_core import expand_advantages, group_advantages
from drpo_core.advantages import (
    generalized_advantages,
    informative_groups,
    length_weighted_advantages,
    pass_at_k_advantages,
    reward_decoupled_advantages,
    whitened_advantages,
)

# eager JAX compiles every operation by itself: that is slow, and the same operations as under jit
NUMPY = [b for b in Backend if b.value.startswith("numpy")]
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


def test_a_nan_reward_is_named_or_spoils_its_group_only(backend):
    if backend in NUMPY:
        for call in (group_advantages, lambda r: length_weighted_advantages(r, np.ones((2, 2), int)), informative_groups):
            with pytest.raises(ValueError, match=r"^rewards: expected numbers, got nan at index \(0, 1\)$"):
                call(np.array([[0.0, np.nan], [1.0, 2.0]]))
        return
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
    with pytest.raises(TypeError, match=r"group_ids: expected an integral dtype, got .*float64"):
        backend.run(group_advantages, np.array([1.0, 0.0]), group_ids=np.array([0.0, 0.0]))
    with pytest.raises(ValueError, match=r"rewards: expected 1-D with group_ids, got shape \(2, 4\)"):
        backend.run(group_advantages, REWARDS, group_ids=np.zeros((2, 4), dtype=np.int64))


OPTIONS = [
    {"divide_by_std": std, "leave_one_out": loo, "std_offset": offset}
    for std, loo, offset in itertools.product([False, True], [False, True], [0.0, 1e-6, 0.5])
]


def loop(rewards, ids, *, divide_by_std, leave_one_out, std_offset):
    """One group after the other, in float64; a NaN or an infinity stays in its group."""
    rewards, result = np.asarray(rewards, float), np.zeros(len(rewards))
    for group in np.unique(ids):
        members = ids == group
        r, n = rewards[members], int(members.sum())
        if (r == r[0]).all():
            continue
        a = (r - r.mean()) * (n / (n - 1) if leave_one_out else 1.0)
        result[members] = a / (r.std(ddof=1) + std_offset) if divide_by_std else a
    return result


def groups(n, seed, dtype=np.int64):
    """Rewards of groups of every size, in random order, with ids from the whole range of a dtype; some groups are constant."""
    rng = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    names = rng.integers(info.min, info.max, max(2, n // 4), dtype=dtype, endpoint=True)
    names[:2] = info.min, info.max
    ids = rng.choice(names, n)
    rewards = rng.integers(-3, 4, n) * 0.25
    return np.where(ids == names[0], 0.75, rewards), ids


@pytest.mark.parametrize("n", [1, 2, 3, 8, 64])
def test_by_ids_as_one_group_after_the_other(backend, n):
    rewards, ids = groups(n, n)
    for options in OPTIONS[:: 1 if n < 10 else 3]:
        found = backend.run(group_advantages, rewards, group_ids=ids, **options)
        np.testing.assert_allclose(found, loop(rewards, ids, **options), rtol=1e-12, atol=1e-14, err_msg=str(options))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_group_ids_of_any_integer_dtype(dtype):
    rewards, ids = groups(60, 3, dtype)
    np.testing.assert_allclose(group_advantages(rewards, group_ids=ids), loop(rewards, ids, **OPTIONS[0]), atol=1e-14)


@pytest.mark.parametrize("by_ids", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sixteen_bits_hold_the_result_and_not_the_arithmetic(low_precision_backend, dtype, by_ids):
    """Rewards near 2000 have no room for their mean in 16 bits, nor sums of 300 of them (fault 14)."""
    backend, n = low_precision_backend, 300
    rng = np.random.default_rng(0)
    rewards = backend.asarray(2000.0 + 16.0 * rng.integers(0, 8, n), dtype)
    ids = np.arange(n) % 3
    exact = np.asarray(backend.to_numpy(rewards), float)
    epsilon = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 1e-5}[dtype]
    for options in OPTIONS:
        if by_ids:
            found = group_advantages(rewards, group_ids=backend.asarray(ids), **options)
        else:
            found = group_advantages(rewards.reshape(n // 3, 3).T, **options).T.reshape(-1)
        assert found.dtype == rewards.dtype
        expected = loop(exact, ids, **options)
        np.testing.assert_allclose(np.asarray(backend.to_numpy(found), float), expected, rtol=epsilon, atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_group_only(backend, bad):
    if backend in NUMPY and np.isnan(bad):
        pytest.skip("named by its index")
    rewards, ids = groups(50, 5)
    rewards[20] = bad
    spoilt = ids == ids[20]
    assert 1 < spoilt.sum() < 50
    for options in OPTIONS[::4]:
        with np.errstate(invalid="ignore"):
            found = backend.run(group_advantages, rewards, group_ids=ids, **options)
        np.testing.assert_allclose(found[~spoilt], loop(rewards[~spoilt], ids[~spoilt], **options), atol=1e-14)
        assert not np.isfinite(found[spoilt]).any()


def test_memory_grows_with_the_number_of_sequences_not_with_its_square():
    """52 GiB for 65,536 sequences it was (fault 27); it is some thirty arrays of their number."""
    n = 1 << 16
    rewards, ids = np.random.default_rng(0).normal(size=n), np.random.default_rng(1).integers(0, n // 8, n)
    tracemalloc.start()
    try:
        found = group_advantages(rewards, group_ids=ids, divide_by_std=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * rewards.nbytes
    of_one = ids == ids[0]
    expected = loop(rewards[of_one], ids[of_one], divide_by_std=True, leave_one_out=False, std_offset=1e-6)
    np.testing.assert_allclose(found[of_one], expected, rtol=1e-12)


def test_vmapped_and_compiled_by_jax():
    """A batch of batches, each with its own ids."""
    many = [groups(40, seed) for seed in range(5)]
    rewards, ids = (jnp.asarray(np.stack(column)) for column in zip(*many, strict=True))
    expected = [loop(*one, divide_by_std=True, leave_one_out=True, std_offset=0.5) for one in many]

    def advantages(rewards, ids):
        return group_advantages(rewards, group_ids=ids, divide_by_std=True, leave_one_out=True, std_offset=0.5)

    for transformed in (jax.vmap(advantages), jax.jit(jax.vmap(advantages))):
        np.testing.assert_allclose(transformed(rewards, ids), expected, rtol=1e-12, atol=1e-14)
    of_rows = jax.jit(jax.vmap(group_advantages))(rewards)
    np.testing.assert_allclose(of_rows, rewards - rewards.mean(axis=1, keepdims=True), atol=1e-14)


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


@pytest.mark.parametrize("wrong", [-1, -100, 2, 99])
@pytest.mark.parametrize("sequences", [0, 2])
def test_an_id_without_an_advantage_at_a_valid_token(backend, wrong, sequences):
    """−1 meant the last sequence (fault 26). NumPy says so; elsewhere, where values may be on a device, the token is NaN."""
    ids, mask = np.array([0, wrong, 0, 1]), np.array([sequences > 0, True, False, False])
    advantages = np.array([0.5, -0.25])[:sequences]
    if backend in {Backend.NUMPY, Backend.NUMPY_READ_ONLY}:
        message = rf"^segment_ids: expected ids in \[0, {sequences}\) at valid tokens, got {wrong} at index 1$"
        with pytest.raises(ValueError, match=message):
            backend.run(expand_advantages, advantages, mask, segment_ids=ids)
        return
    found = backend.run(expand_advantages, advantages, mask, segment_ids=ids)
    np.testing.assert_array_equal(found, [0.5 if sequences else 0.0, np.nan, 0.0, 0.0])


def test_without_sequences_and_without_tokens(backend):
    none, ids = np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int64)
    for count in (0, 2):
        assert backend.run(expand_advantages, np.ones(count), none, segment_ids=ids).shape == (0,)
    assert backend.run(expand_advantages, np.ones(0), np.zeros((0, 3), dtype=bool)).shape == (0, 3)
    masked = backend.run(expand_advantages, np.ones(0), np.zeros(3, dtype=bool), segment_ids=np.array([5, -1, 0]))
    assert masked.tolist() == [0.0, 0.0, 0.0]


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
        ({"segment_ids": np.zeros((2, 2))}, TypeError, "segment_ids: expected an integral dtype, got .*float64"),
        ({"segment_ids": np.array([0])}, ValueError, r"segment_ids: expected the shape of mask, \(2, 2\), got \(1,\)"),
    ],
)
def test_expand_errors(backend, changes, error, message):
    arguments = {"advantages": np.array([1.0, 2.0]), "mask": np.ones((2, 2), dtype=bool)} | changes
    with pytest.raises(error, match=message):
        backend.run(expand_advantages, **arguments)


def test_division_by_the_mean(backend):
    expected = [[0.0, -1.0, -1.0, 2.0], [0.0] * 4]
    np.testing.assert_allclose(backend.run(group_advantages, REWARDS, divide_by_mean=True), expected, rtol=1e-14)
    assert backend.run(group_advantages, np.zeros((1, 3)), divide_by_mean=True).tolist() == [[0.0] * 3]
    with pytest.raises(ValueError, match="divide_by_mean: expected False with divide_by_std"):
        group_advantages(REWARDS, divide_by_std=True, divide_by_mean=True)


def test_the_baseline_of_least_variance_weighs_by_length(backend):
    rng = np.random.default_rng(0)
    rewards, lengths, ids = rng.normal(size=60), rng.integers(0, 50, 60), rng.integers(-3, 4, 60)
    lengths[ids == 2] = 0
    expected = rewards.copy()
    for group in set(ids.tolist()):
        own = ids == group
        if lengths[own].sum():
            expected[own] -= np.average(rewards[own], weights=lengths[own])
    found = backend.run(length_weighted_advantages, rewards, lengths, group_ids=ids)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    rows = backend.run(length_weighted_advantages, rewards.reshape(10, 6), lengths.reshape(10, 6))
    assert rows.shape == (10, 6)
    np.testing.assert_allclose((rows * lengths.reshape(10, 6)).sum(-1), 0.0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.value, indirect=True)
def test_each_reward_is_normalised_in_its_group_by_itself(backend):
    """GDPO: one group and one reward after the other; a reward without spread adds nothing."""
    rewards, ids = groups(24, 4)
    several = np.stack([rewards, 100.0 * np.cos(np.arange(24.0)), np.where(ids == ids[0], 7.0, rewards)], axis=-1)
    options = {"divide_by_std": True, "leave_one_out": False, "std_offset": 0.1}
    for weights in ((1.0, 0.5, -2.0), None):
        parts = [loop(several[:, i], ids, **options) * (1.0 if weights is None else weights[i]) for i in range(3)]
        found = backend.run(reward_decoupled_advantages, several, weights=weights, group_ids=ids, std_offset=0.1)
        np.testing.assert_allclose(found, sum(parts), rtol=1e-12, atol=1e-13)
        if backend is Backend.JAX_JIT:
            return  # each choice is compiled
    rows = backend.run(reward_decoupled_advantages, several.reshape(4, 6, 3), divide_by_std=False)
    total = several.sum(-1).reshape(4, 6)
    np.testing.assert_allclose(rows, total - total.mean(-1, keepdims=True), atol=1e-12)
    with pytest.raises(ValueError, match="weights: expected 3, one for each reward, got 2"):
        backend.run(reward_decoupled_advantages, several, weights=(1.0, 2.0), group_ids=ids)
    with pytest.raises(ValueError, match=r"rewards: expected \(…, samples, rewards\), got shape \(24,\)"):
        backend.run(reward_decoupled_advantages, rewards)


def marginal_gains(rewards, k):
    """Mean over all subsets of k − 1 others of what a sample adds to the best of them."""
    gains = []
    for i, own in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j != i]
        best = [max(subset) for subset in itertools.combinations(others, min(k, len(rewards)) - 1) if subset]
        gains.append(math.fsum(max(own, b) - b for b in best) / max(len(best), 1))
    return gains


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.value, indirect=True)
def test_what_a_sample_adds_to_the_best_of_k(backend):
    """Groups of one, of fewer than k and of more, with ties, in any order, against every subset."""
    rewards, ids = groups(18, 1)
    rewards[3] = 100.25
    for k in (3, 2, 8):
        expected = np.zeros(18)
        for group in set(ids.tolist()):
            expected[ids == group] = marginal_gains(rewards[ids == group].tolist(), k)
        found = backend.run(pass_at_k_advantages, rewards, k=k, group_ids=ids)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
        assert (found >= 0.0).all()
        if backend is Backend.JAX_JIT:
            return  # each k is compiled
    rows = backend.run(pass_at_k_advantages, REWARDS, k=3, divide_by_std=True, std_offset=0.5)
    np.testing.assert_allclose(rows, [np.divide(marginal_gains(REWARDS[0], 3), STD + 0.5), [0.0] * 4], rtol=1e-12)
    assert backend.run(pass_at_k_advantages, np.ones((1, 3)), k=2, divide_by_std=True, std_offset=0.0).tolist() == [[0.0] * 3]


def test_the_best_of_k_is_climbed_without_bias():
    """Over all samples of n: E[(k/n) Σ A ∇log π] is ∇E[max of k], of a softmax over four rewards; k = n gives the lead."""
    values, n, k = np.array([0.0, 1.0, 1.0, 3.5]), 4, 3
    p = np.array([0.4, 0.3, 0.2, 0.1])

    def mean_of_best(p):
        return math.fsum(
            math.prod(p[i] for i in draw) * max(values[i] for i in draw) for draw in itertools.product(range(4), repeat=k)
        )

    draws = np.array(list(itertools.product(range(4), repeat=n)))
    a = pass_at_k_advantages(values[draws], k=k)
    scores = np.eye(4)[draws] - p
    found = np.einsum("d,di,dij->j", p[draws].prod(-1), a, scores) * k / n
    h = 1e-5
    moved = [[np.exp(sign * h * np.eye(4)[j]) * p for sign in (1, -1)] for j in range(4)]
    exact = [(mean_of_best(up / up.sum()) - mean_of_best(down / down.sum())) / (2 * h) for up, down in moved]
    np.testing.assert_allclose(found, exact, rtol=1e-8)
    lead = pass_at_k_advantages(np.array([[1.0, 4.0, -1.0, 2.5]]), k=4)
    assert lead.tolist() == [[0.0, 1.5, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 1}, ValueError, "k: expected a finite number, 2 or more, got 1"),
        ({"k": 2.0}, TypeError, "k: expected a whole number, got float 2.0"),
        ({"k": 2, "std_offset": -1.0}, ValueError, "std_offset: expected a finite number, 0 or more, got -1.0"),
        ({"k": 2, "group_ids": IDS}, ValueError, r"group_ids: expected the shape of rewards, \(2, 4\), got \(8,\)"),
    ],
)
def test_errors_of_the_best_of_k(options, error, message):
    with pytest.raises(error, match=message):
        pass_at_k_advantages(REWARDS, **options)


def test_advantages_of_no_rewards_and_of_sixteen_bits():
    assert pass_at_k_advantages(np.zeros((0, 4)), k=2).shape == (0, 4)
    assert reward_decoupled_advantages(np.zeros((0, 4, 2))).shape == (0, 4)
    assert reward_decoupled_advantages(np.zeros((3, 4, 0))).tolist() == [[0.0] * 4] * 3
    half = np.float16([[2000.0, 1.0, 2.0]])
    assert pass_at_k_advantages(half, k=2).dtype == reward_decoupled_advantages(half[..., None]).dtype == np.float16


def test_whitening_is_over_valid_tokens(backend):
    rng = np.random.default_rng(1)
    a, mask = 1e3 + rng.normal(size=(7, 9)), rng.random((7, 9)) < 0.6
    found = backend.run(whitened_advantages, np.where(mask, a, np.nan), mask, std_offset=0.0)
    np.testing.assert_allclose(found[mask], (a[mask] - a[mask].mean()) / a[mask].std(ddof=1), rtol=1e-9)
    assert (found[~mask] == 0.0).all()
    for constant, some in (
        (np.full(3, 0.1), np.ones(3, bool)),
        (np.ones(3), np.zeros(3, bool)),
        (np.zeros(0), np.zeros(0, bool)),
    ):
        assert backend.run(whitened_advantages, constant, some).tolist() == [0.0] * constant.size


@pytest.mark.parametrize("decay", [0.0, 0.95, 1.0, "row"])
def test_generalised_advantages_against_the_recurrence(backend, decay):
    rng = np.random.default_rng(2)
    rewards, values = rng.normal(size=(2, 5, 11))
    mask = rng.random((5, 11)) < 0.6
    mask[2] = False
    decays = rng.random((5, 1)) if decay == "row" else np.full((5, 1), decay)
    expected = np.zeros((5, 11))
    for row in range(5):
        after = value_after = 0.0
        for t in reversed(np.flatnonzero(mask[row])):
            delta = rewards[row, t] + 0.9 * value_after - values[row, t]
            after = expected[row, t] = delta + 0.9 * decays[row, 0] * after
            value_after = values[row, t]
    spoilt = [np.where(mask, array, np.nan) for array in (rewards, values)]
    arrays = {"trace_decay": decays} if decay == "row" else {}
    numbers = {} if decay == "row" else {"trace_decay": decay}
    found = backend.run(generalized_advantages, *spoilt, mask, discount=0.9, **arrays, **numbers)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_groups_that_teach_nothing_are_removed_and_counted(backend):
    rewards = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.1], [0.9, 1.0, 1.0]])
    for options, expected in (({}, [1, 0, 1, 1]), ({"low": 0.1, "high": 0.9}, [1, 0, 0, 0])):
        found = informative_groups(backend.asarray(rewards), **options)
        assert np.asarray(found.kept).tolist() == [[bool(kept)] * 3 for kept in expected]
        assert (int(found.groups_kept), int(found.groups_removed)) == (sum(expected), 4 - sum(expected))
    assert int(informative_groups(np.zeros((0, 3))).groups_kept) == 0
    with pytest.raises(ValueError, match=r"rewards: expected \(groups, samples\), got shape \(3,\)"):
        informative_groups(np.zeros(3))


def assert_refused_or_nan(backend, spoilt, message, function, *arrays, **options):
    """NumPy names a wrong value by its index; elsewhere, where it may be on a device, it spoils its group or row alone."""
    if backend in NUMPY:
        with pytest.raises(ValueError, match=message):
            backend.run(function, *arrays, **options)
        return
    found = backend.run(function, *arrays, **options)
    np.testing.assert_array_equal(np.isnan(found).any(axis=-1), spoilt)


ROWS = np.array([[1.0, 0.0, 3.0], [2.0, -8.0, 1.0]])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.value, indirect=True)
def test_numbers_outside_their_range_are_refused_or_nan(backend):
    """A negative mean turned every sign around, a negative length weighed a reward away, a λ of 1.5 grew without end."""
    spoilt = [False, True]
    message = r"^rewards: expected 0 or more with divide_by_mean, got -8\.0 at index \(1, 1\)$"
    assert_refused_or_nan(backend, spoilt, message, group_advantages, ROWS, divide_by_mean=True)
    lengths = np.array([[1, 0, 3], [1, -1, 3]])
    message = r"^lengths: expected 0 or more, got -1 at index \(1, 1\)$"
    assert_refused_or_nan(backend, spoilt, message, length_weighted_advantages, ROWS, lengths)
    mask = np.ones(ROWS.shape, dtype=bool)
    for wrong in (1.5, -0.1, np.nan):
        decay = {"trace_decay": np.array([[0.5], [wrong]])}
        message = rf"^trace_decay: expected a number in \[0, 1\], got {wrong} at index \(1, 0\)$"
        assert_refused_or_nan(backend, spoilt, message, generalized_advantages, ROWS, ROWS, mask, **decay)


@pytest.mark.parametrize(
    ("function", "arrays", "options", "message"),
    [
        (
            generalized_advantages,
            (),
            {"discount": 1.1},
            r"discount: expected a finite number, 0 or more and at most 1, got 1\.1",
        ),
        (
            generalized_advantages,
            (),
            {"trace_decay": 2},
            "trace_decay: expected a finite number, 0 or more and at most 1, got 2",
        ),
        (
            generalized_advantages,
            (),
            {"trace_decay": np.ones(2)},
            r"trace_decay: expected a number, or one a row, shape \(2, 1\), got shape \(2,\)",
        ),
        (generalized_advantages, (), {"trace_decay": np.ones((2, 1), int)}, "trace_decay: expected a real floating dtype"),
        (
            generalized_advantages,
            (np.ones(()), np.ones(()), np.ones((), dtype=bool)),
            {},
            "rewards: expected at least one axis, the tokens",
        ),
        (
            reward_decoupled_advantages,
            (ROWS,),
            {"weights": 1.0},
            "weights: expected 3 numbers, one for each reward, got float",
        ),
        (informative_groups, (np.zeros((0, 3)),), {"low": "0"}, "low: expected a real number, got str"),
    ],
)
def test_wrong_options_are_named(function, arrays, options, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        function(*(arrays or (ROWS, ROWS, np.ones(ROWS.shape, dtype=bool))), **options)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.value, indirect=True)
def test_equal_rewards_have_no_advantage_whatever_the_lengths(backend):
    """Σ T R / Σ T rounds: 1e-8 of noise in float32, which a whitening would make an advantage of size 1."""
    rewards, lengths = np.full((2, 3), np.float32(0.1)), np.array([[1, 2, 4], [0, 0, 0]])
    assert (backend.run(length_weighted_advantages, rewards, lengths) == 0.0).all()
