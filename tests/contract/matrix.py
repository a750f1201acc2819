"""The matrix: which cells each subject has."""

from __future__ import annotations

import functools
import os
import zlib
from collections import Counter
from typing import NamedTuple

from contract import cells
from contract.cells import Cell
from contract.reasons import REFUSED, left_out, refusals
from contract.subjects import axes_of

SEED = int(os.environ.get("CONTRACT_SEED", "0"))
MORE = float(os.environ.get("CONTRACT_CELLS", "1"))
"""Times as many cells drawn from the full product: a nightly run draws more of them, of another seed."""

DRAWN, DRAWN_REFUSED = 20, 6


class Matrix(NamedTuple):
    """Cells of a subject, and how many pairs of choices no cell can have, by reason."""

    cells: list[Cell]
    pairs: int
    left_out: Counter[str]


@functools.cache
def matrix_of(subject: str) -> Matrix:
    """Every pair of choices on two axes, a sample of the full product, and some cells of each refusal."""
    every, seed = axes_of(subject), zlib.crc32(subject.encode()) + SEED

    def not_a_result(cell: Cell) -> str | None:
        reason = left_out(subject, cell)
        if reason is not None:
            return reason
        refused = refusals(subject, cell)
        return f"refused: {refused[0].reason}" if refused else None

    pairs = cells.covering(every, not_a_result, seed=seed)
    drawn = cells.sample(every, not_a_result, int(DRAWN * MORE), seed=seed)
    refused = []
    for predicate, refusal in REFUSED:

        def outside(cell: Cell, predicate=predicate) -> str | None:
            reason = left_out(subject, cell)
            return reason or (None if _applies(predicate, subject, cell) else "not this refusal")

        refused += cells.sample(every, outside, int(DRAWN_REFUSED * (1 if refusal.always else 2) * MORE), seed=seed)
    return Matrix(pairs.cells + drawn + refused, pairs.pairs, pairs.left_out)


def _applies(predicate, subject: str, cell: Cell) -> bool:
    return bool(predicate(subject, cell))


def label(subject: str, cell: Cell) -> str:
    """What of a cell is not the base."""
    return cells.label(cell, axes_of(subject))
