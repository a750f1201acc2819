"""Loss and weight of every objective on the same six hand-computed tokens, its errors, warnings and dataclass."""

import dataclasses
import math
import warnings
from math import log

import numpy as np
import pytest
from backends import Backend

import drpo_core
from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    PolicyGradient,
    PPOClip,
    Tokens,
    VacuousTrustRegionWarning,
    binary_kl,
    cispo_loss,
    cispo_weight,
    dppo_loss,
    dppo_weight,
    drpo_loss,
    drpo_weight,
    importance_ratio,
    mask_drpo_loss,
    mask_drpo_weight,
    policy_gradient_loss,
    policy_gradient_weight,
    ppo_clip_loss,
    ppo_clip_weight,
    probability_shift,
    spo_loss,
    spo_weight,
)

# eager JAX compiles every operation by itself: that is slow, and the same operations as under jit
BACKENDS = [b for b in Backend if b is not Backend.JAX]

# token     0            1           2            3             4             5
#           diverging    on-policy   diverging    converging    converging    inert
# r         2            1           1/2          3/2           1/4           2
# π − μ     1/4          0           −3/10        3/10          −3/10         1/4
LOG_PROB = np.log([0.5, 0.2, 0.3, 0.9, 0.1, 0.5])
BEHAVIOR = np.log([0.25, 0.2, 0.6, 0.6, 0.4, 0.25])
ADVANTAGES = np.array([1.0, 1.0, -1.0, -2.0, 0.5, 0.0])
PG = [-1 * 2.0, -1 * 1.0, 1 * 0.5, 2 * 1.5, -0.5 * 0.25, 0.0]  # −A r
KL_0 = 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)  # 0.131
KL_2 = 0.6 * log(0.6 / 0.3) + 0.4 * log(0.4 / 0.7)  # 0.192

