"""Every correction against its scalar oracle, and what all of them promise."""

import dataclasses
import json
import math

import numpy as np
import pytest
from backends import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from mode_oracles import (
    CORRECTIONS,
    arguments_for,
    batch,
    examples_of,
    made_by,
    packed,
    quiet,
    reduced_over,
    sequences,
    spoilt,
    spread_out,
)

from drpo_core import corrections, policy_loss_and_gradient, summarize, token_loss_and_gradient
from drpo_core._sequences import Sequences
from drpo_core.anchors import Policies
from drpo_core.corrections import (
    ClippedGeometricRatio,
    DivergenceMask,
    Evidence,
    FutureRatio,
    ImportanceWeight,
    LengthScale,
    MinimumPrefixRatio,
    NegativeSequenceMask,
    OutwardMask,
    PrefixBudgetMask,
    RatioMask,
    SecondMomentMask,
    SequenceTrustMask,
    VariationalWeight,
    Veto,
    clip_cov_weights,
)

EXAMPLES = examples_of(corrections)
ONE_OF_EACH = list({type(example): example for example in reversed(EXAMPLES)}.values())
OF_A_BATCH = [ImportanceWeight(high=1.5, normalize=True), SecondMomentMask(tau=0.2)]
"""They look at all valid tokens of a call."""
IN_ORDER = (MinimumPrefixRatio, FutureRatio, PrefixBudgetMask)
"""They look at the tokens before or after each one."""
each = pytest.mark.parametrize("kind", CORRECTIONS, ids=lambda kind: kind.__name__)
FUZZ = settings(max_examples=60, derandomize=True, deadline=None)


def factor(backend, correction, arrays):
    """K per token, 0 at masked tokens."""
    mode = quiet(correction)
    arrays = arguments_for(mode, arrays)
    names = ("log_prob", "behavior_log_prob", "advantages")
    options = {name: array for name, array in arrays.items() if name not in names}
    return backend.run(token_loss_and_gradient, mode, *(arrays[name] for name in names), **options).weight


def expected(correction, arrays):
    return spread_out(CORRECTIONS[type(correction)](correction, sequences(arrays)), arrays["mask"])


def skip_scans_on_eager_jax(backend, kind):
    if backend is Backend.JAX and kind in IN_ORDER:
        pytest.skip("the same operations as under jit, each compiled for each shape")


def test_every_public_correction_has_an_oracle_and_an_example():
    assert made_by(corrections, "factor") == set(CORRECTIONS) == {type(example) for example in EXAMPLES}


@each
def test_padded_and_packed(backend, kind):
    """Masked tokens hold NaN and infinities; packed sequences are interleaved."""
    examples = [example for example in EXAMPLES if type(example) is kind]
    skip_scans_on_eager_jax(backend, kind)
    if backend in {Backend.JAX, Backend.JAX_JIT}:
        # each is compiled, and scans take longest
        examples = examples[:: max(1, len(examples) // (2 if kind in IN_ORDER else 4))]
    elif backend is not Backend.NUMPY:
        examples = examples[::2]
    for seed, correction in enumerate(examples):
        arrays = batch(seed=seed % 7)
        wanted = expected(correction, arrays)
        np.testing.assert_allclose(
            factor(backend, correction, arrays), wanted, rtol=1e-12, atol=1e-300, err_msg=str(correction)
        )
        flat, places = packed(arrays, seed=seed)
        np.testing.assert_allclose(
            factor(backend, correction, flat), wanted[places], rtol=1e-12, atol=1e-300, err_msg=str(correction)
        )


@each
def test_the_example_separates_tokens(kind):
    """Of each class some example gives different factors to different tokens, or the tests above would show little."""
    found = [np.unique(expected(e, batch(seed=1))[batch(seed=1)["mask"]].round(9)) for e in EXAMPLES if type(e) is kind]
    assert max(map(len, found)) > 1


@each
def test_packed_without_masked_tokens(kind):
    """All but the discount of `FutureRatio`, which counts places, see valid tokens only."""
    if kind is FutureRatio:
        return
    for correction in (example for example in EXAMPLES if type(example) is kind):
        flat, places = packed(batch(seed=3))
        mask = flat["mask"]
        wanted = expected(correction, batch(seed=3))[places][mask]
        short = {name: array[mask] for name, array in flat.items()}
        np.testing.assert_allclose(factor(Backend.NUMPY, correction, short), wanted, rtol=1e-12, err_msg=str(correction))


@pytest.mark.parametrize("backend", [b for b in Backend if b is not Backend.JAX], ids=lambda b: b.value)  # it has jit
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (3, 4), (1, 1)], ids=str)
@each
def test_nothing_or_one_token(backend, kind, shape):
    skip_scans_on_eager_jax(backend, kind)
    correction = next(example for example in EXAMPLES if type(example) is kind)
    arrays = batch(shape, seed=4)
    if shape != (1, 1):
        arrays["mask"] = np.zeros(shape, dtype=bool)
    arrays = spoilt(arrays)
    assert (factor(backend, correction, arrays) == expected(correction, arrays)).all() or shape == (1, 1)
    flat, places = packed(arrays)
    np.testing.assert_allclose(factor(backend, correction, flat), expected(correction, arrays)[places], rtol=1e-12)


