"""Modes: gradient −c K A R w plus the penalties' in every engine; text, dicts, errors and the warning of double ratios."""

import dataclasses
import itertools
import json
import math
import tomllib
import types
import typing
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from backends import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from mode_oracles import EXAMPLES, Constant, arguments_for, batch, examples_of, packed, quiet, reduced_over, with_choices
from variants import ALL, KINDS, MEASURED, VARIANTS, each_kind

import drpo_core
from drpo_core import (
    DPPO,
    DRPO,
    PolicyGradient,
    PPOClip,
    anchors,
    corrections,
    loss,
    objectives,
    penalties,
    policy_loss_and_gradient,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    summarize,
    token_loss_and_gradient,
    token_mean,
)
from drpo_core.anchors import Behavior, Prefix, Proximal, Sequence
from drpo_core.corrections import ImportanceWeight, LengthScale, RatioMask, VariationalWeight, Veto
from drpo_core.modes import DoubleRatioWarning, Mode
from drpo_core.penalties import Penalty
from drpo_core.reduction import reduction_coefficients, reduction_count

ENGINES = ("arrays", "compiled")
REDUCTIONS = {
    ("token_mean", None): token_mean,
    ("sequence_mean_token_mean", None): sequence_mean_token_mean,
    ("sequence_mean_token_sum", None): sequence_mean_token_sum,
    ("sequence_mean_token_sum", 7.0): partial(sequence_mean_token_sum, horizon=7.0),
}
WHOLE = Mode(
    PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
    anchor=Sequence(Proximal()),
    corrections=(ImportanceWeight(high=2.0), Veto(low=0.1, high=10.0), RatioMask(level="geometric", low=0.5, high=2.0)),
    penalties=(Penalty(coefficient=0.1), Penalty(coefficient=0.2, estimator="k2", to="proximal")),
    reduction="sequence_mean_token_sum",
    horizon=9.0,
    count_masked=False,
)
"""A mode with something in every field."""

each_engine = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch, interpreted_loops):  # noqa: ARG001 -- a fixture
    """So that a few tokens make many chunks; and no mode is compiled, which `tests/core/engines/test_rows.py` does."""
    monkeypatch.setitem(loss.chunked_pass.__kwdefaults__, "chunk", 11)


def modes():
    """Every example of every part in a mode, and all of them together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubleRatioWarning)
        for example in EXAMPLES:
            for value in with_choices(example):
                if hasattr(value, "factor"):
                    yield Mode(PPOClip(eps=0.2), corrections=(value,))
                elif hasattr(value, "value_and_gradient"):
                    yield Mode(PPOClip(eps=0.2), penalties=(value,))
                else:
                    yield Mode(PPOClip(eps=0.2), anchor=value)
        yield from (Mode(objective) for objective in ALL)
        yield from (Mode(DRPO(delta=0.1), reduction=name, horizon=horizon) for name, horizon in REDUCTIONS)
        yield WHOLE


MODES = list(modes())


# --- gradient = −c K A R w + penalties -----------------------------------------------------------------------------------


def parts(mode, arrays):
    """c, K, the objective's loss and gradient at the anchor, and the penalties', each found on its own."""
    at_anchor = Mode(mode.objective, anchor=mode.anchor)
    of_objective = token_loss_and_gradient(at_anchor, **arguments_for(at_anchor, arrays))
    only = quiet(*mode.corrections)
    factor = token_loss_and_gradient(only, **arguments_for(only, arrays)).weight
    penalty = np.zeros((2, *arrays["mask"].shape))
    if mode.penalties:
        alone, without = quiet(*mode.penalties), quiet()
        given, bare = (token_loss_and_gradient(each, **arguments_for(each, arrays)) for each in (alone, without))
        penalty = np.array([given.loss - bare.loss, given.gradient - bare.gradient])
    return factor, of_objective, penalty


PENALISED = (Penalty(coefficient=0.2, estimator="k2"),)


def with_corrections(objective, anchor, corrected, penalised=PENALISED):
    """A mode, and whether it warns is not asked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubleRatioWarning)
        return Mode(objective, anchor=anchor, corrections=corrected, penalties=penalised)


COMBINATIONS = [
    with_corrections(objective, anchor, corrected)
    for objective in (DRPO(delta=0.3), PPOClip(eps=0.3, dual_clip=2.0), PolicyGradient(max_ratio=1.5))
    for anchor in (Behavior(), Sequence(Proximal()), Prefix(Behavior()))
    for corrected in (
        (ImportanceWeight(high=1.5), LengthScale()),
        (ImportanceWeight(level="sequence", high=1.5), Veto(low=0.3, high=3.0)),
        (RatioMask(level="geometric", low=0.7, high=1.4),),
    )
]