CASES = {
    "policy gradient": (policy_gradient_loss, policy_gradient_weight, {}, PG, [1, 1, 1, 1, 1, 1]),
    "truncated policy gradient": (
        policy_gradient_loss,
        policy_gradient_weight,
        {"max_ratio": 1.2},
        [-1.2 * (1 + log(2 / 1.2)), -1.0, 0.5, 2 * 1.2 * (1 + log(1.5 / 1.2)), -0.125, 0.0],
        [1.2 / 2, 1, 1, 1.2 / 1.5, 1, 1.2 / 2],
    ),
    "ppo": (
        ppo_clip_loss,
        ppo_clip_weight,
        {"eps": 0.2},
        [-1.2, -1.0, 1 - 0.2, 2 * 1.5, -0.5 * 0.25, 0.0],
        [0, 1, 0, 1, 1, 1],
    ),
    "ppo, clip-higher": (
        ppo_clip_loss,
        ppo_clip_weight,
        {"eps_low": 0.6, "eps_high": 0.2},
        [-1.2, -1.0, 0.5, 2 * 1.5, -0.5 * 0.25, 0.0],
        [0, 1, 1, 1, 1, 1],
    ),
    "ppo, clip-lower": (
        ppo_clip_loss,
        ppo_clip_weight,
        {"eps_low": 0.2, "eps_high": 1.1},
        [-2.0, -1.0, 1 - 0.2, 2 * 1.5, -0.5 * 0.25, 0.0],
        [1, 1, 0, 1, 1, 1],
    ),
    "ppo, dual clip": (
        ppo_clip_loss,
        ppo_clip_weight,
        {"eps": 0.2, "dual_clip": 1.4},
        [-1.2, -1.0, 1 - 0.2, 2 * 1.4, -0.5 * 0.25, 0.0],  # only token 3 has A < 0 and r > 1.4
        [0, 1, 0, 0, 1, 1],
    ),
    "cispo": (
        cispo_loss,
        cispo_weight,
        {"max_ratio": 1.2},
        [-1.2 * log(0.5), -1.0 * log(0.2), 0.5 * log(0.3), 2 * 1.2 * log(0.9), -0.5 * 0.25 * log(0.1), 0.0],
        [1.2 / 2, 1, 1, 1.2 / 1.5, 1, 1.2 / 2],
    ),
    "spo": (
        spo_loss,
        spo_weight,
        {"eps": 0.4},
        [-2.0 + 1 / 0.8, -1.0, 0.5 + 0.25 / 0.8, 3.0 + 2 * 0.25 / 0.8, -0.125 + 0.5 * 0.5625 / 0.8, 0.0],
        [1 - 1 / 0.4, 1, 1 - 0.5 / 0.4, 1 + 0.5 / 0.4, 1 + 0.75 / 0.4, 1],
    ),
    "spo, two sides": (
        spo_loss,
        spo_weight,
        {"eps_low": 0.8, "eps_high": 0.4},
        [-2.0 + 1 / 0.8, -1.0, 0.5 + 0.25 / 1.6, 3.0 + 2 * 0.25 / 1.6, -0.125 + 0.5 * 0.5625 / 0.8, 0.0],
        [1 - 1 / 0.4, 1, 1 - 0.5 / 0.8, 1 + 0.5 / 0.8, 1 + 0.75 / 0.4, 1],
    ),
    "dppo": (dppo_loss, dppo_weight, {"delta": 0.2}, [0.0, -1.0, 0.0, 3.0, -0.125, 0.0], [0, 1, 0, 1, 1, 1]),
    "dppo, two sides": (
        dppo_loss,
        dppo_weight,
        {"delta_low": 0.4, "delta_high": 0.2},
        [0.0, -1.0, 0.5, 3.0, -0.125, 0.0],
        [0, 1, 1, 1, 1, 1],
    ),
    "dppo, truncated": (
        dppo_loss,
        dppo_weight,
        {"delta_low": 0.2, "delta_high": 0.4, "max_ratio": 1.2},
        [-1.2 * (1 + log(2 / 1.2)), -1.0, 0.0, 2 * 1.2 * (1 + log(1.5 / 1.2)), -0.125, 0.0],
        [1.2 / 2, 1, 0, 1.2 / 1.5, 1, 1.2 / 2],
    ),
    "dppo, binary KL": (
        dppo_loss,
        dppo_weight,
        {"delta": (KL_0 + KL_2) / 2, "divergence": "binary_kl"},
        [-2.0, -1.0, 0.0, 3.0, -0.125, 0.0],
        [1, 1, 0, 1, 1, 1],
    ),
    "dppo, binary KL, two sides": (
        dppo_loss,
        dppo_weight,
        {"delta_low": 0.2, "delta_high": 0.1, "divergence": "binary_kl"},
        [0.0, -1.0, 0.5, 3.0, -0.125, 0.0],
        [0, 1, 1, 1, 1, 1],
    ),
    "dppo, measured divergence": (
        dppo_loss,
        dppo_weight,
        {"delta": 1.5, "divergence": np.array([1.5, 9.0, 1.6, 9.0, 9.0, 9.0])},
        [-2.0, -1.0, 0.0, 3.0, -0.125, 0.0],  # 1.5 is on the boundary, kept; 9 is outside but not diverging
        [1, 1, 0, 1, 1, 1],
    ),
    "drpo": (
        drpo_loss,
        drpo_weight,
        {"delta": 0.2},
        [
            -2.0 + 1 * 0.25 / 0.4,
            -1.0,
            0.5 + (-0.5) * (-0.3) / 0.4,
            3.0 + 2 * 0.5 * 0.3 / 0.4,
            -0.125 + 0.5 * (-0.75) * (-0.3) / 0.4,
            0.0,
        ],
        [1 - 0.25 / 0.2, 1, 1 - 0.3 / 0.2, 1 + 0.3 / 0.2, 1 + 0.3 / 0.2, 1],
    ),
    "drpo, two sides": (
        drpo_loss,
        drpo_weight,
        {"delta_low": 0.4, "delta_high": 0.2},
        [
            -2.0 + 0.25 * (2 - 1) ** 2 / 0.4,
            -1.0,
            0.5 + 0.6 * (0.5 - 1) ** 2 / 0.8,
            3.0 + 2 * 0.6 * (1.5 - 1) ** 2 / 0.8,
            -0.125 + 0.5 * 0.4 * (0.25 - 1) ** 2 / 0.4,
            0.0,
        ],
        [1 - 0.25 / 0.2, 1, 1 - 0.3 / 0.4, 1 + 0.3 / 0.4, 1 + 0.3 / 0.2, 1],
    ),
    "mask-drpo": (
        mask_drpo_loss,
        mask_drpo_weight,
        {"delta": 0.2},
        [
            -2.0 + 0.25 * ((2 - 1) ** 2 - (0.2 / 0.25) ** 2) / 0.4,
            -1.0,
            0.5 + 0.6 * ((0.5 - 1) ** 2 - (0.2 / 0.6) ** 2) / 0.4,
            3.0,
            -0.125,
            0.0,
        ],
        [1 - 0.25 / 0.2, 1, 1 - 0.3 / 0.2, 1, 1, 1],
    ),
    "mask-drpo, two sides": (
        mask_drpo_loss,
        mask_drpo_weight,
        {"delta_low": 0.4, "delta_high": 0.2},
        [-2.0 + 0.25 * ((2 - 1) ** 2 - (0.2 / 0.25) ** 2) / 0.4, -1.0, 0.5, 3.0, -0.125, 0.0],
        [1 - 0.25 / 0.2, 1, 1, 1, 1, 1],
    ),
}
PAIRS = {loss.__name__: (loss, weight, parameters) for loss, weight, parameters, _, _ in reversed(CASES.values())}
OBJECTIVES = {
    policy_gradient_loss: PolicyGradient,
    ppo_clip_loss: PPOClip,
    cispo_loss: CISPO,
    spo_loss: SPO,
    dppo_loss: DPPO,
    drpo_loss: DRPO,
    mask_drpo_loss: MaskDRPO,
}


