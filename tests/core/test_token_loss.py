"""token_loss_and_gradient: −A r w by hand, masks, dtypes, saturation, and objectives that users write."""

import math

import numpy as np
import pytest

from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    PolicyGradient,
    PPOClip,
    TokenLoss,
    Tokens,
    token_loss_and_gradient,
)
from drpo_core import objectives as families

LOG_PROB = np.log([0.5, 0.2, 0.3, 0.9])
BEHAVIOR = np.log([0.25, 0.2, 0.6, 0.6])
ADVANTAGES = np.array([1.0, 1.0, -1.0, -2.0])  # r = 2, 1, ½, 3/2 and π − μ = 1/4, 0, −3/10, 3/10
OBJECTIVES = [
    PolicyGradient(),
    PolicyGradient(max_ratio=1.2),
    PPOClip(eps=0.2),
    PPOClip(eps=0.2, dual_clip=1.4),
    CISPO(max_ratio=1.2),
    SPO(eps=0.4),
    DPPO(delta=0.2),
    DPPO(delta=0.15, divergence="binary_kl"),
    DRPO(delta=0.2),
    MaskDRPO(delta=0.2),
    families.Reinforce(),
    CISPO(min_ratio=0.8, max_ratio=1.2),
    families.SAPO(tau_positive=2.0, tau_negative=4.0),
    families.IcePop(min_ratio=0.6, max_ratio=1.6),
    families.IPO(delta=0.28, max_ratio=1.2),
    families.TOPR(),
]
each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (PolicyGradient(), [-2.0, -1.0, 0.5, 3.0]),
        (PolicyGradient(max_ratio=1.2), [-1.2, -1.0, 0.5, 2 * 1.2]),
        (CISPO(max_ratio=1.2), [-1.2, -1.0, 0.5, 2 * 1.2]),
        (PPOClip(eps=0.2), [0.0, -1.0, 0.0, 3.0]),
        (PPOClip(eps=0.2, dual_clip=1.4), [0.0, -1.0, 0.0, 0.0]),
        (SPO(eps=0.4), [-2.0 * (1 - 1 / 0.4), -1.0, 0.5 * (1 - 0.5 / 0.4), 3.0 * (1 + 0.5 / 0.4)]),
        (DPPO(delta=0.2), [0.0, -1.0, 0.0, 3.0]),
        (DPPO(delta=0.15, divergence="binary_kl"), [-2.0, -1.0, 0.0, 3.0]),
        (DRPO(delta=0.2), [-2.0 * (1 - 0.25 / 0.2), -1.0, 0.5 * (1 - 0.3 / 0.2), 3.0 * (1 + 0.3 / 0.2)]),
        (MaskDRPO(delta=0.2), [-2.0 * (1 - 0.25 / 0.2), -1.0, 0.5 * (1 - 0.3 / 0.2), 3.0]),
        (families.Reinforce(), [-1.0, -1.0, 1.0, 2.0]),
        (families.IcePop(min_ratio=0.6, max_ratio=1.6), [0.0, -1.0, 0.0, 3.0]),
        (families.IPO(delta=0.28, max_ratio=1.2), [-1.2, -1.0, 0.0, 0.0]),
        (families.TOPR(), [-1.0, -1.0, 0.5, 2.0]),
        (CISPO(min_ratio=0.8, max_ratio=1.2), [-1.2, -1.0, 0.8, 2 * 1.2]),
        (
            families.SAPO(tau_positive=2.0, tau_negative=4.0),
            [-2.0 / math.cosh(1) ** 2, -1.0, 0.5 / math.cosh(1) ** 2, 3.0 / math.cosh(1) ** 2],
        ),
    ],
    ids=repr,
)
def test_gradient_by_hand(backend, objective, expected):
    result = backend.run(token_loss_and_gradient, objective, LOG_PROB, BEHAVIOR, ADVANTAGES)
    np.testing.assert_allclose(result.gradient, expected, rtol=2e-14)


def test_the_gradient_is_the_derivative_of_the_loss():
    """Central differences, away from every boundary; CISPO's loss is not a function with that derivative."""
    h = 1e-6
    for objective in OBJECTIVES:
        if not isinstance(objective, CISPO):
            up, down = (token_loss_and_gradient(objective, LOG_PROB + s, BEHAVIOR, ADVANTAGES).loss for s in (h, -h))
            gradient = token_loss_and_gradient(objective, LOG_PROB, BEHAVIOR, ADVANTAGES).gradient
            np.testing.assert_allclose((up - down) / (2 * h), gradient, rtol=1e-8, atol=1e-8, err_msg=repr(objective))