@each_engine
@pytest.mark.parametrize("mode", COMBINATIONS, ids=repr)
def test_the_gradient_is_a_product(mode, engine):
    """Corrections are constants, of their own levels: c K times the gradient without, plus the penalties' times c."""
    arrays = batch(seed=1)
    factor, of_objective, penalty = parts(mode, arrays)
    flat, places = packed(arrays)
    for (name, horizon), reduction in REDUCTIONS.items():
        reduced = dataclasses.replace(mode, reduction=name, horizon=horizon) if not mode.corrections else mode
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DoubleRatioWarning)
            reduced = dataclasses.replace(mode, reduction=name, horizon=horizon)
        c = np.broadcast_to(reduction_coefficients(reduction, arrays["mask"], dtype=np.float64), arrays["mask"].shape)
        gradient = np.where(arrays["mask"], c * (factor * of_objective.gradient + penalty[1]), 0.0)
        value = np.where(arrays["mask"], c * (factor * of_objective.loss + penalty[0]), 0.0).sum()
        result = policy_loss_and_gradient(reduced, **arguments_for(reduced, arrays), engine=engine)
        np.testing.assert_allclose(result.gradient, gradient, rtol=1e-10, atol=1e-15)
        np.testing.assert_allclose(result.loss, value, rtol=1e-10)
        result = policy_loss_and_gradient(reduced, **arguments_for(reduced, flat), engine=engine)
        np.testing.assert_allclose(result.gradient, gradient[places], rtol=1e-10, atol=1e-15)
        np.testing.assert_allclose(result.loss, value, rtol=1e-10)


def test_every_backend(backend):
    arrays = arguments_for(WHOLE, batch(seed=2))
    wanted = policy_loss_and_gradient(WHOLE, **arrays)
    result = backend.run(policy_loss_and_gradient, WHOLE, **arrays)
    np.testing.assert_allclose(result.loss, wanted.loss, rtol=1e-12)
    np.testing.assert_allclose(result.gradient, wanted.gradient, rtol=1e-10, atol=1e-15)
    flat, places = packed(batch(seed=2))
    result = backend.run(policy_loss_and_gradient, WHOLE, **arguments_for(WHOLE, flat))
    np.testing.assert_allclose(result.loss, wanted.loss, rtol=1e-12)
    np.testing.assert_allclose(result.gradient, wanted.gradient[places], rtol=1e-10, atol=1e-15)