def objective(loss, parameters):
    """The dataclass with the hyper-parameters of a case, and the measured divergence if the case has one."""
    fields, measured = dict(parameters), None
    if isinstance(fields.get("divergence"), np.ndarray):
        measured, fields["divergence"] = fields["divergence"], "per_token"
    return OBJECTIVES[loss](**fields), measured


@pytest.mark.parametrize("case", CASES)
def test_loss_and_weight(backend, case):
    loss, weight, parameters, expected_loss, expected_weight = CASES[case]
    arrays = (LOG_PROB, BEHAVIOR, ADVANTAGES)
    np.testing.assert_allclose(backend.run(loss, *arrays, **parameters), expected_loss, rtol=2e-14)
    np.testing.assert_allclose(backend.run(weight, *arrays, **parameters), expected_weight, rtol=2e-14)


@pytest.mark.parametrize("case", CASES)
def test_the_dataclass_delegates(case):
    loss, weight, parameters, _, _ = CASES[case]
    arrays = (LOG_PROB, BEHAVIOR, ADVANTAGES)
    made, measured = objective(loss, parameters)
    tokens = Tokens.checked(*arrays, divergence=measured)
    np.testing.assert_array_equal(made.loss(tokens), loss(*arrays, **parameters))
    np.testing.assert_array_equal(made.weight(tokens), weight(*arrays, **parameters))


