"""References made of an objective's own methods, against the 50-digit ones of the objectives that have both."""

import warnings

import numpy as np
import pytest

from drpo_core import DPPO, VacuousTrustRegionWarning
from drpo_core.objectives import OBJECTIVES
from drpo_core.testing import oracle, own

SIZE = (40, 25)


def tokens():
    """Log-probs and advantages near and far from on-policy; some tokens are masked."""
    rng = np.random.default_rng(11)
    behavior = -rng.exponential(1.5, SIZE)
    log_prob = np.minimum(behavior + rng.normal(0, 1, SIZE) * rng.choice([1e-3, 0.1, 2.0], SIZE), 0.0)
    return log_prob, behavior, rng.choice([-2.0, -0.5, 0.0, 1.0], SIZE), rng.random(SIZE) < 0.9


def objectives():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VacuousTrustRegionWarning)
        return [family.make(threshold) for family in OBJECTIVES for threshold in (family.typical or (None,))]


@pytest.mark.parametrize("objective", objectives(), ids=str)
def test_they_are_the_oracles(objective):
    batch = tokens()
    exact, found = oracle.references(objective, *batch), own.references(objective, *batch)
    decided = exact.jump > 1e-12
    for name in ("loss", "weight", "gradient"):
        scale = 1.0 + getattr(exact, f"{name}_scale")
        error = np.abs(getattr(found, name) - getattr(exact, name)) / scale
        assert error[decided].max() < 1e-14, name
        assert np.all(getattr(found, name)[~batch[3]] == 0.0)
        # it bounds what a check allows, which is a million roundings: a factor matters little
        size = (1.0 + getattr(found, f"{name}_scale")) / scale
        assert 0.05 < size[decided].min() <= size[decided].max() < 100.0, name


@pytest.mark.parametrize("name", ["PPO-clip", "DPPO-TV", "DPPO-KL"])
@pytest.mark.parametrize("distance", [1e-13, 1e-9, 1e-6, 1e-3])
def test_a_jump_is_seen_from_as_far_as_it_is(name, distance):
    """Tokens moved off the boundary of a mask by a distance: a jump is found within a few times that, and no nearer."""
    family = next(family for family in OBJECTIVES if family.name == name)
    objective, behavior = family.make(family.typical[0]), np.log(np.linspace(0.1, 0.6, 50))
    low, high = behavior.copy(), np.zeros(50)
    for _ in range(200):
        middle = 0.5 * (low + high)
        dropped = own.references(objective, middle, behavior, np.ones(50), np.ones(50, bool)).weight == 0.0
        low, high = np.where(dropped, low, middle), np.where(dropped, middle, high)
    for side in (-1.0, 1.0):
        found = own.references(objective, low + side * distance, behavior, np.ones(50), np.ones(50, bool)).jump
        assert np.all((found >= distance / 3.0) & (found < distance * 40.0))


class Wiggly:
    """Continuous and steep, with kinks: nothing jumps."""

    def weight(self, tokens):  # noqa: D102
        return 1.0 + tokens.xp.abs(50.0 * tokens.shift)

    def loss(self, tokens):  # noqa: D102
        return -tokens.advantages * tokens.ratio


def test_a_continuous_weight_has_no_jump_nearby():
    batch = tokens()
    # half the distances at which float32 would leave a token undecided
    assert own.references(Wiggly(), *batch).jump.min() > 64 * 2.0**-23


def test_what_can_not_be_evaluated_is_not_compared_with():
    assert own.evaluates(Wiggly())
    assert not own.evaluates(DPPO(delta=0.1, divergence="per_token"))
    assert not own.evaluates(object())