@given(st.integers(0, 2**32 - 1), st.sampled_from(COMBINATIONS), st.floats(0.1, 5.0))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_homogeneous_in_the_advantages(seed, mode, k):
    """K may depend on the sign of A and on nothing else of it, so the gradient without penalties scales with A."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubleRatioWarning)
        mode = dataclasses.replace(mode, penalties=())
    arrays = batch(seed=seed)
    scaled = arrays | {"advantages": k * arrays["advantages"]}
    one, other = (token_loss_and_gradient(mode, **arguments_for(mode, each)) for each in (arrays, scaled))
    np.testing.assert_allclose(other.gradient, k * one.gradient, rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(other.weight, one.weight, rtol=1e-12)


@pytest.mark.parametrize("mode", [WHOLE, dataclasses.replace(WHOLE, count_masked=True), *COMBINATIONS[:3]], ids=repr)
def test_a_batch_in_micro_batches(mode):
    """Rows apart, with the normalizer of the whole batch: nothing at the level of sequences looks across rows."""
    arrays = arguments_for(mode, batch((6, 8), seed=3))
    whole = policy_loss_and_gradient(mode, **arrays, normalizer=11.0)
    pieces = [
        policy_loss_and_gradient(mode, **{n: a[rows] for n, a in arrays.items()}, normalizer=11.0)
        for rows in (slice(1), slice(1, 4), slice(4, 6))
    ]
    np.testing.assert_allclose(sum(piece.loss for piece in pieces), whole.loss, rtol=1e-12)
    np.testing.assert_allclose(np.concatenate([piece.gradient for piece in pieces]), whole.gradient, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    "mode", [dataclasses.replace(WHOLE, reduction="token_mean", horizon=None), *COMBINATIONS[3:6]], ids=repr
)
def test_columns_on_two_ranks(mode):
    """Context parallelism: the halves of every row, with `across`, have the gradient of the whole; their losses add up."""
    arrays = arguments_for(mode, batch((6, 8), seed=3))
    whole = policy_loss_and_gradient(mode, **arrays, normalizer=11.0)

    def of(rank, across):
        half = {name: a[:, :5] if rank == 0 else a[:, 5:] for name, a in arrays.items()}
        return policy_loss_and_gradient(mode, **half, normalizer=11.0, across=across)

    halves = reduced_over(of)
    np.testing.assert_allclose(np.concatenate([h.gradient for h in halves], axis=1), whole.gradient, rtol=1e-11, atol=1e-16)
    np.testing.assert_allclose(sum(half.loss for half in halves), whole.loss, rtol=1e-11)


def test_tokens_that_are_masked_count_or_do_not():
    """Of four tokens one is left out: the mean is over four, or, as in verl, over three; a zeroed weight counts anyway."""
    behavior = np.full((1, 4), -2.0)
    arrays = {"behavior_log_prob": behavior, "log_prob": behavior, "advantages": np.ones((1, 4))}
    arrays |= {"proximal_log_prob": behavior + np.array([0.0, 0.0, 0.0, 3.0]), "mask": np.ones((1, 4), dtype=bool)}
    for correction, counted, masked_counted in (
        (RatioMask(high=2.0), 3, 4),
        (ImportanceWeight(high=2.0, outside="zero"), 4, 4),
    ):
        for count_masked, count in ((False, counted), (True, masked_counted)):
            for name in ("token_mean", "sequence_mean_token_mean"):
                mode = quiet(correction, count_masked=count_masked, reduction=name)
                gradient = policy_loss_and_gradient(mode, **arrays).gradient
                np.testing.assert_allclose(gradient, np.array([[-1.0, -1.0, -1.0, 0.0]]) / count, rtol=1e-12)


def test_a_sequence_that_is_masked_counts_or_does_not():
    arrays = arguments_for(WHOLE, batch(seed=4))
    vetoed = Veto(low=0.5, high=2.0)
    count = {}
    for count_masked in (False, True):
        mode = quiet(vetoed, count_masked=count_masked, reduction="sequence_mean_token_mean")
        given_arrays = arguments_for(mode, arrays)
        kept = token_loss_and_gradient(mode, **given_arrays).weight.max(axis=1) > 0
        result = policy_loss_and_gradient(mode, **given_arrays | {"advantages": np.ones_like(arrays["advantages"])})
        # each kept sequence gives −1 over the number of those that count
        count[count_masked] = kept.sum() / -result.gradient.sum()
    assert count[False] == pytest.approx(kept.sum())
    assert count[True] == pytest.approx(arrays["mask"].any(axis=1).sum())
    assert 0 < kept.sum() < count[True]


# --- a mode that is its objective -----------------------------------------------------------------------------------------


@each_engine
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@each_kind
def test_a_mode_of_an_objective_alone_is_the_objective_to_the_last_bit(objective, dtype, engine):
    arrays = batch((7, 9), seed=5)
    arrays = {
        n: a if n == "mask" else a.astype(dtype)
        for n, a in arrays.items()
        if n not in {"proximal_log_prob", "reference_log_prob"}
    }
    if getattr(objective, "divergence", None) == "per_token":
        arrays["divergence"] = np.full((7, 9), 0.05, dtype)
    for (name, horizon), reduction in REDUCTIONS.items():
        mode = Mode(objective, reduction=name, horizon=horizon)
        one = policy_loss_and_gradient(mode, **arrays, engine=engine)
        other = policy_loss_and_gradient(objective, **arrays, reduction=reduction, engine=engine)
        assert one.loss == other.loss
        assert one.loss.dtype == other.loss.dtype == dtype
        np.testing.assert_array_equal(one.gradient, other.gradient)
        assert summarize(one.diagnostics) == pytest.approx(summarize(other.diagnostics), rel=0.0, abs=0.0, nan_ok=True)
    for one, other in zip(token_loss_and_gradient(mode, **arrays), token_loss_and_gradient(objective, **arrays), strict=True):
        np.testing.assert_array_equal(one, other)


@each_kind
def test_a_mode_of_an_objective_alone_in_every_backend(backend, objective):
    arrays = arguments_for(Mode(objective), batch(seed=6))
    if getattr(objective, "divergence", None) == "per_token":
        arrays["divergence"] = np.full(arrays["mask"].shape, 0.05)
    for function in (token_loss_and_gradient, policy_loss_and_gradient):
        one, other = (backend.run(function, subject, **arrays) for subject in (Mode(objective), objective))
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize(
    "more",
    [
        {"anchor": Proximal()},
        {"corrections": (Veto(),)},
        {"penalties": (Penalty(coefficient=0.1, estimator="k2"),)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_diagnostics_by_token_are_those_of_the_objective_or_refused(more):
    arrays = batch(seed=8)
    tokens = [arrays[n] for n in ("log_prob", "behavior_log_prob", "advantages")]
    objective = drpo_core.PPOClip(eps=0.2)
    assert summarize(drpo_core.token_diagnostics(Mode(objective), *tokens, mask=arrays["mask"])) == pytest.approx(
        summarize(drpo_core.token_diagnostics(objective, *tokens, mask=arrays["mask"])), nan_ok=True
    )
    with pytest.raises(ValueError, match=r"^objective: expected a mode without anchor, corrections and penalties, got"):
        drpo_core.token_diagnostics(Mode(objective, **more), *tokens, mask=arrays["mask"])


def test_a_mode_has_the_methods_of_its_objective():
    arrays = batch(seed=7)
    tokens = drpo_core.Tokens.checked(
        *(arrays[n] for n in ("log_prob", "behavior_log_prob", "advantages")), mask=arrays["mask"]
    )
    for objective in VARIANTS:
        mode = Mode(objective, reduction="sequence_mean_token_mean")
        for name in ("loss", "weight", "inside"):
            own = getattr(objective, name, None)
            if own is not None:
                np.testing.assert_array_equal(getattr(mode, name)(tokens), own(tokens))
        ratio_weight = getattr(objective, "ratio_weight", lambda tokens, o=objective: tokens.ratio * o.weight(tokens))
        np.testing.assert_array_equal(mode.ratio_weight(tokens), ratio_weight(tokens))


def test_an_anchor_changes_what_diagnostics_are_of():
    """Ratios, divergences and the trust region are those at the anchor."""
    arrays = batch(seed=8)
    mode = Mode(PPOClip(eps=0.2), anchor=Proximal())
    found = policy_loss_and_gradient(mode, **arguments_for(mode, arrays)).diagnostics
    names = ("log_prob", "advantages", "mask")
    wanted = policy_loss_and_gradient(
        PPOClip(eps=0.2), behavior_log_prob=arrays["proximal_log_prob"], **{n: arrays[n] for n in names}
    ).diagnostics
    assert summarize(found) == summarize(wanted)
    assert policy_loss_and_gradient(WHOLE, **arguments_for(WHOLE, arrays), diagnostics=False).diagnostics is None


def points():
    """Rows of one token: log-probs of the reference points, and every pair of extreme ones, with A of each sign."""
    with np.load(Path(__file__).parents[1] / "data" / "reference_points.npz") as known:
        x, b = known["log_prob"][::8], known["behavior_log_prob"][::8]
    ends = np.array([-np.inf, -1e7, -1e6, -745.0, -20.5, -1.0, -1e-9, 0.0])
    x, b = (np.concatenate((*c, g.ravel())) for c, g in zip(((x,), (b,)), np.meshgrid(ends, ends), strict=True))
    a = np.resize([1.0, -0.5, 0.0], x.size)
    return {name: c[:, None] for name, c in (("log_prob", x), ("behavior_log_prob", b), ("advantages", a))}


INERT = [
    dataclasses.replace(each, **({"edge": "proximal/behavior"} if hasattr(each, "edge") else {}))
    for each in examples_of(corrections)
]
"""Every correction, on an edge between policies that will be equal: K = 1."""


@pytest.mark.parametrize("objective", KINDS, ids=objectives.label)
def test_a_mode_of_inert_corrections_is_its_objective_to_the_last_bit(objective):
    """Wherever π and μ are, at π = μ = 0 too, where the anchor was −10⁶ nats, and the gradient 0 instead of −A."""
    arrays = points()
    more = {"divergence": np.full_like(arrays["log_prob"], 0.05)} if objective == MEASURED else {}
    wanted = token_loss_and_gradient(objective, **arrays, **more)
    for correction in dict.fromkeys(INERT):
        mode = with_corrections(objective, Behavior(), (correction,), ())
        others = dict.fromkeys(mode.arguments, arrays["behavior_log_prob"])
        found = token_loss_and_gradient(mode, **arrays, **more, **others)
        for got, want in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(got, want, err_msg=repr(correction))
    mask = np.ones(arrays["log_prob"].shape, dtype=bool)
    for engine in ENGINES:
        got, want = (
            policy_loss_and_gradient(o, **arrays, **more, mask=mask, engine=engine, diagnostics=False)
            for o in (Mode(objective, corrections=(RatioMask(edge="policy/behavior"),)), objective)
        )
        np.testing.assert_array_equal(got.gradient, want.gradient)
        np.testing.assert_array_equal(got.loss, want.loss)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A correction whose factors are given."""

    factors: tuple[float, ...]
    arguments = ()
    counts = None

    def factor(self, evidence):
        """The factors."""
        return evidence.policies.xp.asarray(self.factors, dtype=evidence.policies.log_prob.dtype)