@pytest.mark.parametrize(
    ("made", "inside"),
    [
        (PolicyGradient(), [1, 1, 1, 1, 1, 1]),
        (CISPO(max_ratio=1.2), [1, 1, 1, 1, 1, 1]),
        (PPOClip(eps_low=0.6, eps_high=0.8), [0, 1, 1, 1, 0, 0]),  # r of 2, 1, ½, 3/2, ¼, 2 in [0.4, 1.8]
        (SPO(eps_low=0.4, eps_high=1.1), [1, 1, 0, 1, 0, 1]),  # in [0.6, 2.1]
        (DPPO(delta_low=0.35, delta_high=0.2), [0, 1, 1, 0, 1, 0]),  # π − μ in [−0.35, 0.2]
        (DRPO(delta_low=0.35, delta_high=0.2), [0, 1, 1, 0, 1, 0]),
        (MaskDRPO(delta_low=0.2, delta_high=0.35), [1, 1, 0, 1, 0, 1]),
        # KL_bin 0.131, 0, 0.192, 0.311, 0.311 − …: token 4 is 0.4 log 4 + 0.6 log(0.6/0.9)
        (DPPO(delta_low=0.2, delta_high=0.1, divergence="binary_kl"), [0, 1, 1, 0, 0, 0]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_inside_is_the_region_whatever_the_advantage(backend, made, inside):
    def run(*arrays):
        return made.inside(Tokens.checked(*arrays))

    assert 0.4 * log(4) + 0.6 * log(0.6 / 0.9) > 0.2
    assert backend.run(run, LOG_PROB, BEHAVIOR, ADVANTAGES).tolist() == [bool(i) for i in inside]
    assert backend.run(run, LOG_PROB, BEHAVIOR, -ADVANTAGES).tolist() == [bool(i) for i in inside]


def test_nan_is_outside_every_region(backend):
    nan = np.array([np.nan])

    for made in (PolicyGradient(), CISPO(max_ratio=2.0), PPOClip(eps=0.2), SPO(eps=0.2), DPPO(delta=0.2), DRPO(delta=0.2)):

        def run(*arrays, made=made):
            return made.inside(Tokens.checked(*arrays))

        assert not backend.run(run, nan, np.array([-1.0]), np.array([1.0])), made
        assert not backend.run(run, np.array([-1.0]), nan, np.array([1.0])), made


@pytest.mark.parametrize("which", [0, 1, 2], ids=["log_prob", "behavior_log_prob", "advantages"])
def test_nan_at_a_valid_token_is_dropped_by_masks_and_shown_by_smooth_weights(backend, which):
    arrays = [np.array([-1.0, -1.0]), np.array([-1.1, -1.1]), np.array([1.0, -1.0])]
    arrays[which] = np.full(2, np.nan)
    for weight, parameters in (
        (ppo_clip_weight, {"eps": 0.2}),
        (dppo_weight, {"delta": 0.2}),
        (dppo_weight, {"delta": 0.2, "divergence": "binary_kl"}),
    ):
        assert (backend.run(weight, *arrays, **parameters) == 0.0).all()
    assert (backend.run(dppo_loss, *arrays, delta=0.2) == 0.0).all()
    for weight, parameters in ((drpo_weight, {"delta": 0.2}), (mask_drpo_weight, {"delta": 0.2}), (spo_weight, {"eps": 0.2})):
        assert np.isnan(backend.run(weight, *arrays, **parameters)).all()


def test_a_nan_divergence_drops_its_token(backend):
    weight = backend.run(dppo_weight, LOG_PROB, BEHAVIOR, ADVANTAGES, delta=9.0, divergence=np.full(6, np.nan))
    assert weight.tolist() == [0, 1, 0, 1, 1, 1]  # the diverging ones


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_boundary_is_kept(backend, sign):
    """At |π − μ| = δ exactly DPPO keeps and DRPO's weight is 0; a hair inside the boundary's other side, not."""
    x, b = (np.log([0.5]), np.log([0.25])) if sign > 0 else (np.log([0.25]), np.log([0.5]))
    a = np.array([sign])
    delta = abs(float(backend.run(probability_shift, x, b)[0]))
    assert backend.run(dppo_weight, x, b, a, delta=delta) == 1.0
    assert backend.run(drpo_weight, x, b, a, delta=delta) == 0.0
    assert backend.run(mask_drpo_weight, x, b, a, delta=delta) == 1.0
    below = math.nextafter(delta, 0.0)
    assert backend.run(dppo_weight, x, b, a, delta=below) == 0.0
    assert backend.run(drpo_weight, x, b, a, delta=below) < 0.0
    assert backend.run(mask_drpo_weight, x, b, a, delta=below) < 0.0


def test_the_boundary_of_the_ratio_and_of_the_kl_is_kept(backend):
    x, b, a = np.log([0.5]), np.log([0.25]), np.array([1.0])

    def excess(*arrays):
        return Tokens.checked(*arrays).ratio_minus_one

    eps = float(backend.run(excess, x, b, a)[0])
    assert backend.run(ppo_clip_weight, x, b, a, eps=eps) == 1.0
    assert backend.run(spo_weight, x, b, a, eps=eps) == 0.0
    assert backend.run(ppo_clip_weight, x, b, a, eps=math.nextafter(eps, 0.0)) == 0.0
    for pi, mu, advantage in ((x, b, a), (b, x, -a)):
        kl = float(backend.run(binary_kl, pi, mu)[0])
        assert backend.run(dppo_weight, pi, mu, advantage, delta=kl, divergence="binary_kl") == 1.0
        assert backend.run(dppo_weight, pi, mu, advantage, delta=math.nextafter(kl, 0.0), divergence="binary_kl") == 0.0
    ratio = float(backend.run(importance_ratio, x, b)[0])
    assert backend.run(ppo_clip_weight, x, b, -a, eps=0.2, dual_clip=ratio) == 1.0
    assert backend.run(ppo_clip_weight, x, b, -a, eps=0.2, dual_clip=math.nextafter(ratio, 0.0)) == 0.0


def test_mask_drpo_loss_is_continuous_at_the_boundary(backend):
    mu, delta = 0.25, 0.2
    pi = np.array([mu + delta - 1e-9, mu + delta + 1e-9])
    inside, outside = backend.run(mask_drpo_loss, np.log(pi), np.log([mu, mu]), np.ones(2), delta=delta)
    assert abs(inside - outside) < 2e-8


def test_beyond_the_saturated_ratio_the_corrective_weight_remains(backend):
    """At ℓ = 29 published losses return 0: their clamp removes the gradient where DRPO promises one."""
    x, b, a = np.array([-1.0]), np.array([-30.0]), np.array([1.0])
    pi, mu = math.exp(-1), math.exp(-30)
    np.testing.assert_allclose(backend.run(drpo_weight, x, b, a, delta=0.15), [1 - (pi - mu) / 0.15], rtol=1e-14)
    np.testing.assert_allclose(backend.run(spo_weight, x, b, a, eps=0.2), [1 - math.expm1(20) / 0.2], rtol=1e-8)
    assert np.isfinite(backend.run(drpo_loss, x, b, a, delta=0.15)).all()


def test_cispo_of_an_impossible_token_is_no_nan(backend):
    result = backend.run(cispo_loss, np.array([-math.inf]), np.array([-1.0]), np.array([1.0]), max_ratio=2.0)
    assert result == 0.0


def test_any_shape_is_kept(backend):
    for shape in [(), (0,), (2, 3)]:
        x = np.full(shape, -1.0)
        for loss, weight, parameters in PAIRS.values():
            if "divergence" not in parameters:
                assert backend.run(loss, x, x, x, **parameters).shape == shape
                assert backend.run(weight, x, x, x, **parameters).shape == shape


def test_half_precision_is_computed_in_float32(low_precision_backend):
    backend = low_precision_backend
    pi, mu = math.exp(-0.5), math.exp(-1.0)
    for dtype in ("float16", "bfloat16"):
        arrays = [backend.asarray([v], dtype) for v in (-0.5, -1.0, 1.0)]
        for loss, weight, parameters in PAIRS.values():
            for function in (loss, weight):
                assert backend.to_numpy(function(*arrays, **parameters)).dtype == np.float32
        np.testing.assert_allclose(
            backend.to_numpy(drpo_weight(*arrays, delta=0.5)), [1 - (pi - mu) / 0.5], rtol=1e-6, err_msg=dtype
        )


@pytest.mark.parametrize("name", PAIRS)
def test_shapes_and_dtypes_are_checked(backend, name):
    x = np.array([-1.0, -2.0])
    *pair, parameters = PAIRS[name]
    for function in pair:
        with pytest.raises(ValueError, match=r"advantages: expected the shape of log_prob, \(2,\), got \(1,\); per-sequence"):
            backend.run(function, x, x, x[:1], **parameters)
        with pytest.raises(ValueError, match=r"behavior_log_prob: expected the shape of log_prob, \(2,\), got \(2, 1\)"):
            backend.run(function, x, x[:, None], x, **parameters)
        with pytest.raises(TypeError, match=r"advantages: expected a real floating dtype, got .*int64"):
            backend.run(function, x, x, np.array([1, 2]), **parameters)
        with pytest.raises(TypeError, match="log_prob: expected an array of real floating dtype, got list"):
            backend.run(function, [-1.0, -2.0], x, x, **parameters)


def test_a_batch_of_advantages_is_not_broadcast_over_a_square_batch(backend):
    """With as many tokens as sequences a broadcast (B,) → (B, T) would pass unnoticed."""
    x = np.full((2, 2), -1.0)
    with pytest.raises(ValueError, match=r"advantages: .*expand_advantages\(advantages, mask\)"):
        backend.run(drpo_loss, x, x, np.ones(2), delta=0.5)


def test_the_measured_divergence_is_checked(backend):
    x = np.array([-1.0, -2.0])
    for function in (dppo_loss, dppo_weight):
        with pytest.raises(ValueError, match=r"divergence: expected the shape of log_prob, \(2,\), got \(1,\)"):
            backend.run(function, x, x, x, delta=0.5, divergence=x[:1])
        with pytest.raises(TypeError, match=r"divergence: expected a real floating dtype, got .*bool"):
            backend.run(function, x, x, x, delta=0.5, divergence=np.array([True, False]))


NAN = math.nan
THRESHOLD_ERRORS = [
    ({}, TypeError, "expected either {0} or both {0}_low and {0}_high, got none of them"),
    (
        {"{0}": 0.1, "{0}_low": 0.1},
        TypeError,
        "expected either {0} or both {0}_low and {0}_high, got {0} and {0}_low",
    ),
    ({"{0}_low": 0.1}, TypeError, "expected either {0} or both {0}_low and {0}_high, got {0}_low"),
    ({"{0}_high": 0.1}, TypeError, "expected either {0} or both {0}_low and {0}_high, got {0}_high"),
    ({"{0}": 0.0}, ValueError, "{0}: expected a finite number greater than 0, got 0.0"),
    ({"{0}": -0.1}, ValueError, "{0}: expected a finite number greater than 0, got -0.1"),
    ({"{0}": NAN}, ValueError, "{0}: expected a finite number greater than 0, got nan"),
    ({"{0}": math.inf}, ValueError, "{0}: expected a finite number greater than 0, got inf"),
    ({"{0}_low": 0.1, "{0}_high": 0.0}, ValueError, "{0}_high: expected a finite number greater than 0, got 0.0"),
    ({"{0}_low": -1.0, "{0}_high": 0.1}, ValueError, "{0}_low: expected a finite number greater than 0, got -1.0"),
    ({"{0}": "0.1"}, TypeError, "{0}: expected a real number, got str"),
    ({"{0}": True}, TypeError, "{0}: expected a real number, got bool"),
    ({"{0}": np.ones(2)}, TypeError, "{0}: expected a real number, got ndarray"),
]


@pytest.mark.parametrize("loss", [ppo_clip_loss, spo_loss, dppo_loss, drpo_loss, mask_drpo_loss], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("given", "error", "message"), THRESHOLD_ERRORS)
def test_threshold_errors(loss, given, error, message):
    name = "eps" if loss in {ppo_clip_loss, spo_loss} else "delta"
    given = {key.format(name): value for key, value in given.items()}
    x = np.array([-1.0])
    for make in (
        lambda: loss(x, x, x, **given),
        lambda: PAIRS[loss.__name__][1](x, x, x, **given),
        lambda: OBJECTIVES[loss](**given),
    ):
        with pytest.raises(error, match="^" + message.format(name) + "$"):
            make()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CISPO(max_ratio=0.0), ValueError, "max_ratio: expected a finite number greater than 0, got 0.0"),
        (lambda: CISPO(max_ratio=None), TypeError, "max_ratio: expected a real number, got NoneType"),
        (CISPO, TypeError, "max_ratio"),
        (lambda: PolicyGradient(max_ratio=-1.0), ValueError, "max_ratio: expected a finite number greater than 0, got -1.0"),
        (lambda: DPPO(delta=0.1, max_ratio=NAN), ValueError, "max_ratio: expected a finite number greater than 0, got nan"),
        (lambda: PPOClip(eps=0.2, dual_clip=1.0), ValueError, "dual_clip: expected a finite number greater than 1, got 1.0"),
        (
            lambda: DPPO(delta=0.1, divergence="tv"),
            ValueError,
            "divergence: expected 'binary_tv', 'binary_kl' or per-token divergences, got 'tv'",
        ),
        (lambda: DRPO(0.15), TypeError, "positional argument"),
    ],
)
def test_other_hyper_parameter_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_other_hyper_parameter_errors_of_the_functions():
    x = np.array([-1.0])
    for function in (policy_gradient_loss, policy_gradient_weight, cispo_loss, cispo_weight):
        with pytest.raises(ValueError, match=r"max_ratio: expected a finite number greater than 0, got 0.0"):
            function(x, x, x, max_ratio=0.0)
    for function in (dppo_loss, dppo_weight):
        with pytest.raises(ValueError, match=r"max_ratio: expected a finite number greater than 0, got 0.0"):
            function(x, x, x, delta=0.1, max_ratio=0.0)
        with pytest.raises(ValueError, match=r"divergence: expected 'binary_tv', 'binary_kl' or .*, got 'kl'"):
            function(x, x, x, delta=0.1, divergence="kl")
    for function in (ppo_clip_loss, ppo_clip_weight):
        with pytest.raises(ValueError, match=r"dual_clip: expected a finite number greater than 1, got 0.5"):
            function(x, x, x, eps=0.2, dual_clip=0.5)