@each_objective
def test_loss_and_weight_are_those_of_the_methods(backend, objective):
    result = backend.run(token_loss_and_gradient, objective, LOG_PROB, BEHAVIOR, ADVANTAGES)
    assert type(result) is TokenLoss

    def methods(*arrays):
        tokens = Tokens.checked(*arrays)
        return objective.loss(tokens), objective.weight(tokens)

    loss, weight = backend.run(methods, LOG_PROB, BEHAVIOR, ADVANTAGES)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-14)
    np.testing.assert_allclose(result.weight, weight, rtol=1e-14)


def test_every_class_of_the_table_is_here():
    assert {type(objective) for objective in OBJECTIVES} == {family.objective for family in families.OBJECTIVES}


@each_objective
def test_on_policy_every_gradient_is_minus_the_advantage(backend, objective):
    result = backend.run(token_loss_and_gradient, objective, BEHAVIOR, BEHAVIOR, ADVANTAGES)
    np.testing.assert_array_equal(result.gradient, -ADVANTAGES)


@each_objective
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e4, -1e4])
def test_what_masked_positions_hold_changes_nothing(objective, garbage):
    """Bit for bit, without a RuntimeWarning."""
    mask = np.array([True, False, True, False])
    arrays = [LOG_PROB, BEHAVIOR, ADVANTAGES]
    expected = token_loss_and_gradient(objective, *arrays)
    result = token_loss_and_gradient(objective, *(np.where(mask, x, garbage) for x in arrays), mask=mask)
    for got, unmasked in zip(result, expected, strict=True):
        np.testing.assert_array_equal(got, np.where(mask, unmasked, 0.0))


def test_masked_nan_on_every_backend(backend):
    mask = np.array([True, True, False, False])
    arrays = [np.where(mask, x, np.nan) for x in (LOG_PROB, BEHAVIOR, ADVANTAGES)]
    result = backend.run(token_loss_and_gradient, DRPO(delta=0.2), *arrays, mask=mask)
    np.testing.assert_allclose(result.gradient, [-2.0 * (1 - 0.25 / 0.2), -1.0, 0.0, 0.0], rtol=2e-14)
    np.testing.assert_allclose(result.weight, [1 - 0.25 / 0.2, 1.0, 0.0, 0.0], rtol=2e-14)
    assert (result.loss[2:] == 0.0).all()


@each_objective
def test_all_masked_and_empty_batches_are_zero(objective):
    for shape in [(3,), (0,), (2, 0)]:
        nan, mask = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
        for array in token_loss_and_gradient(objective, nan, nan, nan, mask=mask):
            assert array.shape == shape
            assert (array == 0.0).all()


def test_a_measured_divergence_is_masked_too(backend):
    mask, measured = np.array([True, True, True, False]), np.array([0.1, 9.0, 0.3, np.nan])
    dppo = DPPO(delta=0.2, divergence="per_token")
    result = backend.run(token_loss_and_gradient, dppo, LOG_PROB, BEHAVIOR, ADVANTAGES, mask=mask, divergence=measured)
    np.testing.assert_allclose(result.gradient, [-2.0, -1.0, 0.0, 0.0], rtol=2e-14)


def test_inert_tokens_have_a_gradient_of_zero(backend):
    for objective in OBJECTIVES:
        result = backend.run(token_loss_and_gradient, objective, LOG_PROB, BEHAVIOR, np.zeros(4))
        assert (result.gradient == 0.0).all(), objective
        assert (result.loss == 0.0).all(), objective


def test_beyond_the_saturated_ratio_the_corrective_gradient_remains(backend):
    """ℓ = 20.1 and 90: the published clamp at ±20 gives 0 exactly where DRPO promises a way back."""
    log_prob, behavior = np.array([-0.5, -0.5]), np.array([-20.6, -90.5])
    shift = math.exp(-0.5) - np.exp(behavior)
    expected = -math.exp(20) * (1 - shift / 0.15)
    for dtype in (np.float64, np.float32):
        arrays = [x.astype(dtype) for x in (log_prob, behavior, np.ones(2))]
        gradient = backend.run(token_loss_and_gradient, DRPO(delta=0.15), *arrays).gradient
        assert (gradient > 0.0).all()
        np.testing.assert_allclose(gradient, expected, rtol=2e-6 if dtype is np.float32 else 1e-13)


def test_a_dropped_token_has_gradient_zero_whatever_its_ratio(backend):
    """Log μ → −100 in float32: 0 · e^100 must not become a NaN, nor anything but 0."""
    log_prob = np.array([-0.1, -math.inf, -1.0], dtype=np.float32)
    behavior = np.array([-100.0, -1.0, -math.inf], dtype=np.float32)
    advantages = np.array([1.0, -1.0, 1.0], dtype=np.float32)
    for objective in (DPPO(delta=0.15), PPOClip(eps=0.2), DPPO(delta=0.05, divergence="binary_kl")):
        result = backend.run(token_loss_and_gradient, objective, log_prob, behavior, advantages)
        assert (result.weight == 0.0).all(), objective
        assert (result.gradient == 0.0).all(), objective
        assert np.isfinite(result.loss).all(), objective