@each_engine
def test_a_factor_of_zero_leaves_a_token_out_whatever_the_rest_is(engine):
    """A NaN or an infinity of another correction, or of the token itself, times 0 was a NaN in the whole batch's loss."""
    bad = (math.nan, math.inf, -math.inf)
    zeros = Fixed((0.0,) * 3 + (1.0,))
    ones = {"log_prob": np.array([-1.0, -1.0, -1.0, -2.0]), "behavior_log_prob": np.full(4, -2.0), "advantages": np.ones(4)}
    for spoilt_weight in (Fixed((*bad, 1.0)), Fixed((1.0,) * 4)):
        for name in {"advantages", "behavior_log_prob", "log_prob"} if spoilt_weight.factors[0] == 1.0 else {"nothing"}:
            arrays = {n: np.array([*bad, 1.0 if n == "advantages" else -2.0]) if n == name else a for n, a in ones.items()}
            for pair in ((zeros, spoilt_weight), (spoilt_weight, zeros)):
                mode = Mode(DRPO(delta=0.5), corrections=pair)
                with np.errstate(invalid="ignore"):  # NumPy says what it makes of inf · 0
                    found = policy_loss_and_gradient(mode, **arrays, mask=np.ones(4, dtype=bool), engine=engine)
                    apart = token_loss_and_gradient(mode, **arrays)
                assert found.gradient.tolist() == [0.0, 0.0, 0.0, -0.25]
                assert found.loss == -0.25
                assert [each.tolist() for each in apart] == [[0.0, 0.0, 0.0, -1.0]] * 2 + [[0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_a_mean_of_weights_is_of_those_that_are_numbers(level):
    """One log-prob that is missing made every weight of the batch a NaN."""
    arrays = arguments_for(Mode(DRPO(delta=0.1), anchor=Proximal()), batch(seed=13, valid=1.0))
    weight = ImportanceWeight(level=level, high=2.0, normalize=True)
    arrays["behavior_log_prob"][0, 2] = np.nan
    found = token_loss_and_gradient(quiet(weight), **arrays).weight
    spoilt_ones = np.isnan(found)
    assert spoilt_ones.sum() == (1 if level == "token" else 7)
    alone = arrays | {"mask": arrays["mask"] & ~spoilt_ones}
    np.testing.assert_array_equal(np.where(spoilt_ones, 0.0, found), token_loss_and_gradient(quiet(weight), **alone).weight)
    # and a mask on the same edge leaves the token out
    mode = quiet(weight, RatioMask(level=level))
    np.testing.assert_array_equal(token_loss_and_gradient(mode, **arrays).weight, np.where(spoilt_ones, 0.0, found))


def test_tokens_that_a_mask_leaves_out_of_the_count_have_no_penalty():
    """Neither in `policy_loss_and_gradient` nor in `token_loss_and_gradient`; with count_masked=True they have."""
    for count_masked in (False, True):
        mode = Mode(
            DRPO(delta=0.5),
            corrections=(Fixed((0.0, 1.0)),),
            penalties=(Penalty(coefficient=0.5, estimator="k2", to="behavior"),),
            reduction="token_sum",
            count_masked=count_masked,
        )
        arrays = {"log_prob": np.array([-1.0, -1.0]), "behavior_log_prob": np.array([-2.0, -2.0]), "advantages": np.zeros(2)}
        apart = token_loss_and_gradient(mode, **arrays)
        together = policy_loss_and_gradient(mode, **arrays, mask=np.ones(2, dtype=bool), engine="arrays")
        assert apart.gradient.tolist() == together.gradient.tolist() == [0.5 * count_masked, 0.5]
        assert apart.loss.sum() == together.loss


def test_a_reduction_whose_denominator_no_mask_says_is_not_counted():
    for mode in (
        Mode(DRPO(delta=0.1), reduction="token_sum"),
        Mode(DRPO(delta=0.1), corrections=(Veto(),), count_masked=False),
    ):
        with pytest.raises(ValueError, match=r"^(reduction: expected one that counts|count_masked: .* counts)"):
            reduction_count(mode.reduce, np.ones((2, 3), dtype=bool), dtype=np.float64)
    counts_all = quiet(ImportanceWeight(high=2.0, outside="zero"), count_masked=False)
    assert reduction_count(counts_all.reduce, np.ones((2, 3), dtype=bool), dtype=np.float64) == 6.0


# --- double ratios ----------------------------------------------------------------------------------------------------------

STEPS = {"policy/behavior": {1, 2}, "policy/proximal": {1}, "proximal/behavior": {2}}
"""π/π_old is step 1, π_old/μ step 2, π/μ both."""

ANCHORS = {
    Behavior(): "policy/behavior",
    Proximal(): "policy/proximal",
    Sequence(Behavior()): "policy/behavior",
    Sequence(Proximal()): "policy/proximal",
    Prefix(Behavior()): "policy/behavior",
    Prefix(Sequence(Proximal())): "policy/proximal",
}
WEIGHTS = [e for e in EXAMPLES if getattr(e, "counts", None) is not None]
OTHERS = [e for e in EXAMPLES if hasattr(e, "factor") and e.counts is None]


def warned(*arguments, **fields):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DoubleRatioWarning)
        Mode(*arguments, **fields)
    return [str(w.message) for w in caught if w.category is DoubleRatioWarning]


def correction_at(weight, edge):
    return dataclasses.replace(weight, edge=edge)


@pytest.mark.parametrize("anchor", ANCHORS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_a_weight_on_an_edge_that_the_anchor_counts_warns(weight, anchor):
    for edge, steps in STEPS.items():
        again = steps & STEPS[ANCHORS[anchor]]
        found = warned(DRPO(delta=0.1), anchor=anchor, corrections=(correction_at(weight, edge),))
        assert len(found) == len(again)
        assert all(repr(anchor) in line and repr(correction_at(weight, edge)) in line for line in found)
        # an objective without the ratio in its gradient counts none
        assert warned(Constant(), anchor=anchor, corrections=(correction_at(weight, edge),)) == []


@pytest.mark.parametrize(("one", "other"), list(itertools.product(STEPS, STEPS)))
def test_two_weights_that_share_a_step_warn(one, other):
    pair = (ImportanceWeight(edge=one, high=2.0), VariationalWeight(edge=other))
    assert len(warned(Constant(), corrections=pair)) == len(STEPS[one] & STEPS[other])


@pytest.mark.parametrize("anchor", ANCHORS, ids=str)
@pytest.mark.parametrize("correction", OTHERS, ids=str)
def test_masks_and_what_counts_no_ratio_do_not_warn(correction, anchor):
    assert warned(DRPO(delta=0.1), anchor=anchor, corrections=(correction, correction)) == []


def test_penalties_do_not_warn():
    assert warned(DRPO(delta=0.1), penalties=(Penalty(coefficient=1.0, estimator="r·k1"),)) == []


def test_the_warning_is_at_the_line_that_makes_the_mode():
    with pytest.warns(DoubleRatioWarning, match="the ratio proximal/behavior multiplies the gradient twice") as caught:
        Mode(DRPO(delta=0.1), corrections=(ImportanceWeight(high=2.0),))
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    assert message.endswith(f"by the anchor Behavior() and by {ImportanceWeight(high=2.0)!r}")


# --- text and dicts -------------------------------------------------------------------------------------------------------

NAMES = {
    name: getattr(module, name)
    for module in (objectives, anchors, corrections, penalties)
    for name in module.__all__
    if isinstance(getattr(module, name), type)
} | {"Mode": Mode}


def silently(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


@pytest.mark.parametrize("mode", MODES, ids=repr)
def test_text_and_dicts_give_the_same_mode(mode):
    assert silently(eval, repr(mode), dict(NAMES)) == mode
    values = mode.to_dict()
    assert silently(Mode.from_dict, values) == mode
    assert silently(Mode.from_dict, json.loads(json.dumps(values))) == mode
    assert hash(silently(Mode.from_dict, values)) == hash(mode)
    assert values["kind"] == "Mode"


def toml(values):
    """A value as TOML writes it inline."""
    if isinstance(values, dict):
        return "{" + ", ".join(f"{key} = {toml(value)}" for key, value in values.items()) + "}"
    return "[" + ", ".join(map(toml, values)) + "]" if isinstance(values, list) else json.dumps(values)


def optional_fields():
    """Every part with None where it may be, and is not by default."""
    for part in [*dict.fromkeys(EXAMPLES), *ALL]:
        for name, hint in typing.get_type_hints(type(part)).items():
            choices = typing.get_args(hint)
            assert "none" not in choices, f"{type(part).__name__}.{name}: 'none' stands for None in a dict"
            if isinstance(hint, types.UnionType) and type(None) in choices and getattr(part, name) is not None:
                try:
                    yield dataclasses.replace(part, **{name: None})
                except (TypeError, ValueError):
                    continue  # an objective needs one of its thresholds


def test_none_is_kept_by_yaml_and_toml():
    parts = list(optional_fields())
    assert corrections.Veto(low=None, high=3.0) in parts
    for part in parts:
        kind = "objective" if hasattr(part, "weight") else "corrections"
        mode = with_corrections(part if kind == "objective" else DRPO(delta=0.1), Behavior(), (part,) * (kind != "objective"))
        text = toml(mode.to_dict())
        assert silently(Mode.from_dict, tomllib.loads(f"mode = {text}")["mode"]) == mode
        yaml = pytest.importorskip("yaml")
        assert silently(Mode.from_dict, yaml.safe_load(yaml.safe_dump(mode.to_dict()))) == mode


def test_different_modes_are_different():
    assert len(set(MODES)) == len({repr(mode) for mode in MODES}) == len({json.dumps(mode.to_dict()) for mode in MODES})


def test_the_text_leaves_out_what_has_its_default():
    assert repr(Mode(DRPO(delta=0.1))) == "Mode(DRPO(delta=0.1))"
    mode = Mode(PPOClip(eps=0.2), anchor=Sequence(Proximal()), corrections=[Veto()])
    assert repr(mode) == "Mode(PPOClip(eps=0.2), anchor=Sequence(Proximal()), corrections=(Veto(),))"
    assert mode.corrections == (Veto(),)
    assert mode.to_dict() == {
        "kind": "Mode",
        "objective": {"kind": "PPOClip", "eps": 0.2},
        "anchor": {"kind": "Sequence", "of": {"kind": "Proximal"}},
        "corrections": [{"kind": "Veto"}],
    }


@dataclasses.dataclass(frozen=True)
class Own:
    """An objective of a user's."""

    def loss(self, tokens):
        """A."""
        return tokens.advantages

    def weight(self, tokens):
        """1."""
        return tokens.xp.ones_like(tokens.advantages)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "Moods"}, "kind: expected the name of a class of drpo_core's modes, got 'Moods'"),
        ({"objective": {"kind": "DRPO", "delta": 0.1}}, "kind: expected the name of a class of drpo_core's modes, got 'None'"),
        ({"kind": "Mode", "objective": {"kind": "DRPO", "epsilon": 0.1}}, "DRPO: expected keys among delta, .*, got epsilon"),
        ({"kind": "Mode", "objectives": 1}, "Mode: expected keys among objective, anchor, .*, got objectives"),
        ({"kind": "Mode", "objective": {"kind": "family_of"}}, "kind: expected the name of a class"),
        ({"kind": "DRPO", "delta": 0.1}, "values: expected the dict of a Mode, got that of a DRPO"),
        ({"kind": "Mode"}, "Mode: expected a value for objective"),
        (
            {"kind": "Mode", "objective": {"kind": "DRPO", "delta": 0.1}, "penalties": [{"kind": "Penalty"}]},
            "Penalty: expected a value for coefficient",
        ),
    ],
)
def test_errors_of_dicts(values, message):
    with pytest.raises(ValueError, match=message):
        Mode.from_dict(values)


