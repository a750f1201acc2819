"""Interquartile means, paired bootstrap intervals, and the preregistration's rules of decision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

RESAMPLES = 10_000
SUPPORTED, NOT_SUPPORTED, UNDECIDED, MISSING = "supported", "not supported", "undecided at this size", "cells missing"


class Interval(NamedTuple):
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: Any, samples: Numbers) -> Interval:  # noqa: ANN401 - a NumPy scalar of any kind
        """The percentile interval of resampled values."""
        low, high = np.percentile(samples, [2.5, 97.5])
        return cls(float(value), float(low), float(high))

    def __str__(self) -> str:
        """Value [low, high]."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interquartile_mean(runs: Numbers, axis: int = 0) -> Numbers:
    """Mean of the runs without the lowest quarter and the highest quarter, each rounded down to whole runs."""
    ordered = np.sort(runs, axis=axis)
    n = ordered.shape[axis]
    kept = np.arange(n // 4, n - n // 4)
    return np.asarray(ordered.take(kept, axis=axis).mean(axis))


def mean(runs: Numbers, axis: int = 0) -> Numbers:
    """The plain mean, used for shares."""
    return np.asarray(runs.mean(axis))


def bootstrap(
    scores: Numbers, statistic: Callable[..., Numbers] = interquartile_mean, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Numbers, Numbers]:
    """A statistic of each line over all settings and seeds, shape (lines,), and its resamples, (resamples, lines).

    `scores` has the shape (settings, seeds, lines). Each resample draws the seeds of every setting anew; all lines share them.
    """
    settings, seeds, lines = scores.shape
    drawn = np.random.default_rng(seed).integers(seeds, size=(resamples, settings, seeds))
    samples = scores[np.arange(settings)[:, None], drawn].reshape(resamples, settings * seeds, lines)
    return statistic(scores.reshape(-1, lines)), statistic(samples, axis=1)


def at_least(margin: float) -> Callable[[Interval], str]:
    """Rule for the claim "at least as good, up to a margin"."""
    return lambda d: SUPPORTED if d.low > -margin else NOT_SUPPORTED if d.high < 0.0 else UNDECIDED


def worse(margin: float) -> Callable[[Interval], str]:
    """Rule for the claim "worse, by any amount"."""
    return lambda d: SUPPORTED if d.high < 0.0 else NOT_SUPPORTED if d.low > -margin else UNDECIDED


def better(margin: float) -> Callable[[Interval], str]:
    """Rule for the claim "better, by any amount"; not supported if the interval excludes a difference of the margin."""
    return lambda d: SUPPORTED if d.low > 0.0 else NOT_SUPPORTED if d.high < margin else UNDECIDED


def close(margin: float) -> Callable[[Interval], str]:
    """Rule for the claim "equivalent, up to a margin"."""
    return lambda d: (
        SUPPORTED
        if -margin < d.low and d.high < margin
        else NOT_SUPPORTED
        if d.high < -margin or d.low > margin
        else UNDECIDED
    )