# a weight that counts no ratio; and a mask whose bound is of the tokens that are left
NO_MASK_OF_ITS_OWN = (FutureRatio, SecondMomentMask)
MASKS = [e for e in EXAMPLES if e.counts is None and not isinstance(e, NO_MASK_OF_ITS_OWN)]


@pytest.mark.parametrize("correction", MASKS, ids=str)
def test_a_mask_keeps_nothing_more_for_a_nan(correction):
    """What is dropped stays so when any one of the ratios of its sequence becomes a NaN."""
    for seed in range(3):
        arrays = batch(seed=seed)
        clean = factor(Backend.NUMPY, correction, arrays)
        for place in zip(*np.nonzero(arrays["mask"]), strict=True):
            spoilt_by = arrays | {}
            for name in ("behavior_log_prob", "proximal_log_prob"):
                spoilt_by[name] = arrays[name].copy()
                spoilt_by[name][place] = np.nan
            found = factor(Backend.NUMPY, correction, spoilt_by)
            assert not (found[place[0]] > clean[place[0]]).any()


@pytest.mark.parametrize("correction", ONE_OF_EACH + OF_A_BATCH, ids=str)
def test_padding_changes_nothing(correction):
    arrays = batch(seed=5)
    found = factor(Backend.NUMPY, correction, arrays)
    wider = {name: np.concatenate([a, np.zeros_like(a)], axis=1) for name, a in arrays.items()}
    taller = {name: np.concatenate([a, np.zeros_like(a)]) for name, a in arrays.items()}
    before = {name: np.concatenate([np.zeros_like(a), a], axis=1) for name, a in arrays.items()}
    width = arrays["mask"].shape[1]
    np.testing.assert_allclose(factor(Backend.NUMPY, correction, wider)[:, :width], found, rtol=1e-12)
    np.testing.assert_allclose(factor(Backend.NUMPY, correction, taller)[: len(found)], found, rtol=1e-12)
    np.testing.assert_allclose(factor(Backend.NUMPY, correction, before)[:, width:], found, rtol=1e-12)


@pytest.mark.parametrize("correction", ONE_OF_EACH + OF_A_BATCH, ids=str)
def test_sequences_come_in_any_order_and_do_not_know_each_other(correction):
    arrays = batch(seed=6)
    found = factor(Backend.NUMPY, correction, arrays)
    order = np.random.default_rng(0).permutation(len(found))
    moved = factor(Backend.NUMPY, correction, {name: a[order] for name, a in arrays.items()})
    np.testing.assert_allclose(moved, found[order], rtol=1e-12)
    if correction not in OF_A_BATCH and not isinstance(correction, SecondMomentMask):
        parts = [
            factor(Backend.NUMPY, correction, {n: a[rows] for n, a in arrays.items()}) for rows in (slice(2), slice(2, None))
        ]
        np.testing.assert_allclose(np.concatenate(parts), found, rtol=1e-12)


@pytest.mark.parametrize("correction", [e for e in ONE_OF_EACH if not isinstance(e, IN_ORDER)], ids=str)
def test_the_order_within_a_sequence_does_not_matter(correction):
    """But to what looks at earlier or later tokens."""
    arrays = batch(seed=7)
    order = np.random.default_rng(1).permutation(arrays["mask"].shape[1])
    moved = factor(Backend.NUMPY, correction, {name: a[:, order] for name, a in arrays.items()})
    np.testing.assert_allclose(moved, factor(Backend.NUMPY, correction, arrays)[:, order], rtol=1e-12)