def test_a_dict_names_only_classes_of_drpo_core():
    with pytest.raises(
        ValueError, match="Own: expected a class of drpo_core, because a dict can't name one of another module"
    ):
        Mode(Own()).to_dict()


# --- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"objective": DRPO}, TypeError, "objective: expected an instance such as .*, got the class DRPO"),
        ({"objective": "drpo"}, TypeError, "objective: expected methods loss and weight, got str"),
        ({"objective": Mode(DRPO(delta=0.1))}, TypeError, r"objective: expected an objective, got the mode Mode\(DRPO"),
        ({"anchor": Proximal}, TypeError, r"anchor: expected an anchor such as Proximal\(\), got the class Proximal"),
        ({"anchor": "proximal"}, TypeError, "anchor: expected an anchor such as .*, got 'proximal'"),
        ({"corrections": Veto()}, TypeError, "corrections: expected a tuple, got Veto"),
        ({"corrections": (Veto,)}, TypeError, "corrections: expected a tuple of corrections, got the class Veto"),
        (
            {"corrections": (Penalty(coefficient=1.0),)},
            TypeError,
            r"corrections: expected a tuple of corrections, got Penalty\(",
        ),
        ({"penalties": Penalty(coefficient=1.0)}, TypeError, "penalties: expected a tuple, got Penalty"),
        ({"penalties": (Veto(),)}, TypeError, r"penalties: expected a tuple of penalties, got Veto\("),
        ({"reduction": "mean"}, ValueError, "reduction: expected one of 'token_mean', .*, got 'mean'"),
        ({"reduction": ["token_mean"]}, ValueError, r"reduction: expected one of 'token_mean', .*, got \['token_mean'\]"),
        ({"reduction": token_mean}, ValueError, "reduction: expected one of 'token_mean', .*, got <function"),
        ({"horizon": 3.0}, ValueError, "horizon: expected None with reduction 'token_mean', got 3.0"),
        (
            {"horizon": 0.0, "reduction": "sequence_mean_token_sum"},
            ValueError,
            "horizon: expected a finite number greater than 0",
        ),
        ({"horizon": "3", "reduction": "sequence_mean_token_sum"}, TypeError, "horizon: expected a real number, got str"),
        ({"count_masked": 1}, TypeError, "count_masked: expected True or False, got 1"),
    ],
)
def test_errors(fields, error, message):
    with pytest.raises(error, match=message):
        Mode(**{"objective": DRPO(delta=0.1)} | fields)


