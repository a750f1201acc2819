"""Every penalty against its scalar oracle, its gradient against differences of its value, and how it enters a loss."""

import json
import math

import numpy as np
import pytest
from backends import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from mode_oracles import (
    arguments_for,
    batch,
    examples_of,
    made_by,
    packed,
    penalties_of,
    quiet,
    sequences,
    spread_out,
)

from drpo_core import (
    DRPO,
    policy_loss_and_gradient,
    sequence_mean_token_mean,
    summarize,
    token_loss_and_gradient,
    token_mean,
)
from drpo_core import penalties as module
from drpo_core.corrections import ImportanceWeight, RatioMask
from drpo_core.modes import Mode
from drpo_core.penalties import CovariancePenalty, Penalty

EVERY = examples_of(module)
EXAMPLES = [example for example in EVERY if isinstance(example, Penalty)]
ESTIMATORS = list(dict.fromkeys(example.estimator for example in EXAMPLES))
TRUE = [name for name in ESTIMATORS if not name.endswith("+")]
"""Those whose gradient is the derivative of their value."""
FUZZ = settings(max_examples=60, derandomize=True, deadline=None)


def value_and_gradient(backend, made, arrays):
    """Of the penalty alone: without what the objective has, −A."""
    mode = quiet(made)
    result = backend.run(token_loss_and_gradient, mode, **arguments_for(mode, arrays))
    a = np.where(arrays["mask"], arrays["advantages"], 0.0)
    return result.loss + a, result.gradient + a


def expected(made, arrays):
    pairs = penalties_of(made, sequences(arrays))
    return tuple(spread_out([[pair[i] for pair in row] for row in pairs], arrays["mask"]) for i in (0, 1))


def test_every_public_penalty_and_estimator_has_an_example():
    assert made_by(module, "value_and_gradient") == {type(example) for example in EVERY}
    assert set(ESTIMATORS) == set(module._ESTIMATORS)  # noqa: SLF001 -- what the class accepts
    for kind in (Penalty, CovariancePenalty):
        of_kind = {example.to for example in EVERY if isinstance(example, kind)}
        assert of_kind == {"reference", "behavior", "proximal"}


@pytest.mark.parametrize("estimator", [*ESTIMATORS, None])
def test_padded_and_packed(backend, estimator):
    for made in (example for example in EVERY if getattr(example, "estimator", None) == estimator):
        arrays = batch(seed=1)
        wanted = expected(made, arrays)
        np.testing.assert_allclose(value_and_gradient(backend, made, arrays), wanted, rtol=1e-12, atol=1e-14)
        flat, places = packed(arrays)
        flat_wanted = [part[places] for part in wanted]
        np.testing.assert_allclose(value_and_gradient(backend, made, flat), flat_wanted, rtol=1e-12, atol=1e-14)


def at(ell, made=None, *, log_ratio=0.0, dtype=np.float64):
    """Value and gradient of one token, of ℓ nats to the other policy and of log r to μ."""
    x = np.array([min(ell, log_ratio, 0.0) - 1.0], dtype=dtype)
    others = {"behavior_log_prob": x - dtype(log_ratio), "reference_log_prob": x - dtype(ell), "advantages": 0 * x}
    result = token_loss_and_gradient(quiet(made), x, **others, mask=np.array([True]))
    return float(result.loss[0]), float(result.gradient[0])


@given(st.floats(-15.0, 15.0), st.floats(-3.0, 3.0), st.sampled_from(TRUE))
@FUZZ
def test_the_gradient_is_the_derivative_of_the_value(ell, log_ratio, estimator):
    made, h = Penalty(coefficient=0.7, estimator=estimator), 1e-5
    # log π moves ℓ and log r together
    up, down = (at(ell + s, made, log_ratio=log_ratio + s)[0] for s in (h, -h))
    value, gradient = at(ell, made, log_ratio=log_ratio)
    assert gradient == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-4 * max(1e-3, abs(value) * 1e-6))


