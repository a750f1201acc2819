"""The hypotheses of preregistration.md and their decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from study.cells import HEADLINE, METHODS, SIX
from study.intervals import (
    MISSING,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Interval,
    at_least,
    better,
    bootstrap,
    close,
    interquartile_mean,
    mean,
    worse,
)
from study.measures import collapsed, final_reward

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from study.intervals import Numbers
    from study.results import Result

MARGIN, COLLAPSES = 0.02, 0.1
FP8 = tuple(name for name, setting in SIX.items() if setting.engine == "fp8")
DRPO_FIRST = ("drpo", *(name for name in HEADLINE if name != "drpo"))
PENALTIES = ("k1", "k2", "k3", "tv", "chi2-without-a")

Line = tuple[str, float]
"""A method at a threshold."""
Runs = dict[tuple[str, Line], dict[int, "Result"]]
"""Runs by seed, of each setting and line."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A hypothesis, the difference that decides it, and the decision."""

    name: str
    claim: str
    difference: Interval | None
    decision: str


def scores(
    runs: Runs, settings: Sequence[str], lines: Sequence[Line], measure: Callable[[Result], float], seeds: Sequence[int]
) -> Numbers | None:
    """A measure of each run as an array (settings, seeds, lines), or None if a run is missing."""
    found = [[[runs.get((s, line), {}).get(seed) for line in lines] for seed in seeds] for s in settings]
    if not lines or any(run is None for setting in found for seed in setting for run in seed):
        return None
    return np.array([[[measure(run) for run in seed if run is not None] for seed in setting] for setting in found])


def as_published() -> list[Line]:
    """The headline methods at their first published threshold, DRPO first."""
    return [(name, METHODS[name].published[0]) for name in DRPO_FIRST]


def first_minus_best(x: Numbers) -> Numbers:
    """The first line's number minus the largest of the others'."""
    return np.asarray(x[..., 0] - x[..., 1:].max(-1))


def among_equals(table: Numbers, permutations: int = 300, resamples: int = 1000) -> dict[str, float]:
    """How often H1's rule makes each decision when no method is better: lines are permuted in every setting and seed.

    `table` has the shape (settings, seeds, lines). The best of several equal methods beats one of them by luck.
    """
    rule, rng = at_least(MARGIN), np.random.default_rng(0)
    decisions = []
    for seed in range(permutations):
        value, samples = bootstrap(rng.permuted(table, axis=2), interquartile_mean, resamples, seed)
        decisions.append(rule(Interval.of(first_minus_best(value), first_minus_best(samples))))
    return {decision: decisions.count(decision) / permutations for decision in (SUPPORTED, NOT_SUPPORTED, UNDECIDED)}


def decide(runs: Runs, tuned: dict[str, float], seeds: Sequence[int]) -> list[Verdict]:
    """Decide every hypothesis in order; one without all of its runs is MISSING."""

    def verdict(
        name: str,
        claim: str,
        lines: Sequence[Line | None],
        difference: Callable[[Numbers], Numbers],
        rule: Callable[[Interval], str],
        *,
        settings: Sequence[str] = tuple(SIX),
        measure: Callable[[Result], float] = final_reward,
        statistic: Callable[..., Numbers] = interquartile_mean,
    ) -> Verdict:
        known = [line for line in lines if line is not None]
        table = scores(runs, settings, known, measure, seeds) if len(known) == len(lines) else None
        if table is None:
            return Verdict(name, claim, None, MISSING)
        value, samples = bootstrap(table, statistic)
        interval = Interval.of(difference(value), difference(samples))
        return Verdict(name, claim, interval, rule(interval))

    def at_tuned(method: str) -> Line | None:
        return (method, tuned[method]) if method in tuned else None

    drpo = as_published()[0]
    tuned_ones = [at_tuned(name) if METHODS[name].grid else (name, 0.0) for name in DRPO_FIRST]
    first_minus_second = lambda x: x[..., 0] - x[..., 1]
    return [
        verdict("H1", "DRPO 12.5 is at least as good as the best of the others as published", as_published(),
                first_minus_best, at_least(MARGIN)),
        verdict("H2", "ratio methods collapse in low precision, more than DRPO 12.5", [("grpo", 0.28), ("spo", 12.5), drpo],
                lambda x: 0.5 * (x[..., 0] + x[..., 1]) - x[..., 2], better(COLLAPSES), settings=FP8, measure=collapsed,
                statistic=mean),
        verdict("H3", "DRPO without |A| is worse than DRPO, both at 12.5", [("drpo-without-a", 12.5), drpo],
                first_minus_second, worse(MARGIN)),
        *(verdict("H4", f"the {name} penalty is worse than DRPO, both tuned", [at_tuned(name), at_tuned("drpo")],
                  first_minus_second, worse(MARGIN)) for name in PENALTIES),
        verdict("H5", "Mask-DRPO is close to DRPO, both tuned", [at_tuned("mask-drpo"), at_tuned("drpo")],
                first_minus_second, close(MARGIN)),
        verdict("H6", "DRPO at 12.5 and at 2.5 are close", [drpo, ("drpo", 2.5)], first_minus_second, close(MARGIN)),
        verdict("H7", "DRPO 12.5 is better than PG-IS", [drpo, ("pg-is", 0.0)], first_minus_second, better(MARGIN)),
        verdict("H8", "tuned, DRPO is at least as good as the best of the others tuned", tuned_ones,
                first_minus_best, at_least(MARGIN)),
    ]  # fmt: skip
