"""The table of objectives: what it says of each is what each is, and what is not in it is still named."""

import dataclasses
import warnings

import numpy as np
import pytest

from drpo_core import CISPO, DPPO, DRPO, SPO, MaskDRPO, PolicyGradient, PPOClip, Tokens, VacuousTrustRegionWarning
from drpo_core.objectives import (
    IPO,
    MEASURES,
    OBJECTIVES,
    SAPO,
    TOPR,
    Family,
    IcePop,
    Reinforce,
    family_of,
    is_known,
    label,
    parameters_of,
)

each_family = pytest.mark.parametrize("family", OBJECTIVES, ids=lambda family: family.name)


def make(family, threshold=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VacuousTrustRegionWarning)
        return family.make(threshold)


def thresholds(family):
    """Typical ones, one number and two; None for a family without."""
    if family.threshold is None:
        return [None]
    return [*family.typical, 0.3, *([(0.1, 0.4), (0.4, 0.1)] if family.measure else [])]


def random_tokens(n=2000):
    rng = np.random.default_rng(0)
    behavior = -rng.exponential(1.0, n)
    log_prob = np.minimum(behavior + rng.normal(0.0, 0.5, n), -1e-6)
    return Tokens.checked(log_prob, behavior, rng.normal(size=n))


def test_names_are_told_apart():
    assert len({family.name for family in OBJECTIVES}) == len(OBJECTIVES)
    assert [family.name for family in OBJECTIVES] == [
        "PG-IS", "CISPO", "PPO-clip", "SPO", "DPPO-TV", "DPPO-KL", "DRPO", "Mask-DRPO", "REINFORCE", "SAPO",
        "IcePop", "IPO", "TOPR",
    ]  # fmt: skip


@each_family
def test_a_family_knows_what_it_makes(family):
    for threshold in thresholds(family):
        made = make(family, threshold)
        assert type(made) is family.objective
        assert family_of(made) is family
        assert is_known(made)
        given = parameters_of(made)
        assert family.fixed.items() <= given.items()
        numbers = {name: value for name, value in given.items() if name not in family.fixed}
        if threshold is None:
            assert numbers == {}
        elif isinstance(threshold, tuple):
            low, high = threshold
            assert numbers == {f"{family.threshold}_low": low, f"{family.threshold}_high": high}
        else:
            assert numbers == {family.threshold: threshold}


@each_family
def test_parameters_are_fields(family):
    fields = {field.name for field in dataclasses.fields(family.objective)}
    assert {family.threshold, *family.fixed} - {None} <= fields
    assert family.typical or family.threshold is None
    assert family.measure is None or family.measure in MEASURES
    if family.threshold is not None:
        assert (family.measure is not None) == hasattr(family.objective, "inside")


@each_family
def test_a_threshold_bounds_what_the_table_says(family):
    """`inside` is measure ≤ threshold: the high one where r ≥ 1, the low one below."""
    if family.measure is None:
        return
    tokens = random_tokens()
    measured = MEASURES[family.measure](tokens)
    for threshold in thresholds(family):
        low, high = threshold if isinstance(threshold, tuple) else (threshold, threshold)
        expected = measured <= np.where(tokens.log_ratio >= 0.0, high, low)
        np.testing.assert_array_equal(make(family, threshold).inside(tokens), expected)
        assert high > 1.0 or 0.02 < expected.mean() < 0.999


@each_family
def test_a_threshold_that_is_missing(family):
    if family.threshold is None:
        with pytest.raises(TypeError, match="unexpected keyword"):
            family.make(0.2)
    else:
        with pytest.raises(TypeError, match=family.threshold):
            family.make()


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (PolicyGradient(), "PG-IS"),
        (PolicyGradient(max_ratio=2.0), "PG-IS c=2"),
        (CISPO(max_ratio=5.0), "CISPO c=5"),
        (PPOClip(eps=0.2), "PPO-clip ε=0.2"),
        (PPOClip(eps_low=0.2, eps_high=0.28), "PPO-clip ε=0.2/0.28"),
        (PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0), "PPO-clip ε=0.2/0.28 dual_clip=3"),
        (SPO(eps=1 / 3), "SPO ε=0.3333"),
        (DPPO(delta=0.15), "DPPO-TV δ=0.15"),
        (DPPO(delta=0.05, divergence="binary_kl"), "DPPO-KL δ=0.05"),
        (DPPO(delta_low=0.1, delta_high=0.2, max_ratio=20.0), "DPPO-TV δ=0.1/0.2 c=20"),
        (DPPO(delta=0.1, divergence="per_token"), "DPPO δ=0.1 divergence=per_token"),
        (DRPO(delta=0.15), "DRPO δ=0.15"),
        (MaskDRPO(delta_low=0.1, delta_high=0.3), "Mask-DRPO δ=0.1/0.3"),
        (Reinforce(), "REINFORCE"),
        (CISPO(min_ratio=0.8, max_ratio=1.2), "CISPO c=0.8/1.2"),
        (SAPO(tau_positive=1.0, tau_negative=1.05), "SAPO τ=1.05/1"),
        (SAPO(tau_positive=2.0, tau_negative=3.0), "SAPO τ=3/2"),
        (IcePop(min_ratio=0.5, max_ratio=5.0), "IcePop c=0.5/5"),
        (IPO(delta=0.3, max_ratio=1e4), "IPO δ=0.3 c=1e+04"),
        (TOPR(), "TOPR"),
    ],
    ids=repr,
)
def test_labels(made, expected):
    assert label(made) == expected


@dataclasses.dataclass
class Own:
    """A user's own dataclass."""

    rate: float = 0.5
    kind: str = "soft"
    unset: float | None = None


class Ordinary:
    """And an ordinary class."""

    def __init__(self):
        """With one number."""
        self.delta = 0.25


class OfDRPO(DRPO):
    """A subclass, which may have another formula."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (Own(), "Own rate=0.5 kind=soft"),
        (Own(rate=1), "Own rate=1 kind=soft"),
        (Ordinary(), "Ordinary δ=0.25"),
        (OfDRPO(delta=0.2), "OfDRPO δ=0.2"),
        (object(), "object"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_not_in_the_table_is_named_after_its_class(made, expected):
    assert not is_known(made)
    family = family_of(made)
    assert family == Family(type(made).__name__, type(made))
    assert label(made) == expected