def test_a_flag_of_a_correction_is_one():
    with pytest.raises(TypeError, match="normalize: expected True or False, got 'yes'"):
        ImportanceWeight(normalize="yes")


@pytest.mark.parametrize("function", [token_loss_and_gradient, policy_loss_and_gradient])
def test_errors_of_log_probs(function):
    arrays = batch(seed=9)
    for name in ("proximal_log_prob", "reference_log_prob"):
        without = {n: a for n, a in arrays.items() if n != name}
        with pytest.raises(
            ValueError, match=rf"{name}: expected log-probs of the sampled tokens, which Mode\(.* needs, got None"
        ):
            function(WHOLE, **without)
        with pytest.raises(ValueError, match=rf"{name}: expected the shape of log_prob, \(5, 7\), got \(7,\)"):
            function(WHOLE, **arrays | {name: arrays[name][0]})
        with pytest.raises(TypeError, match=f"{name}: expected a real floating dtype, got int64"):
            function(WHOLE, **arrays | {name: np.zeros((5, 7), dtype=np.int64)})
        with pytest.raises(
            ValueError, match=rf"{name}: expected None, because DRPO\(.*\) is no Mode that uses it, got an array"
        ):
            function(
                DRPO(delta=0.1),
                **{n: a for n, a in arrays.items() if n == name or not n.startswith(("proximal", "reference"))},
            )


