"""The study's objectives: weight and loss belong together, those that the library has are the library's, the kit agrees."""

import itertools
import warnings

import numpy as np
import pytest
from study.cells import METHODS, objective
from study.objectives import PENALTIES, SMALL, Penalised, nonzero

from drpo_core import DRPO, SPO, Tokens, VacuousTrustRegionWarning, token_loss_and_gradient
from drpo_core.testing import check_implementation, from_function

CASES = [Penalised(penalty=p, delta=d, by_advantage=a) for p, d, a in itertools.product(PENALTIES, (0.15, 2.5), (True, False))]


def batch(seed=0, size=400):
    generator = np.random.default_rng(seed)
    x, b = -generator.uniform(0.01, 9.0, (2, size))
    b = np.where(generator.random(size) < 0.5, x + generator.normal(0.0, 0.3, size), b)
    return x, np.minimum(b, -0.01), generator.choice([-1.0, 1.0], size) * generator.uniform(0.01, 2.0, size)


@pytest.mark.parametrize("chosen", CASES, ids=str)
def test_the_weight_is_that_of_the_losss_derivative(chosen):
    """∂L/∂log π by central differences is −A r w."""
    x, b, a = batch()
    h, ratio = 1e-5, np.exp(x - b)
    above, below = (token_loss_and_gradient(chosen, x + step, b, a).loss for step in (h, -h))
    gradient = token_loss_and_gradient(chosen, x, b, a).gradient
    # gradients grow as r² and with 1/δ
    scale = (1.0 + ratio + ratio * ratio) / chosen.delta
    np.testing.assert_allclose((above - below) / (2.0 * h) / scale, gradient / scale, atol=1e-6)


@pytest.mark.parametrize("delta", [0.15, 2.5])
def test_two_of_them_are_the_librarys(delta):
    x, b, a = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VacuousTrustRegionWarning)
        ours = {"l2": DRPO(delta=delta), "chi2": SPO(eps=delta)}
    for name, theirs in ours.items():
        mine = Penalised(penalty=name, delta=delta)
        for found, wanted in zip(
            token_loss_and_gradient(mine, x, b, a), token_loss_and_gradient(theirs, x, b, a), strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(mine.inside(Tokens.checked(x, b, a)), theirs.inside(Tokens.checked(x, b, a)))


@pytest.mark.parametrize("chosen", [c for c in CASES if c.delta == 0.15], ids=str)
def test_the_kit_agrees(chosen):
    def loss(log_prob, behavior_log_prob, advantages, mask):
        return token_loss_and_gradient(chosen, log_prob, behavior_log_prob, advantages, mask=mask)[:2]

    # P9 is a gradient of −A on-policy, which k1 does not have (K4); P16 needs |A| (K8)
    checks = ["P1", "P5", "P8"]
    if chosen.penalty != "k1":
        checks.append("P9")
    if chosen.by_advantage:
        checks.append("P16")
    report = check_implementation(from_function(loss, "numpy", returns_gradient=True), checks=checks)
    assert report.ok, str(report)


def test_without_the_advantage_the_penalty_acts_where_there_is_none():
    chosen = Penalised(penalty="l2", delta=0.5, by_advantage=False)
    x, b = np.log([0.6, 0.2]), np.log([0.5, 0.4])
    a = nonzero(chosen, np.array([0.0, 0.0]))
    np.testing.assert_array_equal(a, SMALL)
    # r d / δ
    wanted = np.array([1.2 * 0.1, 0.5 * -0.2]) / 0.5
    np.testing.assert_allclose(token_loss_and_gradient(chosen, x, b, a).gradient, wanted, atol=3 * SMALL)
    np.testing.assert_array_equal(nonzero(Penalised(penalty="l2", delta=0.5), np.array([0.0, 1.0])), [0.0, 1.0])


@pytest.mark.parametrize("arguments", [{"penalty": "k4", "delta": 1.0}, {"penalty": "k1", "delta": 0.0}])
def test_wrong_hyper_parameters_are_named(arguments):
    with pytest.raises(ValueError, match=r"penalty|delta"):
        Penalised(**arguments)


def test_every_method_has_five_values_to_tune_but_pg_is_and_knows_its_published_ones():
    assert {len(method.grid) for name, method in METHODS.items() if name != "pg-is"} == {5}
    for name, method in METHODS.items():
        assert all(threshold in method.grid for threshold in method.published if method.grid), name
        for threshold in (*method.grid, *method.published):
            assert objective(name, threshold) == objective(name, threshold)
            hash(objective(name, threshold))