@pytest.mark.parametrize(("form", "value"), [("k1+", "k1"), ("k3+", "k3")])
@given(ell=st.floats(-15.0, 15.0))
@FUZZ
def test_straight_through_has_the_value_of_one_and_the_gradient_of_k2(form, value, ell):
    made, of_value, of_gradient = (Penalty(coefficient=2.0, estimator=name) for name in (form, value, "k2"))
    assert at(ell, made) == (at(ell, of_value)[0], at(ell, of_gradient)[1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_where_the_policies_agree(estimator):
    """Value 0, and gradient 0 but for those of k1, which is no penalty, and r·k1, whose r + r ℓ is 1 there."""
    assert at(0.0, Penalty(coefficient=3.0, estimator=estimator)) == (0.0, 3.0 if estimator in {"k1", "r·k1"} else 0.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ten_thousand_nats_stay_finite_and_keep_their_sign(estimator, dtype):
    for nats in (1e4, -1e4, 25.0, -25.0):
        for log_ratio in (0.0, 1e4, -1e4):
            value, gradient = at(nats, Penalty(coefficient=1.0, estimator=estimator), log_ratio=log_ratio, dtype=dtype)
            assert math.isfinite(value)
            assert math.isfinite(gradient)
            if estimator not in {"k1", "r·k1"} and log_ratio >= 0.0:
                assert math.copysign(1.0, gradient) == math.copysign(1.0, nats)
            if estimator in {"k2", "k3", "k3+", "r·k3", "square"}:
                assert value >= 0.0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "square"])
def test_beyond_20_nats_value_and_gradient_stay_consistent(estimator):
    """A clamped value would have derivative 0 (OpenRLHF #1335 had NaN); k3 goes on along its tangent at ℓ = −20."""
    made = Penalty(coefficient=1.0, estimator=estimator)
    for nats in (-1e4, -21.0, 21.0, 1e4):
        up, down = (at(nats + s, made)[0] for s in (0.5, -0.5))
        assert at(nats, made)[1] == pytest.approx(up - down, rel=1e-6)
    around = [at(-20.0 + s, made) for s in (-1e-7, 0.0, 1e-7)]
    np.testing.assert_allclose(around, [around[1]] * 3, rtol=1e-6)


@given(st.lists(st.floats(-8.0, 8.0), min_size=2, max_size=6), st.sampled_from(["k2", "k3", "square", "k1+", "k3+"]))
@FUZZ
def test_the_gradient_rises_with_the_distance(ells, estimator):
    """A penalty pulls back harder the further away: its gradient is monotone in ℓ, and 0 at 0."""
    gradients = [at(ell, Penalty(coefficient=1.0, estimator=estimator))[1] for ell in sorted(ells)]
    assert gradients == sorted(gradients)


def chosen(log_prob, advantages, *, dtype=np.float64, **fields):
    """Where a covariance penalty acts: 1 nat above π_old everywhere, its gradient is 1 there."""
    x = np.asarray(log_prob, dtype)
    arrays = {"log_prob": x, "behavior_log_prob": x, "proximal_log_prob": x - dtype(1.0)}
    arrays |= {"advantages": np.asarray(advantages, dtype), "mask": np.ones(x.shape, dtype=bool)}
    return value_and_gradient(Backend.NUMPY, CovariancePenalty(coefficient=1.0, **fields), arrays)[1].round(6).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_the_share_is_never_exceeded(dtype):
    """Covariances 6, 1.5, 1.5, 0, 0, 0: equal ones are chosen together, or not at all."""
    x, a = [-1.0, -2.0, -2.0, -2.0, -2.5, -2.5], [6.0, 0.0, 0.0, 0.0, -3.0, -3.0]
    covariance = (np.array(a) - np.mean(a)) * (np.array(x) - np.mean(x))
    assert np.unique(covariance.round(12), return_counts=True)[1].tolist() == [3, 2, 1]
    for share, most in ((1e-9, 1), (0.3, 1), (1 / 3 + 1e-3, 1), (0.5, 3), (0.7, 3), (0.99, 3), (1.0, 6)):
        found = chosen(x, a, share=share, dtype=dtype)
        assert found == [1.0, 0.0, 0.0, 0.0, *[float(most > 1)] * 2] if most < 6 else [1.0] * 6


def test_equal_advantages_choose_nothing():
    """So a micro-batch of one sequence, or of solved prompts alone, has no penalty; and one token is never more than one."""
    assert not any(chosen([-1.0, -3.0, -0.5, -2.0], [0.5] * 4, share=0.5))
    assert chosen([-1.0], [2.0], share=1e-6) == [1.0]


def test_where_the_policies_agree_a_covariance_penalty_has_no_gradient():
    arrays = batch(seed=6)
    arrays["proximal_log_prob"] = np.where(arrays["advantages"] > 0.0, arrays["log_prob"], arrays["proximal_log_prob"])
    made = CovariancePenalty(coefficient=0.3, share=0.5)
    found = value_and_gradient(Backend.NUMPY, made, arrays)
    np.testing.assert_allclose(found, expected(made, arrays), rtol=1e-12, atol=1e-14)
    agree = arrays["mask"] & (arrays["log_prob"] == arrays["proximal_log_prob"])
    assert agree.any()
    np.testing.assert_allclose(np.stack(found)[:, agree], 0.0, atol=1e-15)


def test_a_covariance_penalty_needs_every_token():
    mode = quiet(CovariancePenalty(coefficient=0.3))
    with pytest.raises(ValueError, match=r"^across: what depends on an order of the tokens needs the whole"):
        policy_loss_and_gradient(mode, **arguments_for(mode, batch()), across=lambda array, _: array)


def test_it_acts_where_the_advantage_is_0_and_no_correction_multiplies_it():
    arrays = batch(seed=2)
    made = Penalty(coefficient=0.3, estimator="k2")
    corrections = (ImportanceWeight(high=0.5), RatioMask(low=0.9, high=1.1))
    plain, corrected = quiet(made), Mode(quiet().objective, corrections=corrections, penalties=(made,))
    without = Mode(quiet().objective, corrections=corrections)
    results = [token_loss_and_gradient(mode, **arguments_for(mode, arrays)) for mode in (plain, corrected, without)]
    wanted = expected(made, arrays)
    for i, name in enumerate(("loss", "gradient")):
        np.testing.assert_allclose(getattr(results[1], name) - getattr(results[2], name), wanted[i], rtol=1e-9, atol=1e-12)
    assert (results[1].weight == results[2].weight).all()


@pytest.mark.parametrize("engine", ["arrays", "compiled"])
@pytest.mark.parametrize("reduction", [token_mean, sequence_mean_token_mean], ids=lambda reduction: reduction.__name__)
def test_the_reduction_is_that_of_the_loss(reduction, engine):
    """Two penalties and an objective: the policy loss is the reduction of all three."""
    arrays = batch(seed=3)
    parts = (Penalty(coefficient=0.3), Penalty(coefficient=0.2, estimator="square", to="behavior"))
    mode = Mode(DRPO(delta=0.3), penalties=parts, reduction=reduction.__name__)
    given_arrays = arguments_for(mode, arrays)
    tokens = token_loss_and_gradient(mode, **given_arrays)
    weights = np.where(arrays["mask"], np.random.default_rng(0).random(arrays["mask"].shape), np.nan)
    for options in ({}, {"normalizer": 5.0}, {"token_weights": weights}):
        result = policy_loss_and_gradient(mode, **given_arrays, **options, engine=engine)
        np.testing.assert_allclose(result.loss, reduction(tokens.loss, arrays["mask"], **options), rtol=1e-12)
        by_one = [
            reduction(np.eye(1, arrays["mask"].size, i).reshape(arrays["mask"].shape), arrays["mask"], **options)
            for i in range(35)
        ]
        gradient = np.array(by_one).reshape(arrays["mask"].shape) * tokens.gradient
        np.testing.assert_allclose(result.gradient, gradient, rtol=1e-12, atol=1e-16)


def test_penalties_add_up():
    arrays = batch(seed=5)
    parts = (
        Penalty(coefficient=0.3),
        Penalty(coefficient=0.2, estimator="r·k1", to="proximal"),
        Penalty(coefficient=0.1, to="behavior"),
    )
    mode = quiet(*parts)
    still = arrays | {"advantages": np.zeros_like(arrays["advantages"])}
    found = token_loss_and_gradient(mode, **arguments_for(mode, still))
    wanted = np.sum([expected(part, arrays) for part in parts], axis=0)
    np.testing.assert_allclose([found.loss, found.gradient], wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("interpreted_loops")
def test_masked_junk_and_an_empty_batch():
    arrays = batch(seed=4)
    arrays["mask"] = np.zeros_like(arrays["mask"])
    for made in EVERY:
        mode = quiet(made)
        result = policy_loss_and_gradient(mode, **arguments_for(mode, arrays))
        none = {name: array[:0] for name, array in arguments_for(mode, arrays).items()}
        assert policy_loss_and_gradient(mode, **none).gradient.shape == (0, 7)
        assert result.loss == 0.0
        assert (result.gradient == 0.0).all()
        assert all(math.isnan(v) or v == 0.0 for k, v in summarize(result.diagnostics).items() if "count" not in k)


def test_a_nan_at_a_valid_token_is_not_hidden():
    for made in EXAMPLES:
        arrays = {n: a if n == "mask" else np.where(batch()["mask"], a, -1.0) for n, a in batch().items()}
        name = {"reference": "reference_log_prob", "behavior": "behavior_log_prob", "proximal": "proximal_log_prob"}[made.to]
        arrays[name] = np.where(np.arange(35).reshape(5, 7) == 3, np.nan, arrays[name])
        arrays["mask"] = np.ones((5, 7), dtype=bool)
        value, gradient = value_and_gradient(Backend.NUMPY, made, arrays)
        assert np.isnan(value.flat[3])
        assert np.isnan(value).sum() == 1
        assert np.isnan(gradient.flat[3]) or made.estimator == "k1"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"coefficient": 0.0}, ValueError, "coefficient: expected a finite number greater than 0, got 0.0"),
        ({"coefficient": -1.0}, ValueError, "coefficient: expected a finite number greater than 0, got -1.0"),
        ({"coefficient": math.nan}, ValueError, "coefficient: expected a finite number greater than 0, got nan"),
        ({"coefficient": "1"}, TypeError, "coefficient: expected a real number, got str"),
        ({"coefficient": 1.0, "estimator": "kl"}, ValueError, "estimator: expected one of 'k1', 'k2', 'k3'.*, got 'kl'"),
        ({"coefficient": 1.0, "to": "ref"}, ValueError, "to: expected one of 'reference', 'behavior', 'proximal', got 'ref'"),
        (
            {"coefficient": 1.0, "ratio": "reference"},
            ValueError,
            "ratio: expected one of 'behavior', 'proximal', got 'reference'",
        ),
        ({"coefficient": 1.0, "to": None}, ValueError, "to: expected one of"),
    ],
)
def test_errors(fields, error, message):
    with pytest.raises(error, match=message):
        Penalty(**fields)
    if "estimator" not in fields and "ratio" not in fields:
        with pytest.raises(error, match=message):
            CovariancePenalty(**fields)


@pytest.mark.parametrize(
    ("share", "error", "message"),
    [
        (0.0, ValueError, "^share: expected a finite number greater than 0, got 0.0$"),
        (1.5, ValueError, "^share: expected 1 or less, got 1.5$"),
        ("all", TypeError, "^share: expected a real number, got str"),
    ],
)
def test_a_share_is_one(share, error, message):
    with pytest.raises(error, match=message):
        CovariancePenalty(coefficient=1.0, share=share)


def test_arguments():
    assert Penalty(coefficient=1.0).arguments == ("reference_log_prob",)
    assert set(Penalty(coefficient=1.0, estimator="r·k1").arguments) == {"reference_log_prob", "behavior_log_prob"}
    assert Penalty(coefficient=1.0, to="proximal").arguments == ("proximal_log_prob",)
    assert CovariancePenalty(coefficient=1.0).arguments == ("proximal_log_prob",)
    on_update = Penalty(coefficient=1.0, estimator="r·k3", ratio="proximal")
    assert set(on_update.arguments) == {"reference_log_prob", "proximal_log_prob"}
    made = Penalty(coefficient=np.float32(0.5))
    assert type(made.coefficient) is float
    assert json.dumps(made.coefficient) == "0.5"