@pytest.mark.parametrize("function", [token_loss_and_gradient, policy_loss_and_gradient])
def test_log_probs_without_an_effect_are_refused(function):
    """Else a mode that lacks the anchor that was meant would train on, as an objective would not."""
    arrays = batch(seed=9)
    for name in ("proximal_log_prob", "reference_log_prob"):
        used = {n: arrays[n] for n in ("log_prob", "behavior_log_prob", "advantages", "mask", name)}
        with pytest.raises(ValueError, match=rf"{name}: expected None, because Mode\(.* does not use it .*: none"):
            function(Mode(DRPO(delta=0.1)), **used)


@pytest.mark.parametrize("objective", [WHOLE, DRPO(delta=0.1)], ids=["mode", "objective"])
def test_across_is_a_function(objective):
    arrays = {n: a for n, a in batch().items() if n not in {"proximal_log_prob", "reference_log_prob"} or objective is WHOLE}
    with pytest.raises(TypeError, match=r"^across: expected a function, .*, got 'sum'"):
        token_loss_and_gradient(objective, **arrays, across="sum")


def test_the_reduction_is_the_mode_s():
    arrays = arguments_for(WHOLE, batch())
    with pytest.raises(ValueError, match=r"reduction: expected None, because Mode\(.* has its own, got <function token_mean"):
        policy_loss_and_gradient(WHOLE, **arrays, reduction=token_mean)