def test_dppo_per_token_without_a_divergence_says_so():
    x = np.array([-1.0])
    message = r"^divergence: expected an array, because this DPPO objective has divergence='per_token', got None$"
    with pytest.raises(TypeError, match=message):
        drpo_core.token_loss_and_gradient(DPPO(delta=0.1, divergence="per_token"), x, x, x)


def test_the_string_per_token_is_no_divergence_of_the_function():
    x = np.array([-1.0])
    with pytest.raises(TypeError, match="divergence: expected an array"):
        dppo_loss(x, x, x, delta=0.1, divergence="per_token")


VACUOUS = {
    "drpo_loss": lambda x, d: drpo_loss(x, x, x, delta=d),
    "drpo_weight": lambda x, d: drpo_weight(x, x, x, delta=d),
    "mask_drpo_loss": lambda x, d: mask_drpo_loss(x, x, x, delta_low=0.1, delta_high=d),
    "mask_drpo_weight": lambda x, d: mask_drpo_weight(x, x, x, delta_low=d, delta_high=0.1),
    "dppo_loss": lambda x, d: dppo_loss(x, x, x, delta=d),
    "dppo_weight": lambda x, d: dppo_weight(x, x, x, delta=d),
    "DRPO": lambda _, d: DRPO(delta=d),
    "MaskDRPO": lambda _, d: MaskDRPO(delta=d),
    "DPPO": lambda _, d: DPPO(delta=d),
}