@pytest.mark.parametrize("correction", EXAMPLES, ids=str)
def test_where_the_policies_agree_nothing_is_corrected(correction):
    """K = 1 at ρ = 1; the length is one, and VESPO's weight is e^λ e^−λ = 1 too."""
    arrays = batch(seed=8)
    arrays |= dict.fromkeys(("log_prob", "proximal_log_prob"), arrays["behavior_log_prob"])
    found = factor(Backend.NUMPY, correction, arrays)
    wanted = arrays["mask"].sum(axis=1, keepdims=True) if isinstance(correction, LengthScale) else 1.0
    np.testing.assert_allclose(found, np.where(arrays["mask"], wanted, 0.0), rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("nats", [1e4, -1e4, -np.inf])
@pytest.mark.parametrize("tokens", ["one", "all"])
@each
def test_extreme_log_ratios_stay_finite(kind, nats, tokens, dtype):
    for correction in (example for example in EXAMPLES if type(example) is kind):
        arrays = batch((3, 32), seed=9)
        for one, other in (
            ("log_prob", "behavior_log_prob"),
            ("proximal_log_prob", "log_prob"),
            ("log_prob", "proximal_log_prob"),
        ):
            extreme = {n: a if n == "mask" else np.where(arrays["mask"], a, -1.0).astype(dtype) for n, a in arrays.items()}
            where = np.s_[:] if tokens == "all" else np.s_[:, 3]
            # nats > 0: the other policy is far below the first
            changed = other if nats > 0 else one
            extreme[changed] = extreme[changed].copy()
            extreme[changed][where] -= dtype(abs(nats))
            found = factor(Backend.NUMPY, correction, spoilt(extreme))
            assert found.dtype == dtype
            assert np.isfinite(found).all(), correction
            assert (found >= 0.0).all(), correction


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@each
def test_long_sequences(kind, dtype):
    """32,768 tokens a sequence: sums of logarithms neither overflow nor lose the mean."""
    correction = next(example for example in EXAMPLES if type(example) is kind)
    arrays = {name: a if name == "mask" else a.astype(dtype) for name, a in batch((2, 32_768), seed=10, spread=0.02).items()}
    for nats in (0.0, 100.0):
        far = arrays | {"log_prob": arrays["log_prob"] - dtype(nats)}
        found = factor(Backend.NUMPY, correction, far)
        flat = factor(
            Backend.NUMPY,
            correction,
            {name: a.ravel() for name, a in far.items()} | {"segment_ids": np.arange(65_536) // 32_768},
        )
        assert np.isfinite(found).all()
        np.testing.assert_allclose(flat.reshape(found.shape), found, rtol=1e-3 if dtype is np.float32 else 1e-9)


def test_the_mean_of_a_long_sequence_in_float32():
    """The geometric mean of 32,768 ratios to 1e-6: bands of a thousandth are what it is compared with."""
    rng = np.random.default_rng(0)
    ell = rng.normal(1e-3, 0.05, (2, 32_768)).astype(np.float32)
    mask = np.ones(ell.shape, dtype=bool)
    wanted = ell.astype(np.float64).mean(axis=1)
    for x, m, ids in ((ell, mask, None), (ell.ravel(), mask.ravel(), np.repeat([4, 2], 32_768))):
        found = Sequences(m, ids, xp=np).mean(x)
        np.testing.assert_allclose(np.asarray(found).reshape(2, -1)[:, 0], wanted, atol=1e-7)


# --- classes, one by one -------------------------------------------------------------------------------------------------


def rows(*log_ratios, advantages=1.0):
    """Rows of ℓ = log π_old − log μ = log π − log μ, with μ = e^−5."""
    width = max(map(len, log_ratios))
    ell = np.array([[*row, *[0.0] * (width - len(row))] for row in log_ratios])
    mask = np.array([[i < len(row) for i in range(width)] for row in log_ratios])
    behavior = np.full(ell.shape, -5.0)
    x = behavior + ell
    ones = np.ones(ell.shape)
    return {
        "log_prob": x,
        "proximal_log_prob": x,
        "behavior_log_prob": behavior,
        "advantages": ones * advantages,
        "mask": mask,
    }


def by_hand(correction, *log_ratios, advantages=1.0):
    arrays = rows(*log_ratios, advantages=np.asarray(advantages))
    found = factor(Backend.NUMPY, correction, arrays)
    return [row[valid].round(9).tolist() for row, valid in zip(found, arrays["mask"], strict=True)]


LOG2, LOG3 = math.log(2.0), math.log(3.0)


def test_by_hand():
    two = ([LOG2, LOG2, -LOG3], [LOG3])
    assert by_hand(ImportanceWeight(), *two) == [[2.0, 2.0, round(1 / 3, 9)], [3.0]]
    assert by_hand(ImportanceWeight(high=2.5), *two)[1] == [2.5]
    assert by_hand(ImportanceWeight(low=0.5), *two)[0] == [2.0, 2.0, 0.5]
    assert by_hand(ImportanceWeight(low=0.5, high=2.5, outside="zero"), *two) == [[2.0, 2.0, 0.0], [0.0]]
    assert by_hand(ImportanceWeight(level="sequence"), *two) == [[round(4 / 3, 9)] * 3, [3.0]]
    assert by_hand(ImportanceWeight(level="geometric"), *two) == [[round((4 / 3) ** (1 / 3), 9)] * 3, [3.0]]
    # sequences of any length count once
    assert by_hand(ImportanceWeight(level="sequence", normalize=True), [LOG2, 0.0, 0.0], [0.0]) == [
        [round(4 / 3, 9)] * 3,
        [round(2 / 3, 9)],
    ]
    assert by_hand(ImportanceWeight(normalize=True), [LOG2, 0.0], [0.0]) == [[1.5, 0.75], [0.75]]
    assert by_hand(RatioMask(low=0.5, high=2.5), *two) == [[1.0, 1.0, 0.0], [0.0]]
    assert by_hand(RatioMask(low=1.0, high=1.2, level="geometric"), *two) == [[1.0, 1.0, 1.0], [0.0]]
    assert by_hand(Veto(low=0.5, high=4.0), *two) == [[0.0, 0.0, 0.0], [1.0]]
    assert by_hand(DivergenceMask(estimator="k2", high=0.5, over="max"), *two) == [[0.0, 0.0, 0.0], [0.0]]
    assert by_hand(DivergenceMask(estimator="k2", high=0.5, over="mean"), *two) == [[1.0, 1.0, 1.0], [0.0]]
    clipped = ClippedGeometricRatio(edge="policy/behavior", eps_low=0.5, eps_high=0.5)
    # (½ + ½ − log 3)/3, and ½
    assert by_hand(clipped, *two) == [[round(math.exp((1.0 - LOG3) / 3), 9)] * 3, [round(math.exp(0.5), 9)]]
    assert by_hand(clipped, *two, advantages=-1.0) == [[round(math.exp((2 * LOG2 - 0.5) / 3), 9)] * 3, [3.0]]
    assert by_hand(LengthScale(), *two) == [[3.0, 3.0, 3.0], [1.0]]
    assert by_hand(MinimumPrefixRatio(), *two) == [[1.0, 2.0, 2.0], [1.0]]
    assert by_hand(MinimumPrefixRatio(), [-LOG2, LOG2, -LOG3, 0.0])[0] == [1.0, 0.5, 0.5, round(1 / 3, 9)]
    future = FutureRatio(delta=2.5, half_life=1.0, low=1e-3, high=10.0)
    assert by_hand(future, [LOG2, 2 * LOG2, LOG2])[0] == [round(2.0**1.25, 9), round(2.0**0.5, 9), 2.0]
    assert by_hand(VariationalWeight(), [LOG2])[0] == [round(math.exp(3) * 4 * math.exp(-6), 9)]
    assert by_hand(VariationalWeight(), [LOG2], advantages=-1.0)[0] == [round(math.exp(2) * 8 * math.exp(-4), 9)]


def test_negative_advantages_alone_are_masked():
    """OPSM: the sequence's mean of log μ − log π is log 2; A = 0 is not negative."""
    signs = [[-1.0, 1.0, 0.0]]
    assert by_hand(NegativeSequenceMask(delta=0.5), [-LOG2] * 3, advantages=signs) == [[0.0, 1.0, 1.0]]
    assert by_hand(NegativeSequenceMask(delta=0.7), [-LOG2] * 3, advantages=signs) == [[1.0, 1.0, 1.0]]
    assert by_hand(NegativeSequenceMask(delta=0.5), [LOG2] * 3, advantages=signs) == [[1.0, 1.0, 1.0]]


def test_only_outward_tokens_are_masked():
    signs = [[1.0, -1.0, 0.0, 1.0, -1.0]]
    ell = [LOG2, LOG2, LOG2, -LOG2, -LOG2]
    assert by_hand(OutwardMask(edge="policy/behavior", eps_low=0.5, eps_high=0.5), ell, advantages=signs) == [
        [0.0, 1.0, 1.0, 1.0, 0.0]
    ]
    assert by_hand(OutwardMask(edge="policy/behavior", eps_low=0.7, eps_high=0.5), ell, advantages=signs) == [
        [0.0, 1.0, 1.0, 1.0, 1.0]
    ]
    # the sequence is far: mean abs(ρ − 1) = 0.8
    assert by_hand(SequenceTrustMask(delta=0.75), ell, advantages=signs) == [[0.0, 1.0, 1.0, 1.0, 0.0]]
    assert by_hand(SequenceTrustMask(delta=0.85), ell, advantages=signs) == [[1.0] * 5]


def test_second_moments():
    """ℓ² = 1, 4, 9, 0: the mean of the three smallest is 5/3, of all 3.5."""
    ell = [1.0, -2.0, 3.0, 0.0]
    for tau, kept in ((4.0, [1, 1, 1, 1]), (3.5, [1, 1, 0, 1]), (1.7, [1, 1, 0, 1]), (1.6, [1, 0, 0, 1]), (0.4, [0, 0, 0, 1])):
        assert by_hand(SecondMomentMask(tau=tau), ell)[0] == kept
        # of the batch, not of the sequence
        assert np.concatenate(by_hand(SecondMomentMask(tau=tau), ell[:2], ell[2:])).tolist() == kept


def test_a_prefix_spends_its_budget():
    """D = 0.05, 0.1, 0.05 of weights 1, 0.9, 0.8: the sums are 0.05, 0.14 and 0.18, the weights before a token 0, 1, 1.9."""
    arrays = rows([0.0] * 3, [0.0] * 3, advantages=np.array([[1.0] * 3, [-1.0, 1.0, -1.0]]))
    arrays["behavior_log_prob"] = np.log(np.full((2, 3), 0.2))
    arrays["log_prob"] = np.log([[0.25, 0.3, 0.25]] * 2)
    for keys, kept in (
        ({"delta": 0.0901, "budget": 0.0500}, [1, 1, 1]),
        ({"delta": 0.0901, "budget": 0.0498}, [1, 0, 1]),
        ({"delta": 0.0901, "budget": 0.0470}, [1, 0, 0]),
        ({"delta": 0.0899, "budget": 0.9}, [1, 0, 1]),
        ({"delta": 0.16, "budget": 0.01}, [1, 1, 0]),
    ):
        found = factor(Backend.NUMPY, PrefixBudgetMask(**keys, calibrate=False), arrays)
        # what moves back is kept, and spends as much
        assert found.tolist() == [kept, [1.0, kept[1], 1.0]]
    # the 0.9 quantile, 0.09, within [δ_b, 2 δ_b]
    for budget, kept in ((0.0101, 1.0), (0.0099, 0.0)):
        calibrated = PrefixBudgetMask(delta=0.142, budget=budget)
        assert factor(Backend.NUMPY, calibrated, arrays)[0].tolist() == [1.0, 1.0, kept]


def test_second_moments_that_tie_go_together():
    """Dropping one of two equal ones would depend on their order; keeping both would leave the mean above τ."""
    assert by_hand(SecondMomentMask(tau=0.6), [1.0, -1.0, 0.0]) == [[0.0, 0.0, 1.0]]
    assert by_hand(SecondMomentMask(tau=0.7), [1.0, -1.0, 0.0]) == [[1.0, 1.0, 1.0]]
    assert by_hand(SecondMomentMask(tau=0.5), [1.0, -1.0]) == [[0.0, 0.0]]


def test_bounds_are_inclusive(backend):
    """At exactly a bound the token is kept: ρ = 1 with low = 1, or with high = 1."""
    arrays = rows([0.0, 0.0])
    for correction in (
        RatioMask(low=1.0),
        RatioMask(high=1.0),
        Veto(low=1.0),
        Veto(high=1.0),
        ImportanceWeight(high=1.0, outside="zero"),
    ):
        assert (factor(backend, correction, arrays) == 1.0).all()


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_a_nan_at_a_valid_token_fails_closed(level):
    """A mask leaves the token out, and at the level of sequences all of its sequence; others are as they were."""
    arrays = rows([0.0, math.nan, 0.0], [0.0, 0.0])
    hit = [[1.0, 0.0, 1.0] if level == "token" else [0.0] * 3, [1.0, 1.0, 0.0]]
    assert factor(Backend.NUMPY, RatioMask(low=0.5, high=2.0, level=level), arrays).tolist() == hit
    over = {"token": "token", "sequence": "sum", "geometric": "mean"}[level]
    assert factor(Backend.NUMPY, DivergenceMask(high=1.0, over=over), arrays).tolist() == hit
    if level == "sequence":
        assert factor(Backend.NUMPY, Veto(), arrays).tolist() == hit
        assert factor(Backend.NUMPY, DivergenceMask(high=1.0, over="max"), arrays).tolist() == hit
    assert factor(Backend.NUMPY, SecondMomentMask(tau=1.0), arrays).tolist() == [[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]


# --- properties ---------------------------------------------------------------------------------------------------------

log_ratios = st.lists(st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=6), min_size=1, max_size=4)
bounds = st.tuples(st.floats(0.05, 0.9), st.floats(1.1, 8.0))
levels = st.sampled_from(["token", "sequence", "geometric"])


@given(log_ratios, bounds, levels)
@FUZZ
def test_weights_are_within_their_bounds_and_those_beyond_are_at_them(ell, limits, level):
    low, high = limits
    plain, clamped, zeroed, mask = (
        np.concatenate(by_hand(correction, *ell))
        for correction in (
            ImportanceWeight(level=level),
            ImportanceWeight(level=level, low=low, high=high),
            ImportanceWeight(level=level, low=low, high=high, outside="zero"),
            RatioMask(level=level, low=low, high=high),
        )
    )
    np.testing.assert_allclose(clamped, np.clip(plain, low, high), rtol=1e-8)
    np.testing.assert_allclose(zeroed, plain * mask, rtol=1e-8)


@given(log_ratios, levels, st.booleans())
@FUZZ
def test_normalised_weights_have_mean_1(ell, level, bounded):
    correction = ImportanceWeight(level=level, high=2.0 if bounded else None, normalize=True)
    found = by_hand(correction, *ell)
    counted = [k for row in found for k in (row if level == "token" else row[:1])]
    assert np.mean(counted) == pytest.approx(1.0, rel=1e-6)


@given(log_ratios, st.floats(0.1, 3.0), st.floats(1.0, 3.0))
@FUZZ
def test_a_wider_mask_keeps_what_a_narrower_one_keeps(ell, limit, times):
    """Monotone in every threshold."""
    narrow_and_wide = [
        (RatioMask(low=1 / (1 + limit), high=1 + limit), RatioMask(low=1 / (1 + times * limit), high=1 + times * limit)),
        *(
            (DivergenceMask(high=limit, over=over), DivergenceMask(high=times * limit, over=over))
            for over in ("token", "sum", "mean", "max")
        ),
        (Veto(low=None, high=1 + limit), Veto(low=None, high=1 + times * limit)),
        (NegativeSequenceMask(delta=limit), NegativeSequenceMask(delta=times * limit)),
        (SequenceTrustMask(delta=limit), SequenceTrustMask(delta=times * limit)),
        (SecondMomentMask(tau=limit), SecondMomentMask(tau=times * limit)),
        (PrefixBudgetMask(delta=0.01 * limit), PrefixBudgetMask(delta=0.01 * times * limit)),
        (PrefixBudgetMask(delta=0.01, budget=0.01 * limit), PrefixBudgetMask(delta=0.01, budget=0.01 * times * limit)),
        (
            OutwardMask(edge="policy/behavior", eps_low=limit, eps_high=limit),
            OutwardMask(edge="policy/behavior", eps_low=times * limit, eps_high=times * limit),
        ),
    ]
    for narrow, wide in narrow_and_wide:
        for sign in (1.0, -1.0):
            kept, more = (np.concatenate(by_hand(correction, *ell, advantages=sign)) for correction in (narrow, wide))
            assert (kept <= more).all(), narrow


@given(log_ratios, st.integers(0, 3), st.integers(0, 5), st.sampled_from([-12.0, 6.0]))
@FUZZ
def test_one_token_vetoes_its_sequence_and_no_other(ell, row, place, nats):
    row = row % len(ell)
    ell[row][place % len(ell[row])] = nats
    assert by_hand(Veto(), *ell) == [[float(i != row)] * len(each_row) for i, each_row in enumerate(ell)]


@given(log_ratios, st.floats(0.01, 4.0))
@FUZZ
def test_the_mean_of_the_rest_is_below_tau_and_no_more_is_dropped(ell, tau):
    kept = np.concatenate(by_hand(SecondMomentMask(tau=tau), *ell)) == 1.0
    squares = np.concatenate([np.square((np.array(row) - 5.0) + 5.0) for row in ell])
    if kept.any():
        assert squares[kept].mean() < tau * (1 + 1e-12)
        assert squares[kept].max() < squares[~kept].min(initial=np.inf)
    if not kept.all():
        assert squares[squares <= squares[~kept].min()].mean() >= tau * (1 - 1e-12)


@given(log_ratios)
@FUZZ
def test_a_minimum_falls_along_the_sequence(ell):
    for row, wanted in zip(by_hand(MinimumPrefixRatio(), *ell), ell, strict=True):
        assert row[0] == 1.0
        assert row[1:] == sorted(row[1:], reverse=True)
        assert all(k >= math.exp(min(wanted)) * (1 - 1e-8) for k in row[1:])


# --- sequences over ranks ------------------------------------------------------------------------------------------------


def over_ranks(correction, arrays, cut):
    """K of columns before and after a place, each on a rank of its own."""
    sides = (np.s_[:, :cut], np.s_[:, cut:])
    mode = quiet(correction)

    def of(rank, across):
        part = arguments_for(mode, {name: array[sides[rank]] for name, array in arrays.items()})
        return token_loss_and_gradient(mode, **part, across=across).weight

    return np.concatenate(reduced_over(of), axis=1)


ORDERED = (*IN_ORDER, SecondMomentMask)
"""They need an order, of the tokens of a sequence or of the batch."""


@pytest.mark.parametrize("cut", [0, 3, 7])
@pytest.mark.parametrize("correction", [e for e in EXAMPLES if not isinstance(e, ORDERED)], ids=str)
def test_sequences_divided_over_two_ranks(correction, cut):
    arrays = batch(seed=11)
    np.testing.assert_allclose(over_ranks(correction, arrays, cut), factor(Backend.NUMPY, correction, arrays), rtol=1e-12)


@pytest.mark.parametrize("correction", [e for e in ONE_OF_EACH if isinstance(e, ORDERED)], ids=str)
def test_what_needs_an_order_says_so(correction):
    with pytest.raises(ValueError, match="across: what depends on an order of the tokens"):
        over_ranks(correction, batch(), 3)


def test_packed_sequences_are_on_one_rank():
    flat, _ = packed(batch())
    mode = quiet(Veto())
    with pytest.raises(ValueError, match="segment_ids: expected None with `across`"):
        token_loss_and_gradient(mode, **arguments_for(mode, flat), across=lambda array, _: array)


# --- token weights with random numbers -----------------------------------------------------------------------------------


def chosen_by_covariance(x, a, mask, noise, *, share, low, high, candidates):
    """Clip-Cov as in verl: of the tokens in the band, the first in a random order, as many as the share or one."""
    valid = list(zip(*np.nonzero(mask), strict=True))
    mean_a, mean_x = (math.fsum(array[i] for i in valid) / len(valid) for array in (a, x))
    band = [i for i in valid if low < (a[i] - mean_a) * (x[i] - mean_x) < high and candidates[i]]
    return sorted(band, key=lambda i: noise[i])[: max(int(share * len(valid)), 1)]


@pytest.mark.parametrize("backend", [b for b in Backend if b is not Backend.JAX], ids=lambda b: b.value, indirect=True)
def test_tokens_of_large_covariance_lose_their_gradient_at_random(backend):
    arrays = batch((6, 9), seed=12)
    mask, rng = arrays["mask"], np.random.default_rng(1)
    noise, candidates = np.where(mask, rng.random(mask.shape), np.nan), rng.random(mask.shape) < 0.7
    given = (arrays["log_prob"], arrays["advantages"], mask, noise)
    for share, count in ((0.15, int(0.15 * mask.sum())), (1e-6, 1), (5.0, None)):
        options = {"share": share, "low": 0.02, "high": 1.5}
        found = backend.run(clip_cov_weights, *given, **options, candidates=candidates)
        chosen = chosen_by_covariance(*given, **options, candidates=candidates)
        expected = mask.astype(float)
        expected[tuple(np.transpose(chosen))] = 0.0
        assert len(chosen) == (len(chosen) if count is None else count) > 0
        np.testing.assert_array_equal(found, expected)
        if backend is Backend.JAX_JIT:
            return  # each number is compiled
    nothing = backend.run(clip_cov_weights, *given[:2], mask & False, noise)
    assert (nothing == 0.0).all()
    assert (backend.run(clip_cov_weights, *given, low=1e3, high=1e4) == mask).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share: expected a finite number greater than 0, got 0.0"),
        ({"low": 5.0}, "low: expected less than high, 5, got 5"),
        ({"candidates": np.ones(2, bool)}, r"candidates: expected the shape of mask, \(3,\), got \(2,\)"),
    ],
)
def test_arguments_of_clip_cov_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        clip_cov_weights(np.zeros(3), np.zeros(3), np.ones(3, bool), np.zeros(3), **options)
    with pytest.raises(ValueError, match=r"noise: expected the shape of log_prob, \(3,\), got \(2,\)"):
        clip_cov_weights(np.zeros(3), np.zeros(3), np.ones(3, bool), np.zeros(2))
    assert clip_cov_weights(np.zeros((0, 3)), np.zeros((0, 3)), np.ones((0, 3), bool), np.zeros((0, 3))).shape == (0, 3)


