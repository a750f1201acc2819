"""Loss and weight of every objective on the same six hand-computed tokens, its errors, warnings and dataclass."""

import dataclasses
import math
import warnings
from math import log
from typing import NamedTuple

import numpy as np
import pytest
from backends import Backend

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
    importance_ratio,
    probability_shift,
    token_loss_and_gradient,
)
from drpo_core.objectives import IPO, OBJECTIVES, SAPO, TOPR, IcePop, Reinforce
from drpo_core.objectives.protocol import inside_of

# eager JAX compiles every operation by itself: that is slow, and the same operations as under jit
BACKENDS = [b for b in Backend if b is not Backend.JAX]

# token     0            1           2            3             4             5
#           diverging    on-policy   diverging    converging    converging    inert
# r         2            1           1/2          3/2           1/4           2
# π − μ     1/4          0           −3/10        3/10          −3/10         1/4
LOG_PROB = np.log([0.5, 0.2, 0.3, 0.9, 0.1, 0.5])
BEHAVIOR = np.log([0.25, 0.2, 0.6, 0.6, 0.4, 0.25])
ADVANTAGES = np.array([1.0, 1.0, -1.0, -2.0, 0.5, 0.0])
TOKENS = (LOG_PROB, BEHAVIOR, ADVANTAGES)
PG = [-1 * 2.0, -1 * 1.0, 1 * 0.5, 2 * 1.5, -0.5 * 0.25, 0.0]  # −A r
KL_0 = 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)  # 0.131
KL_2 = 0.6 * log(0.6 / 0.3) + 0.4 * log(0.4 / 0.7)  # 0.192


def logistic(x):
    return 1 / (1 + math.exp(-x))


class Case(NamedTuple):
    """An objective with its loss and weight of the six tokens, and their divergence if the caller measures it."""

    objective: object
    loss: list[float]
    weight: list[float]
    divergence: np.ndarray | None = None


