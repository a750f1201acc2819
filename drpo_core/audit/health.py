"""Problems of recorded data: how many values are NaN, infinite or no log-prob, and where the first of each kind is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from drpo_core.audit.readers import RolloutError
from drpo_core.validation import find_problems

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drpo_core.audit.readers import Chunk

__all__ = ["Tally"]

MEANING = {
    "positive": "a value above 0, which no log-prob has",
    "-inf": "-inf",
    "+inf": "+inf, and enter no figure",
}
EXCLUDED = {("behavior_log_prob", "-inf"), ("advantages", "-inf")}


class Tally:
    """Problems of a snapshot's tokens, counted chunk by chunk."""

    def __init__(self) -> None:
        self.tokens = 0
        self.counts: dict[tuple[str, str], int] = {}
        self.first: dict[tuple[str, str], tuple[int, ...]] = {}
        self.masked_nan = dict.fromkeys(("log_prob", "behavior_log_prob", "advantages"), 0)

    def add(self, chunk: Chunk, tolerance: float) -> None:
        """Count a chunk's problems."""
        self.tokens += len(chunk.mask)
        for name in self.masked_nan:
            self.masked_nan[name] += int(np.count_nonzero(np.isnan(getattr(chunk, name)) & ~chunk.mask))
        for argument, kind, count, first in find_problems(*chunk[:3], mask=chunk.mask, tolerance=tolerance):
            key = (argument, "positive" if kind.startswith("above") else kind)
            self.counts[key] = self.counts.get(key, 0) + count
            self.first.setdefault(key, chunk.locate(first[0]))

    def refuse_nan(self, arrays: Mapping[str, str]) -> None:
        """Raise if a valid token has a NaN, which would spoil every figure."""
        for (argument, kind), count in self.counts.items():
            if kind == "NaN":
                first = self.first[argument, kind]
                index = first[0] if len(first) == 1 else first
                msg = f"{arrays[argument]}: {count} NaN at valid tokens, the first at index {index}"
                raise RolloutError(msg)

    def by_argument(self, *kinds: str) -> dict[str, int]:
        """Return how many problems of some kinds each argument has."""
        return {name: sum(self.counts.get((name, kind), 0) for kind in kinds) for name in self.masked_nan}

    def warnings(self, arrays: Mapping[str, str]) -> list[str]:
        """Return one line for each kind of problem."""
        return [
            f"{arrays[argument]}: {count} valid tokens hold {MEANING.get(kind, f'a value {kind}')}"
            f"{', and enter no figure' if (argument, kind) in EXCLUDED else ''}"
            f" (first at {self.first[argument, kind]})"
            for (argument, kind), count in self.counts.items()
        ]