# --- errors and text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ImportanceWeight(edge="policy/policy"),
            ValueError,
            "edge: expected 'proximal/behavior' or 'policy/behavior'",
        ),
        (lambda: ImportanceWeight(level="row"), ValueError, "level: expected 'token' or 'sequence' or 'geometric', got 'row'"),
        (lambda: ImportanceWeight(outside="mask"), ValueError, "outside: expected 'clamp' or 'zero', got 'mask'"),
        (lambda: ImportanceWeight(low=2.0, high=1.0), ValueError, "low: expected less than high, 1, got 2"),
        (lambda: ImportanceWeight(low=-0.1), ValueError, "low: expected a finite number, 0 or more, got -0.1"),
        (lambda: ImportanceWeight(high=0.0), ValueError, "high: expected a finite number greater than 0, got 0.0"),
        (lambda: RatioMask(high=math.nan), ValueError, "high: expected a finite number greater than 0, got nan"),
        (lambda: RatioMask(high="2"), TypeError, "high: expected a real number, got str"),
        (lambda: RatioMask(high=True), TypeError, "high: expected a real number, got bool"),
        (lambda: Veto(low=1.0, high=1.0), ValueError, "low: expected less than high, 1, got 1"),
        (lambda: DivergenceMask(high=-1.0), ValueError, "high: expected a finite number greater than 0, got -1.0"),
        (lambda: DivergenceMask(high=1.0, estimator="k1"), ValueError, "estimator: expected 'k2' or 'k3'"),
        (lambda: DivergenceMask(high=1.0, over="median"), ValueError, "over: expected 'token' or 'sum' or 'mean' or 'max'"),
        (lambda: NegativeSequenceMask(delta=0.0), ValueError, "delta: expected a finite number greater than 0"),
        (lambda: SequenceTrustMask(delta=-1.0), ValueError, "delta: expected a finite number greater than 0"),
        (lambda: OutwardMask(eps_low=0.1, eps_high=0.0), ValueError, "eps_high: expected a finite number greater than 0"),
        (lambda: VariationalWeight(positive=(0.0, 1.0)), ValueError, "positive: expected a finite number greater than 0"),
        (lambda: VariationalWeight(negative=2.0), TypeError, "negative: expected two numbers"),
        (lambda: VariationalWeight(negative=(1.0, 2.0, 3.0)), TypeError, "negative: expected two numbers"),
        (lambda: FutureRatio(delta=1.0, half_life=0.0), ValueError, "half_life: expected a finite number greater than 0"),
        (lambda: FutureRatio(delta=1.0, low=1.3), ValueError, "low: expected less than high, 1.2, got 1.3"),
        (lambda: SecondMomentMask(tau=math.inf), ValueError, "tau: expected a finite number greater than 0"),
        (lambda: PrefixBudgetMask(delta=0.0), ValueError, "delta: expected a finite number greater than 0"),
        (lambda: PrefixBudgetMask(delta=0.1, budget=-1.0), ValueError, "budget: expected a finite number greater than 0"),
        (lambda: PrefixBudgetMask(delta=0.1, min_weight=1.1), ValueError, "min_weight: expected 1 or less, got 1.1"),
        (lambda: PrefixBudgetMask(delta=0.1, calibrate=1), TypeError, "calibrate: expected True or False, got 1"),
        (lambda: MinimumPrefixRatio(edge=None), ValueError, "edge: expected 'proximal/behavior'"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("correction", ONE_OF_EACH, ids=str)
def test_numbers_are_kept_as_python_floats(correction):
    numbers = {f.name: getattr(correction, f.name) for f in dataclasses.fields(correction)}
    given_as_numpy = {name: np.float32(value) if isinstance(value, float) else value for name, value in numbers.items()}
    again = dataclasses.replace(correction, **given_as_numpy)
    assert all(type(getattr(again, name)) is type(value) for name, value in numbers.items())
    assert hash(correction) == hash(dataclasses.replace(correction))
    json.dumps(numbers)


@pytest.mark.parametrize("correction", EXAMPLES, ids=str)
def test_a_weight_counts_its_edge_and_a_mask_none(correction):
    values = np.unique(expected(correction, batch(seed=1)))
    # the others' factors are of the ratios of other tokens, which multiply the token's own
    is_weight = type(correction) in {ImportanceWeight, VariationalWeight, ClippedGeometricRatio}
    assert correction.counts == (correction.edge if is_weight else None)
    if correction.counts is None and type(correction) not in {LengthScale, FutureRatio, MinimumPrefixRatio}:
        assert set(values) <= {0.0, 1.0}


def test_diagnostics_of_a_correction():
    """ρ = 2, 1/2, 1 and 3, of which the last is zeroed."""
    arrays = rows([LOG2, -LOG2], [0.0, LOG3])
    mode = quiet(ImportanceWeight(high=2.5, outside="zero"), RatioMask(high=1.5), RatioMask(low=0.6))
    found = summarize(policy_loss_and_gradient(mode, **arguments_for(mode, arrays)).diagnostics)
    assert found["importance_weight_masked_fraction"] == 0.25
    assert found["importance_weight_mean"] == pytest.approx(3.5 / 4)
    assert found["importance_weight_max"] == pytest.approx(2.0)
    assert found["importance_weight_effective_sample_size"] == pytest.approx(3.5**2 / 5.25 / 4)
    assert found["ratio_mask_1_masked_fraction"] == 0.5
    assert found["ratio_mask_2_masked_fraction"] == 0.25


def test_evidence_is_what_a_correction_of_ones_own_may_look_at():
    """A user's class needs `arguments`, `counts` and `factor`."""

    @dataclasses.dataclass(frozen=True)
    class Certain:
        arguments = ()
        counts = None

        def factor(self, evidence):
            assert isinstance(evidence, Evidence)
            assert isinstance(evidence.policies, Policies)
            policies = evidence.policies
            return policies.xp.exp(policies.sequences.largest(policies.log_prob))

    arrays = batch(seed=2)
    found = factor(Backend.NUMPY, Certain(), arrays)
    largest = np.where(arrays["mask"], arrays["log_prob"], -np.inf).max(axis=1, keepdims=True)
    np.testing.assert_allclose(found, np.where(arrays["mask"], np.exp(largest), 0.0), rtol=1e-14)