def test_arguments_are_those_of_the_parts():
    assert WHOLE.arguments == ("proximal_log_prob", "reference_log_prob")
    assert Mode(DRPO(delta=0.1)).arguments == ()
    assert Mode(DRPO(delta=0.1), anchor=Proximal()).arguments == ("proximal_log_prob",)
    assert Mode(DRPO(delta=0.1), penalties=(Penalty(coefficient=1.0, to="behavior"),)).arguments == ()
    for mode in MODES:
        arrays = batch(seed=10)
        if getattr(mode.objective, "divergence", None) == "per_token":
            arrays["divergence"] = np.full(arrays["mask"].shape, 0.05)
        # these are enough, and each is needed
        policy_loss_and_gradient(mode, **arguments_for(mode, arrays), diagnostics=False, engine="arrays")
        for name in mode.arguments:
            with pytest.raises(ValueError, match=f"{name}: expected log-probs"):
                policy_loss_and_gradient(mode, **{n: a for n, a in arguments_for(mode, arrays).items() if n != name})


def test_horizon_is_kept_as_a_python_float():
    mode = Mode(DRPO(delta=0.1), reduction="sequence_mean_token_sum", horizon=np.float32(4.0))
    assert type(mode.horizon) is float
    assert mode.reduce.keywords == {"horizon": 4.0}
    assert Mode(DRPO(delta=0.1)).reduce is token_mean


def test_per_token_divergences_pass_through_a_mode():
    arrays = {n: a for n, a in batch(seed=11).items() if not n.startswith(("proximal", "reference"))}
    objective = DPPO(delta=0.1, divergence="per_token")
    measured = np.linspace(0.0, 0.2, 35).reshape(5, 7)
    one, other = (policy_loss_and_gradient(o, **arrays, divergence=measured) for o in (Mode(objective), objective))
    np.testing.assert_array_equal(one.gradient, other.gradient)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_masked_tokens_hold_never_matters(dtype):
    arrays = {n: a if n == "mask" else a.astype(dtype) for n, a in batch(seed=12).items()}
    clean = {n: a if n == "mask" else np.where(arrays["mask"], a, dtype == "float32") for n, a in arrays.items()}
    one, other = (policy_loss_and_gradient(WHOLE, **arguments_for(WHOLE, each)) for each in (arrays, clean))
    assert one.loss == other.loss
    np.testing.assert_array_equal(one.gradient, other.gradient)
    assert (one.gradient[~arrays["mask"]] == 0.0).all()
    assert all(
        a == b or math.isnan(a)
        for a, b in zip(summarize(one.diagnostics).values(), summarize(other.diagnostics).values(), strict=True)
    )


def test_modes_are_kept_out_of_the_top_level():
    assert not {"Mode", "DoubleRatioWarning", "Penalty", "Veto", "Proximal"} & set(drpo_core.__all__)


def test_numpy_read_only_inputs_are_not_written_to():
    arrays = arguments_for(WHOLE, batch())
    before = {n: a.copy() for n, a in arrays.items()}
    Backend.NUMPY_READ_ONLY.run(policy_loss_and_gradient, WHOLE, **arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name])