CASES = {
    PolicyGradient: [
        Case(
            PolicyGradient(),
            PG,
            [1, 1, 1, 1, 1, 1],
        ),
        Case(
            PolicyGradient(max_ratio=1.2),
            [-1.2 * (1 + log(2 / 1.2)), -1.0, 0.5, 2 * 1.2 * (1 + log(1.5 / 1.2)), -0.125, 0.0],
            [1.2 / 2, 1, 1, 1.2 / 1.5, 1, 1.2 / 2],
        ),
    ],
    PPOClip: [
        Case(
            PPOClip(eps=0.2),
            [-1.2, -1.0, 1 - 0.2, 2 * 1.5, -0.5 * 0.25, 0.0],
            [0, 1, 0, 1, 1, 1],
        ),
        Case(
            PPOClip(eps_low=0.6, eps_high=0.2),
            [-1.2, -1.0, 0.5, 2 * 1.5, -0.5 * 0.25, 0.0],
            [0, 1, 1, 1, 1, 1],
        ),
        Case(
            PPOClip(eps_low=0.2, eps_high=1.1),
            [-2.0, -1.0, 1 - 0.2, 2 * 1.5, -0.5 * 0.25, 0.0],
            [1, 1, 0, 1, 1, 1],
        ),
        Case(
            PPOClip(eps=0.2, dual_clip=1.4),
            # only token 3 has A < 0 and r > 1.4
            [-1.2, -1.0, 1 - 0.2, 2 * 1.4, -0.5 * 0.25, 0.0],
            [0, 1, 0, 0, 1, 1],
        ),
    ],
    CISPO: [
        Case(
            CISPO(max_ratio=1.2),
            [-1.2 * log(0.5), -1.0 * log(0.2), 0.5 * log(0.3), 2 * 1.2 * log(0.9), -0.5 * 0.25 * log(0.1), 0.0],
            [1.2 / 2, 1, 1, 1.2 / 1.5, 1, 1.2 / 2],
        ),
        Case(
            CISPO(min_ratio=0.8, max_ratio=1.2),
            [-1.2 * log(0.5), -1.0 * log(0.2), 0.8 * log(0.3), 2 * 1.2 * log(0.9), -0.5 * 0.8 * log(0.1), 0.0],
            [1.2 / 2, 1, 0.8 / 0.5, 1.2 / 1.5, 0.8 / 0.25, 1.2 / 2],
        ),
    ],
    SPO: [
        Case(
            SPO(eps=0.4),
            [-2.0 + 1 / 0.8, -1.0, 0.5 + 0.25 / 0.8, 3.0 + 2 * 0.25 / 0.8, -0.125 + 0.5 * 0.5625 / 0.8, 0.0],
            [1 - 1 / 0.4, 1, 1 - 0.5 / 0.4, 1 + 0.5 / 0.4, 1 + 0.75 / 0.4, 1],
        ),
        Case(
            SPO(eps_low=0.8, eps_high=0.4),
            [-2.0 + 1 / 0.8, -1.0, 0.5 + 0.25 / 1.6, 3.0 + 2 * 0.25 / 1.6, -0.125 + 0.5 * 0.5625 / 0.8, 0.0],
            [1 - 1 / 0.4, 1, 1 - 0.5 / 0.8, 1 + 0.5 / 0.8, 1 + 0.75 / 0.4, 1],
        ),
    ],
    DPPO: [
        Case(
            DPPO(delta=0.2),
            [0.0, -1.0, 0.0, 3.0, -0.125, 0.0],
            [0, 1, 0, 1, 1, 1],
        ),
        Case(
            DPPO(delta_low=0.4, delta_high=0.2),
            [0.0, -1.0, 0.5, 3.0, -0.125, 0.0],
            [0, 1, 1, 1, 1, 1],
        ),
        Case(
            DPPO(delta_low=0.2, delta_high=0.4, max_ratio=1.2),
            [-1.2 * (1 + log(2 / 1.2)), -1.0, 0.0, 2 * 1.2 * (1 + log(1.5 / 1.2)), -0.125, 0.0],
            [1.2 / 2, 1, 0, 1.2 / 1.5, 1, 1.2 / 2],
        ),
        Case(
            DPPO(delta=(KL_0 + KL_2) / 2, divergence="binary_kl"),
            [-2.0, -1.0, 0.0, 3.0, -0.125, 0.0],
            [1, 1, 0, 1, 1, 1],
        ),
        Case(
            DPPO(delta_low=0.2, delta_high=0.1, divergence="binary_kl"),
            [0.0, -1.0, 0.5, 3.0, -0.125, 0.0],
            [0, 1, 1, 1, 1, 1],
        ),
        Case(
            # a divergence of 1.5 is on the boundary, kept; 9 is outside but not diverging
            DPPO(delta=1.5, divergence="per_token"),
            [-2.0, -1.0, 0.0, 3.0, -0.125, 0.0],
            [1, 1, 0, 1, 1, 1],
            np.array([1.5, 9.0, 1.6, 9.0, 9.0, 9.0]),
        ),
    ],
    DRPO: [
        Case(
            DRPO(delta=0.2),
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
        Case(
            DRPO(delta_low=0.4, delta_high=0.2),
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
    ],
    MaskDRPO: [
        Case(
            MaskDRPO(delta=0.2),
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
        Case(
            MaskDRPO(delta_low=0.4, delta_high=0.2),
            [-2.0 + 0.25 * ((2 - 1) ** 2 - (0.2 / 0.25) ** 2) / 0.4, -1.0, 0.5, 3.0, -0.125, 0.0],
            [1 - 0.25 / 0.2, 1, 1, 1, 1, 1],
        ),
    ],
    Reinforce: [
        Case(
            Reinforce(),
            [-log(0.5), -log(0.2), log(0.3), 2 * log(0.9), -0.5 * log(0.1), 0.0],
            [1 / 2, 1, 2, 2 / 3, 4, 1 / 2],
        ),
    ],
    SAPO: [
        Case(
            SAPO(tau_positive=2.0, tau_negative=4.0),
            # −A (4/τ) σ(τ(r − 1)); τ = 2 where A ≥ 0
            [-2 * logistic(2), -1.0, 1 * logistic(-2), 2 * logistic(2), -0.5 * 2 * logistic(-1.5), 0.0],
            [1 / math.cosh(x) ** 2 for x in (1, 0, 1, 1, 0.75, 1)],
        ),
    ],
    IcePop: [
        Case(
            IcePop(min_ratio=0.4, max_ratio=1.6),
            [0.0, -1.0, 0.5, 3.0, 0.0, 0.0],
            [0, 1, 1, 1, 0, 0],
        ),
        Case(
            IcePop(min_ratio=0.6, max_ratio=2.5),
            [-2.0, -1.0, 0.0, 3.0, 0.0, 0.0],
            [1, 1, 0, 1, 0, 1],
        ),
    ],
    IPO: [
        Case(
            IPO(delta=0.28),
            # |π − μ| is 0.25, 0, 0.3, 0.3, 0.3, 0.25
            [-2.0, -1.0, 0.0, 0.0, 0.0, 0.0],
            [1, 1, 0, 0, 0, 1],
        ),
        Case(
            IPO(delta_low=0.4, delta_high=0.28),
            [-2.0, -1.0, 0.5, 0.0, -0.125, 0.0],
            [1, 1, 1, 0, 1, 1],
        ),
        Case(
            IPO(delta_low=0.2, delta_high=0.4, max_ratio=1.2),
            [-1.2 * (1 + log(2 / 1.2)), -1.0, 0.0, 2 * 1.2 * (1 + log(1.5 / 1.2)), 0.0, 0.0],
            [1.2 / 2, 1, 0, 1.2 / 1.5, 0, 1.2 / 2],
        ),
    ],
    TOPR: [
        Case(
            TOPR(),
            [-log(0.5), -log(0.2), 0.5, 2 * (1 + log(1.5)), -0.5 * log(0.1), 0.0],
            [1 / 2, 1, 1, 2 / 3, 4, 1 / 2],
        ),
    ],
}


each_case = pytest.mark.parametrize(
    "case", [case for cases in CASES.values() for case in cases], ids=lambda c: repr(c.objective)
)
CLASSES = list(dict.fromkeys(family.objective for family in OBJECTIVES))
each_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
THRESHOLDS = {family.objective: family.threshold for family in OBJECTIVES if family.measure is not None}
each_thresholded = pytest.mark.parametrize(("kind", "name"), THRESHOLDS.items(), ids=lambda x: getattr(x, "__name__", x))


def test_the_table_of_tokens_has_every_class():
    assert set(CASES) == set(CLASSES)
    assert all(type(case.objective) is kind for kind, cases in CASES.items() for case in cases)


def run(backend, objective, *arrays, **options):
    return backend.run(token_loss_and_gradient, objective, *arrays, **options)


def loss(backend, objective, *arrays, **options):
    return run(backend, objective, *arrays, **options).loss


def weight(backend, objective, *arrays, **options):
    return run(backend, objective, *arrays, **options).weight


@each_case
def test_loss_and_weight(backend, case):
    options = {} if case.divergence is None else {"divergence": case.divergence}
    result = run(backend, case.objective, *TOKENS, **options)
    np.testing.assert_allclose(result.loss, case.loss, rtol=2e-14)
    np.testing.assert_allclose(result.weight, case.weight, rtol=2e-14)


@each_case
def test_the_methods_are_what_is_returned(case):
    tokens = Tokens.checked(*TOKENS, divergence=case.divergence)
    result = token_loss_and_gradient(case.objective, *TOKENS, divergence=case.divergence)
    np.testing.assert_array_equal(case.objective.loss(tokens), result.loss)
    np.testing.assert_array_equal(case.objective.weight(tokens), result.weight)


INSIDE = [
    (PolicyGradient(), [1, 1, 1, 1, 1, 1]),
    (Reinforce(), [1, 1, 1, 1, 1, 1]),
    (SAPO(tau_positive=1.0, tau_negative=1.05), [1, 1, 1, 1, 1, 1]),
    (TOPR(), [1, 1, 1, 1, 1, 1]),
    (IcePop(min_ratio=0.4, max_ratio=1.8), [0, 1, 1, 1, 0, 0]),
    (IPO(delta_low=0.35, delta_high=0.2), [0, 1, 1, 0, 1, 0]),
    (CISPO(max_ratio=1.2), [1, 1, 1, 1, 1, 1]),
    (PPOClip(eps_low=0.6, eps_high=0.8), [0, 1, 1, 1, 0, 0]),  # r of 2, 1, ½, 3/2, ¼, 2 in [0.4, 1.8]
    (SPO(eps_low=0.4, eps_high=1.1), [1, 1, 0, 1, 0, 1]),  # in [0.6, 2.1]
    (DPPO(delta_low=0.35, delta_high=0.2), [0, 1, 1, 0, 1, 0]),  # π − μ in [−0.35, 0.2]
    (DRPO(delta_low=0.35, delta_high=0.2), [0, 1, 1, 0, 1, 0]),
    (MaskDRPO(delta_low=0.2, delta_high=0.35), [1, 1, 0, 1, 0, 1]),
    # KL_bin 0.131, 0, 0.192, 0.311, 0.311 − …: token 4 is 0.4 log 4 + 0.6 log(0.6/0.9)
    (DPPO(delta_low=0.2, delta_high=0.1, divergence="binary_kl"), [0, 1, 1, 0, 0, 0]),
]


@pytest.mark.parametrize(("made", "inside"), INSIDE, ids=lambda x: type(x).__name__)
def test_inside_is_the_region_whatever_the_advantage(backend, made, inside):
    def region(*arrays):
        return inside_of(made, Tokens.checked(*arrays))

    assert 0.4 * log(4) + 0.6 * log(0.6 / 0.9) > 0.2
    assert backend.run(region, LOG_PROB, BEHAVIOR, ADVANTAGES).tolist() == [bool(i) for i in inside]
    assert backend.run(region, LOG_PROB, BEHAVIOR, -ADVANTAGES).tolist() == [bool(i) for i in inside]


def test_every_class_has_a_region_here_and_those_without_a_measure_have_no_method():
    assert {type(made) for made, _ in INSIDE} == set(CLASSES)
    # IcePop's region has two bounds, neither of them a threshold to sweep
    assert {kind for kind in CLASSES if hasattr(kind, "inside")} == {*THRESHOLDS, IcePop}


def test_nan_is_outside_every_region(backend):
    nan = np.array([np.nan])
    for made, _ in INSIDE:

        def region(*arrays, made=made):
            return inside_of(made, Tokens.checked(*arrays))

        assert not backend.run(region, nan, np.array([-1.0]), np.array([1.0])), made
        assert not backend.run(region, np.array([-1.0]), nan, np.array([1.0])), made


@pytest.mark.parametrize("which", [0, 1, 2], ids=["log_prob", "behavior_log_prob", "advantages"])
def test_nan_at_a_valid_token_is_dropped_by_masks_and_shown_by_smooth_weights(backend, which):
    arrays = [np.array([-1.0, -1.0]), np.array([-1.1, -1.1]), np.array([1.0, -1.0])]
    arrays[which] = np.full(2, np.nan)
    masks = (DPPO(delta=0.2), IPO(delta=0.2, max_ratio=9.0), IcePop(min_ratio=0.5, max_ratio=5.0))
    for objective in (PPOClip(eps=0.2), DPPO(delta=0.2, divergence="binary_kl"), *masks):
        assert (weight(backend, objective, *arrays) == 0.0).all()
    assert all((loss(backend, objective, *arrays) == 0.0).all() for objective in masks)
    for objective in (DRPO(delta=0.2), MaskDRPO(delta=0.2), SPO(eps=0.2)):
        assert np.isnan(weight(backend, objective, *arrays)).all()


def test_a_nan_divergence_drops_its_token(backend):
    objective = DPPO(delta=9.0, divergence="per_token")
    found = weight(backend, objective, *TOKENS, divergence=np.full(6, np.nan))
    assert found.tolist() == [0, 1, 0, 1, 1, 1]  # the diverging ones


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_boundary_is_kept(backend, sign):
    """At |π − μ| = δ exactly DPPO keeps and DRPO's weight is 0; with a δ a hair smaller, not."""
    x, b = (np.log([0.5]), np.log([0.25])) if sign > 0 else (np.log([0.25]), np.log([0.5]))
    a = np.array([sign])
    delta = abs(float(backend.run(probability_shift, x, b)[0]))
    assert weight(backend, DPPO(delta=delta), x, b, a) == 1.0
    for either in (a, -a):
        assert weight(backend, IPO(delta=delta), x, b, either) == 1.0
        assert weight(backend, IPO(delta=math.nextafter(delta, 0.0)), x, b, either) == 0.0
    assert weight(backend, DRPO(delta=delta), x, b, a) == 0.0
    assert weight(backend, MaskDRPO(delta=delta), x, b, a) == 1.0
    below = math.nextafter(delta, 0.0)
    assert weight(backend, DPPO(delta=below), x, b, a) == 0.0
    assert weight(backend, DRPO(delta=below), x, b, a) < 0.0
    assert weight(backend, MaskDRPO(delta=below), x, b, a) < 0.0


def test_the_boundary_of_the_ratio_and_of_the_kl_is_kept(backend):
    x, b, a = np.log([0.5]), np.log([0.25]), np.array([1.0])

    def excess(*arrays):
        return Tokens.checked(*arrays).ratio_minus_one

    eps = float(backend.run(excess, x, b, a)[0])
    assert weight(backend, PPOClip(eps=eps), x, b, a) == 1.0
    assert weight(backend, SPO(eps=eps), x, b, a) == 0.0
    assert weight(backend, PPOClip(eps=math.nextafter(eps, 0.0)), x, b, a) == 0.0
    for pi, mu, advantage in ((x, b, a), (b, x, -a)):
        kl = float(backend.run(binary_kl, pi, mu)[0])
        at, below = (DPPO(delta=delta, divergence="binary_kl") for delta in (kl, math.nextafter(kl, 0.0)))
        assert weight(backend, at, pi, mu, advantage) == 1.0
        assert weight(backend, below, pi, mu, advantage) == 0.0
    ratio = float(backend.run(importance_ratio, x, b)[0])
    assert weight(backend, IcePop(min_ratio=ratio, max_ratio=ratio), x, b, a) == 1.0
    assert weight(backend, IcePop(min_ratio=0.5, max_ratio=math.nextafter(ratio, 0.0)), x, b, a) == 0.0
    assert weight(backend, IcePop(min_ratio=math.nextafter(ratio, 9.0), max_ratio=9.0), x, b, a) == 0.0
    assert weight(backend, PPOClip(eps=0.2, dual_clip=ratio), x, b, -a) == 1.0
    assert weight(backend, PPOClip(eps=0.2, dual_clip=math.nextafter(ratio, 0.0)), x, b, -a) == 0.0


def test_mask_drpo_loss_is_continuous_at_the_boundary(backend):
    mu, delta = 0.25, 0.2
    pi = np.array([mu + delta - 1e-9, mu + delta + 1e-9])
    inside, outside = loss(backend, MaskDRPO(delta=delta), np.log(pi), np.log([mu, mu]), np.ones(2))
    assert abs(inside - outside) < 2e-8


def test_beyond_the_saturated_ratio_the_corrective_weight_remains(backend):
    """At ℓ = 29 published losses return 0: their clamp removes the gradient where DRPO promises one."""
    x, b, a = np.array([-1.0]), np.array([-30.0]), np.array([1.0])
    pi, mu = math.exp(-1), math.exp(-30)
    np.testing.assert_allclose(weight(backend, DRPO(delta=0.15), x, b, a), [1 - (pi - mu) / 0.15], rtol=1e-14)
    np.testing.assert_allclose(weight(backend, SPO(eps=0.2), x, b, a), [1 - math.expm1(20) / 0.2], rtol=1e-8)
    assert np.isfinite(loss(backend, DRPO(delta=0.15), x, b, a)).all()


def test_cispo_of_an_impossible_token_is_0(backend):
    """The limit of r log π at π = 0 is 0, where 0·(−∞) would be a NaN; where μ = 0 too, r = 1 and the value is 0."""
    impossible = np.array([-np.inf, -np.inf])
    result = loss(backend, CISPO(max_ratio=2.0), impossible, np.array([-1.0, -np.inf]), np.ones(2))
    np.testing.assert_array_equal(result, 0.0)


IMPOSSIBLE, CERTAIN = np.array([-np.inf]), np.array([0.0])
ABSENT_RATIO = [
    # objective, −A r w at π = 0 and at μ = 0, for A = 1 and A = −1
    (Reinforce(), {0: (-1.0, 1.0), math.inf: (-1.0, 1.0)}),
    (CISPO(min_ratio=0.8, max_ratio=1.2), {0: (-0.8, 0.8), math.inf: (-1.2, 1.2)}),
    (CISPO(max_ratio=5.0), {0: (0.0, 0.0), math.inf: (-5.0, 5.0)}),
    (SAPO(tau_positive=1.0, tau_negative=1.05), {0: (0.0, 0.0), math.inf: (0.0, 0.0)}),
    (TOPR(), {0: (-1.0, 0.0), math.inf: (-1.0, 1.0)}),
]


@pytest.mark.parametrize(("made", "gradients"), ABSENT_RATIO, ids=repr)
def test_where_the_ratio_underflows_or_overflows_the_gradient_is_r_w(backend, made, gradients):
    """The weight saturates at e²⁰, so the product r w would be another number."""
    arrays = {0: [(IMPOSSIBLE, CERTAIN), (CERTAIN - 800.0, CERTAIN)], math.inf: [(CERTAIN, IMPOSSIBLE)]}
    for ratio, (positive, negative) in gradients.items():
        for x, b in arrays[ratio]:
            for a, gradient in ((1.0, positive), (-1.0, negative), (0.0, 0.0)):
                result = run(backend, made, x, b, np.array([a]))
                np.testing.assert_allclose(result.gradient, gradient, rtol=1e-14, atol=1e-300)
                assert np.isfinite(result.loss).all()
                assert np.isfinite(result.weight).all()
                assert a != 0.0 or result.loss == 0.0


@pytest.mark.parametrize("made", [made for made, _ in ABSENT_RATIO], ids=repr)
def test_a_nan_shows_in_an_own_ratio_weight(backend, made):
    nan, x = np.array([np.nan]), np.array([-1.0])
    for arrays in ((nan, x, -x), (x, nan, -x), (x, x, nan)):
        assert np.isnan(run(backend, made, *arrays).gradient).all()


def test_any_shape_is_kept(backend):
    for shape in [(), (0,), (2, 3)]:
        x = np.full(shape, -1.0)
        for kind, (*_, case) in CASES.items():
            measured = {} if case.divergence is None else {"divergence": x}
            result = run(backend, case.objective, x, x, x, **measured)
            assert {array.shape for array in result} == {shape}, kind


def test_half_precision_is_computed_in_float32(low_precision_backend):
    backend = low_precision_backend
    pi, mu = math.exp(-0.5), math.exp(-1.0)
    for dtype in ("float16", "bfloat16"):
        arrays = [backend.asarray([v], dtype) for v in (-0.5, -1.0, 1.0)]
        for case, *_ in CASES.values():
            tokens = Tokens.checked(*arrays)
            for method in (case.objective.loss, case.objective.weight):
                assert backend.to_numpy(method(tokens)).dtype == np.float32
        found = backend.to_numpy(DRPO(delta=0.5).weight(Tokens.checked(*arrays)))
        np.testing.assert_allclose(found, [1 - (pi - mu) / 0.5], rtol=1e-6, err_msg=dtype)


@each_class
def test_shapes_and_dtypes_are_checked(backend, kind):
    x, made = np.array([-1.0, -2.0]), CASES[kind][0].objective
    with pytest.raises(ValueError, match=r"advantages: expected the shape of log_prob, \(2,\), got \(1,\); per-sequence"):
        run(backend, made, x, x, x[:1])
    with pytest.raises(ValueError, match=r"behavior_log_prob: expected the shape of log_prob, \(2,\), got \(2, 1\)"):
        run(backend, made, x, x[:, None], x)
    with pytest.raises(TypeError, match=r"advantages: expected a real floating dtype, got .*int64"):
        run(backend, made, x, x, np.array([1, 2]))
    with pytest.raises(TypeError, match="log_prob: expected an array of real floating dtype, got list"):
        run(backend, made, [-1.0, -2.0], x, x)


def test_a_batch_of_advantages_is_not_broadcast_over_a_square_batch(backend):
    """With as many tokens as sequences a broadcast (B,) → (B, T) would pass unnoticed."""
    x = np.full((2, 2), -1.0)
    with pytest.raises(ValueError, match=r"advantages: .*expand_advantages\(advantages, mask\)"):
        run(backend, DRPO(delta=0.5), x, x, np.ones(2))


@pytest.mark.parametrize("divergence", ["binary_tv", "per_token"])
def test_the_measured_divergence_is_checked(backend, divergence):
    x, made = np.array([-1.0, -2.0]), DPPO(delta=0.5, divergence=divergence)
    with pytest.raises(ValueError, match=r"divergence: expected the shape of log_prob, \(2,\), got \(1,\)"):
        run(backend, made, x, x, x, divergence=x[:1])
    with pytest.raises(TypeError, match=r"divergence: expected a real floating dtype, got .*bool"):
        run(backend, made, x, x, x, divergence=np.array([True, False]))


THRESHOLD_ERRORS = [
    ({}, "expected either {0} or both {0}_low and {0}_high, got none of them"),
    ({"{0}": 0.1, "{0}_low": 0.1}, "expected either {0} or both {0}_low and {0}_high, got {0} and {0}_low"),
    ({"{0}": 0.1, "{0}_high": 0.1}, "expected either {0} or both {0}_low and {0}_high, got {0} and {0}_high"),
    (
        {"{0}": 0.1, "{0}_low": 0.1, "{0}_high": 0.1},
        "expected either {0} or both {0}_low and {0}_high, got {0} and {0}_low and {0}_high",
    ),
    ({"{0}_low": 0.1}, "expected either {0} or both {0}_low and {0}_high, got {0}_low"),
    ({"{0}_high": 0.1}, "expected either {0} or both {0}_low and {0}_high, got {0}_high"),
]


@each_thresholded
@pytest.mark.parametrize(("given", "message"), THRESHOLD_ERRORS)
def test_a_threshold_is_missing_or_doubled(kind, name, given, message):
    """What a threshold may be is tested with all other numbers, in test_checks.py."""
    given = {key.format(name): value for key, value in given.items()}
    with pytest.raises(TypeError, match="^" + message.format(name) + "$"):
        kind(**given)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CISPO(max_ratio=None), TypeError, "max_ratio: expected a real number, got NoneType"),
        (CISPO, TypeError, "max_ratio"),
        (
            lambda: CISPO(min_ratio=1.3, max_ratio=1.2),
            ValueError,
            "^min_ratio: expected a number of at most max_ratio = 1.2, got 1.3$",
        ),
        (lambda: SAPO(tau_positive=1.0), TypeError, "tau_negative"),
        (
            lambda: IcePop(min_ratio=2.0, max_ratio=1.0),
            ValueError,
            "^min_ratio: expected a number of at most max_ratio = 1, got 2$",
        ),
        (lambda: PPOClip(eps=0.2, dual_clip=1.0), ValueError, "dual_clip: expected a finite number greater than 1, got 1.0"),
        (
            lambda: DPPO(delta=0.1, divergence="tv"),
            ValueError,
            "^divergence: expected 'binary_tv', 'binary_kl' or 'per_token', got 'tv'$",
        ),
        (
            lambda: DPPO(delta=0.1, divergence=np.ones(3)),
            ValueError,
            "^divergence: expected 'binary_tv', 'binary_kl' or 'per_token', got ndarray$",
        ),
        *((lambda kind=kind: kind(0.15), TypeError, "positional argument") for kind in CLASSES),
    ],
)
def test_other_hyper_parameter_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_dppo_per_token_without_a_divergence_says_so():
    x = np.array([-1.0])
    message = r"^divergence: expected an array, because this DPPO objective has divergence='per_token', got None$"
    with pytest.raises(TypeError, match=message):
        token_loss_and_gradient(DPPO(delta=0.1, divergence="per_token"), x, x, x)