@pytest.mark.parametrize("name", VACUOUS)
def test_a_threshold_no_token_can_exceed_warns_once_and_at_the_caller(name):
    x = np.array([-1.0])
    for delta in (1.0, 12.5):
        with pytest.warns(VacuousTrustRegionWarning, match=f"delta = {delta:g} is at least 1, but abs") as caught:
            VACUOUS[name](x, delta)
        assert [(w.filename, w.lineno) for w in caught] == [(__file__, VACUOUS[name].__code__.co_firstlineno)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VACUOUS[name](x, math.nextafter(1.0, 0.0))


@pytest.mark.parametrize("name", VACUOUS)
def test_the_warning_names_the_objective_and_says_what_follows(name):
    objective = "Mask-DRPO" if name.lower().startswith("mask") else name.split("_")[0].upper()
    message = (
        f"^{objective}: delta = 1 is at least 1, but abs\\(π − μ\\) never exceeds 1, so no token can leave the trust region: "
        "nothing is masked and no gradient is corrected$"
    )
    with pytest.warns(VacuousTrustRegionWarning, match=message):
        VACUOUS[name](np.array([-1.0]), 1.0)


def test_thresholds_in_nats_or_of_the_callers_unit_do_not_warn():
    x = np.array([-1.0])
    DPPO(delta=2.0, divergence="binary_kl")
    DPPO(delta=2.0, divergence="per_token")
    dppo_loss(x, x, x, delta=2.0, divergence="binary_kl")
    dppo_weight(x, x, x, delta=2.0, divergence=x)
    SPO(eps=12.5)
    PPOClip(eps=1.5)


def test_using_an_objective_does_not_warn_again(backend):
    with pytest.warns(VacuousTrustRegionWarning):
        made = DRPO(delta=12.5)
    result = backend.run(drpo_core.token_loss_and_gradient, made, LOG_PROB, BEHAVIOR, ADVANTAGES)
    assert (np.abs(result.weight - 1.0) <= 1 / 12.5).all()


@pytest.mark.parametrize(
    "made",
    [
        PolicyGradient(),
        PolicyGradient(max_ratio=2.0),
        PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
        CISPO(max_ratio=5.0),
        SPO(eps=0.2),
        DPPO(delta=0.15, max_ratio=20.0),
        DRPO(delta=0.15),
        MaskDRPO(delta_low=0.1, delta_high=0.2),
    ],
    ids=lambda made: type(made).__name__,
)
def test_dataclasses_are_frozen_slotted_hashable_values(made):
    twin = dataclasses.replace(made)
    assert twin == made
    assert hash(twin) == hash(made)
    assert not hasattr(made, "__dict__")
    name = dataclasses.fields(made)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, 1.0)
    assert all(field.kw_only for field in dataclasses.fields(made))


