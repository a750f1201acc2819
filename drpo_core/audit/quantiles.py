"""Thresholds that drop a given share of the diverging tokens: exact, in four passes over the file and constant memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from drpo_core.audit.selection import row_at
from drpo_core.audit.tokens import ChunkTokens
from drpo_core.objectives import MEASURES, OBJECTIVES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drpo_core.audit.readers import Rollouts
    from drpo_core.audit.selection import Row

    Values = np.ndarray[Any, Any]

__all__ = ["PASSES", "rows_at", "thresholds"]

DIGIT = 16
SHIFTS = (48, 32, 16, 0)
PASSES = len(SHIFTS)


def rows_at(
    rollouts: Rollouts, snapshot: str, quantiles: Sequence[float], advance: Callable[[int], object]
) -> tuple[list[Row], list[str]]:
    """Return rows at the thresholds that drop each share of the diverging tokens, and why some are missing.

    Parameters
    ----------
    rollouts
        An opened file.
    snapshot
        Its snapshot.
    quantiles
        Shares q, 0 < q < 1.
    advance
        Called with the number of tokens read since the last call.

    Returns
    -------
    tuple
        (rows by share and then in the order of the table, one line for each threshold that does not exist).
    """
    found: list[Row | None] = []
    notes = []
    measured = thresholds(rollouts, snapshot, quantiles, advance) if quantiles else {}
    for q in quantiles:
        usable = {measure for measure in _measures() if 0.0 < measured[measure, q] < math.inf}
        notes += [
            f"no finite threshold on {measure} above 0 drops a share {q:g} of the diverging tokens"
            for measure in _measures()
            if measure not in usable
        ]
        found += [row_at(family, measured[family.measure, q], q) for family in OBJECTIVES if family.measure in usable]
    return [row for row in found if row is not None], notes


def thresholds(
    rollouts: Rollouts, snapshot: str, quantiles: Sequence[float], advance: Callable[[int], object]
) -> dict[tuple[str, float], float]:
    """Return, for each measure and share q, the value that exactly round(q n) of n diverging tokens exceed, ties apart.

    A radix selection: floats ≥ 0 order like their bits, so each of four passes over the file counts the next 16 bits
    of those that share the bits found so far. The values are float64, because that is what the objectives compare. The
    memory is 65,536 counters per measure and share, whatever the length of the file.
    """
    keys = [(measure, q) for measure in _measures() for q in quantiles]
    prefix, rank = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0)
    for shift in SHIFTS:
        counts = {key: np.zeros(1 << DIGIT, np.int64) for key in keys}
        for chunk in rollouts.chunks(snapshot):
            found = ChunkTokens.of(chunk)
            for measure in _measures():
                bits = np.abs(MEASURES[measure](found.tokens)[found.diverging]).view(np.uint64)
                for q in quantiles:
                    counts[measure, q] += _next_digit(bits, prefix[measure, q], shift)
            advance(len(chunk.mask))
        for key in keys:
            below = np.cumsum(counts[key])
            if shift == SHIFTS[0]:
                rank[key] = _rank(int(below[-1]), key[1])
            if rank[key] < 0:
                continue
            digit = int(np.searchsorted(below, rank[key], side="right"))
            rank[key] -= int(below[digit - 1]) if digit else 0
            prefix[key] = prefix[key] << DIGIT | digit
    values = {key: float(np.uint64(prefix[key]).view(np.float64)) for key in keys}
    return {key: value if rank[key] >= 0 else math.nan for key, value in values.items()}


def _measures() -> list[str]:
    """Return the measures that thresholds of the table bound, in the order of `MEASURES`."""
    bounded = {family.measure for family in OBJECTIVES}
    return [measure for measure in MEASURES if measure in bounded]


def _rank(n: int, q: float) -> int:
    """Return the position, in ascending order, of the value that round(q n) of n values exceed; −1 if there is none."""
    return n - 1 - min(round(q * n), n - 1) if n else -1


def _next_digit(bits: Values, prefix: int, shift: int) -> Values:
    """Count, for each value of the 16 bits at `shift`, the patterns that start with `prefix`."""
    if shift + DIGIT < 64:
        bits = bits[bits >> np.uint64(shift + DIGIT) == np.uint64(prefix)]
    digits = (bits >> np.uint64(shift)) & np.uint64((1 << DIGIT) - 1)
    return np.bincount(digits.astype(np.intp), minlength=1 << DIGIT)