VACUOUS = {
    "DRPO": lambda d: DRPO(delta=d),
    "MaskDRPO": lambda d: MaskDRPO(delta=d),
    "DPPO": lambda d: DPPO(delta=d),
    "IPO": lambda d: IPO(delta=d),
    "DRPO, high": lambda d: DRPO(delta_low=0.1, delta_high=d),
    "MaskDRPO, low": lambda d: MaskDRPO(delta_low=d, delta_high=0.1),
    "DPPO, low": lambda d: DPPO(delta_low=d, delta_high=0.1),
}


@pytest.mark.parametrize("name", VACUOUS)
def test_a_threshold_no_token_can_exceed_warns_once_and_at_the_caller(name):
    for delta in (1.0, 12.5):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            VACUOUS[name](delta)
        assert [w.category for w in caught] == [VacuousTrustRegionWarning]
        assert [(w.filename, w.lineno) for w in caught] == [(__file__, VACUOUS[name].__code__.co_firstlineno)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VACUOUS[name](math.nextafter(1.0, 0.0))


@pytest.mark.parametrize("name", VACUOUS)
def test_the_warning_names_the_objective_and_says_what_follows(name):
    message = (
        f"^{name.split(',')[0]}: delta = 1 is at least 1, but abs\\(π − μ\\) never exceeds 1, so no token can leave the "
        "trust region: nothing is masked and no gradient is corrected$"
    )
    with pytest.warns(VacuousTrustRegionWarning, match=message):
        VACUOUS[name](1.0)


def test_every_objective_whose_threshold_bounds_a_shift_warns():
    of_a_shift = {family.objective for family in OBJECTIVES if family.measure == "abs(π − μ)"}
    assert {kind.__name__ for kind in of_a_shift} == {name.split(",")[0] for name in VACUOUS}


def test_thresholds_in_nats_or_of_the_callers_unit_do_not_warn():
    DPPO(delta=2.0, divergence="binary_kl")
    DPPO(delta=2.0, divergence="per_token")
    SPO(eps=12.5)
    PPOClip(eps=1.5)


def test_using_an_objective_does_not_warn_again(backend):
    with pytest.warns(VacuousTrustRegionWarning):
        made = DRPO(delta=12.5)
    result = run(backend, made, *TOKENS)
    assert (np.abs(result.weight - 1.0) <= 1 / 12.5).all()


@each_case
def test_dataclasses_are_frozen_slotted_hashable_values(case):
    made = case.objective
    twin = dataclasses.replace(made)
    assert twin == made
    assert hash(twin) == hash(made)
    assert not hasattr(made, "__dict__")
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, 1.0)
    assert all(field.kw_only for field in dataclasses.fields(made))


def test_no_objective_is_a_kind_of_another():
    """Or `isinstance` would give one the other's formula."""
    assert [(a, b) for a in CLASSES for b in CLASSES if a is not b and issubclass(a, b)] == []
    values = [case.objective for cases in CASES.values() for case in cases]
    assert len(set(values)) == len(values)


@each_thresholded
def test_regions_are_low_then_high(kind, name):
    assert kind(**{name: 0.15}).region == (0.15, 0.15)
    assert kind(**{f"{name}_low": 0.1, f"{name}_high": 0.3}).region == (0.1, 0.3)
    one = kind(**{name: 0.15}).region
    assert one.low is one.high  # told apart by identity, as symbols are


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
        assert token_loss_and_gradient(made, x, x, x).loss.dtype == np.float32
