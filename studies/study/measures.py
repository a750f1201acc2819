"""Measures of one run, as preregistration.md defines them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from study.results import BLOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from study.results import Result

SHARE_OF_THE_END = 0.2
LEVEL = 0.5
"""Efficiency is the number of batches until this reward."""


def final_reward(result: Result) -> float:
    """Mean reward of the engine's samples over the last fifth of the batches."""
    rewards = result.curves["reward"]
    return float(np.mean(rewards[-max(1, round(SHARE_OF_THE_END * len(rewards))) :]))


def moving(values: Sequence[float], width: int) -> np.ndarray:
    """Means over each `width` consecutive values."""
    return np.convolve(values, np.full(width, 1.0 / width), mode="valid")


def collapsed(result: Result) -> float:
    """1 if the run ends below half of its best mean over 10 batches, or below its first batch; else 0."""
    rewards = result.curves["reward"]
    end = final_reward(result)
    return float(end < 0.5 * moving(rewards, min(10, len(rewards))).max() or end < rewards[0])


def spikes(result: Result) -> float:
    """The number of blocks whose largest gradient norm is above 10 times the run's median."""
    norms = np.array(result.curves["norm"])
    return float(np.nansum(norms > 10.0 * np.nanmedian(norms)))


def largest_mismatch(result: Result) -> float:
    """The largest mean |π − μ| at a batch's last step, over the blocks of a run."""
    return float(np.nanmax(result.curves["tv_last"]))


def batches_to_level(result: Result) -> float:
    """Batches until the mean reward over 5 batches reaches LEVEL, or all batches if it never does."""
    rewards = result.curves["reward"]
    reached = np.flatnonzero(moving(rewards, min(5, len(rewards))) >= LEVEL)
    return float(reached[0] + min(5, len(rewards))) if reached.size else float(len(rewards))


def rare(result: Result) -> float:
    """Share of the run's sampled tokens with μ ≤ 0.01."""
    return float(np.mean(result.curves["rare"]))


def batches(result: Result, name: str) -> np.ndarray:
    """The horizontal positions of a curve's numbers: the middle of each block, in batches."""
    count = len(result.curves[name])
    return np.arange(count) + 1.0 if name == "reward" else BLOCK * np.arange(count) + 0.5 * (BLOCK + 1)