def test_nan_at_a_valid_token_is_dropped_or_shown(backend):
    arrays = [np.array([-0.5]), np.array([np.nan]), np.array([1.0])]
    assert backend.run(token_loss_and_gradient, DPPO(delta=0.15), *arrays).gradient == 0.0
    assert np.isnan(backend.run(token_loss_and_gradient, DRPO(delta=0.15), *arrays).gradient)


def test_the_gradient_has_the_dtype_of_the_log_prob(low_precision_backend):
    backend = low_precision_backend
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        arrays = [backend.asarray(x, dtype) for x in (LOG_PROB, BEHAVIOR, ADVANTAGES)]
        result = token_loss_and_gradient(DRPO(delta=0.5), *arrays)
        assert result.gradient.dtype == arrays[0].dtype
        computed = np.float64 if dtype == "float64" else np.float32
        assert backend.to_numpy(result.loss).dtype == computed
        assert backend.to_numpy(result.weight).dtype == computed
        expected = [-2.0 * 0.5, -1.0, 0.5 * 0.4, 3.0 * 1.6]
        resolution = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 1e-6, "float64": 1e-14}[dtype]
        np.testing.assert_allclose(np.asarray(backend.to_numpy(result.gradient), float), expected, rtol=4 * resolution)


def test_the_gradient_of_float32_log_probs_is_float32_whatever_the_arithmetic(backend):
    single = [array.astype(np.float32) for array in (LOG_PROB, BEHAVIOR, ADVANTAGES)]
    for advantages, computed in ((single[2], np.float32), (ADVANTAGES, np.float64)):
        result = backend.run(token_loss_and_gradient, DRPO(delta=0.5), *single[:2], advantages)
        assert [array.dtype for array in result] == [computed, np.float32, computed]


def test_half_precision_log_probs_with_float32_advantages(low_precision_backend):
    backend = low_precision_backend
    half, single = backend.asarray([-0.5], "bfloat16"), backend.asarray([1.0], "float32")
    assert token_loss_and_gradient(DRPO(delta=0.5), half, half, single).gradient.dtype == half.dtype
    assert token_loss_and_gradient(DRPO(delta=0.5), single, half, half).gradient.dtype == single.dtype


def test_an_objective_of_the_users_own(backend):
    class Damped:
        def loss(self, tokens):
            return -tokens.advantages * tokens.xp.log1p(tokens.ratio)

        def weight(self, tokens):
            return 1.0 / (1.0 + tokens.ratio)

    result = backend.run(token_loss_and_gradient, Damped(), LOG_PROB, BEHAVIOR, ADVANTAGES)
    np.testing.assert_allclose(result.gradient, [-2 / 3, -1 / 2, 0.5 / 1.5, 3 / 2.5], rtol=1e-14)


def test_inputs_are_not_changed():
    arrays = [LOG_PROB.copy(), BEHAVIOR.copy(), ADVANTAGES.copy(), np.array([True, False, True, True])]
    before = [x.copy() for x in arrays]
    for objective in OBJECTIVES:
        token_loss_and_gradient(objective, *arrays[:3], mask=arrays[3])
    for array, original in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, original)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"mask": np.ones(4)},
            TypeError,
            r"(?m)^mask: expected a bool dtype, got .*64.*; pass `mask != 0` \(per-token weights belong in token_weights\)$",
        ),
        ({"mask": np.ones((1, 4), dtype=bool)}, ValueError, r"mask: expected the shape of log_prob, \(4,\), got \(1, 4\)"),
        ({"mask": [True] * 4}, TypeError, "mask: expected an array of bool dtype, got list"),
        ({"divergence": np.ones(3)}, ValueError, r"divergence: expected the shape of log_prob, \(4,\), got \(3,\)"),
        ({"advantages": np.ones(1)}, ValueError, r"advantages: expected the shape of log_prob, \(4,\), got \(1,\)"),
        ({"log_prob": np.array([1, 2, 3, 4])}, TypeError, "log_prob: expected a real floating dtype, got .*int64"),
    ],
)
def test_errors(backend, changes, error, message):
    arguments = {"log_prob": LOG_PROB, "behavior_log_prob": BEHAVIOR, "advantages": ADVANTAGES} | changes
    with pytest.raises(error, match=message):
        backend.run(token_loss_and_gradient, DRPO(delta=0.2), **arguments)