def test_regions_are_low_then_high():
    assert DRPO(delta=0.15).region == (0.15, 0.15)
    assert DPPO(delta_low=0.1, delta_high=0.3).region == (0.1, 0.3)
    assert MaskDRPO(delta_low=0.1, delta_high=0.3).region == (0.1, 0.3)
    assert PPOClip(eps_low=0.2, eps_high=0.28).region == (0.2, 0.28)
    assert SPO(eps=0.2).region == (0.2, 0.2)


def test_an_on_policy_token_is_on_the_high_side():
    """A measured divergence can be positive where ℓ = 0: δ_high bounds it, however large δ_low is."""
    x = np.array([-1.0, -1.0])
    made = DPPO(delta_low=0.4, delta_high=0.2, divergence="per_token")
    assert made.inside(Tokens.checked(x, x, x, divergence=np.array([0.2, 0.3]))).tolist() == [True, False]


def test_hyper_parameters_are_kept_as_plain_floats():
    """A NumPy scalar would promote float32 tokens to float64."""
    half, x = np.float64(0.5), np.array([-1.0], dtype=np.float32)
    for made in (DRPO(delta=half), DPPO(delta=half, max_ratio=half), SPO(eps=half), CISPO(max_ratio=half), PPOClip(eps=half)):
        given = [value for value in dataclasses.astuple(made) if isinstance(value, float)]
        assert {type(value) for value in given} == {float}
        assert drpo_core.token_loss_and_gradient(made, x, x, x).loss.dtype == np.float32


def test_thresholds_may_be_any_real_number():
    x = np.array([-1.0])
    expected = drpo_weight(x, x, x, delta=0.5)
    for half in (np.float32(0.5), np.float64(0.5)):
        np.testing.assert_array_equal(drpo_weight(x, x, x, delta=half), expected)
    SPO(eps=1)


def test_cispo_of_an_impossible_token_is_0():
    """The limit of r log π at π = 0 is 0, where 0·(−∞) would be a NaN; where μ = 0 too, r = 1 and the value is 0."""
    impossible = np.array([-np.inf, -np.inf])
    np.testing.assert_array_equal(cispo_loss(impossible, np.array([-1.0, -np.inf]), np.ones(2), max_ratio=2.0), 0.0)
