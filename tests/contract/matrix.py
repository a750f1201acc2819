"""The matrix: which cells each subject has."""

from __future__ import annotations

import functools
import math
import os
import random
import zlib
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from contract import cells
from contract.axes import Library, Use
from contract.reasons import REFUSED, left_out, refusals
from contract.subjects import axes_of

if TYPE_CHECKING:
    from contract.cells import Axes, Cell

SEED = int(os.environ.get("CONTRACT_SEED", "0"))
MORE = float(os.environ.get("CONTRACT_CELLS", "1"))
"""Times as many cells drawn from the full product: a nightly run draws more of them, of another seed."""

DRAWN, DRAWN_REFUSED = 20, 6

SLOW = "compiled for every cell: every choice a few times instead of every pair of choices"


class Matrix(NamedTuple):
    """Cells of a subject, and how many pairs of choices no cell can have, by reason."""

    cells: list[Cell]
    pairs: int
    left_out: Counter[str]


@functools.cache
def matrix_of(subject: str) -> Matrix:
    """Every pair of choices on two axes, a sample of the full product, and some cells of each refusal.

    Of what XLA or Dynamo compile for each cell, every choice a few times.
    """
    every, seed = axes_of(subject), zlib.crc32(subject.encode()) + SEED
    fast, slow = _split(every)

    def not_a_result(cell: Cell) -> str | None:
        reason = left_out(subject, cell)
        if reason is not None:
            return reason
        refused = refusals(subject, cell)
        return f"refused: {refused[0].reason}" if refused else None

    def not_fast(cell: Cell) -> str | None:
        return SLOW if slow is not None and is_slow(cell) else not_a_result(cell)

    pairs = cells.covering(every if fast else {}, not_fast, seed=seed) if fast else cells.Cells([], 0, Counter())
    drawn = int(DRAWN * MORE) if fast else 0
    found = pairs.cells + cells.sample(fast or every, not_a_result, drawn, seed=seed)
    if slow is not None:
        for i in range(math.ceil(MORE)):
            found += cells.covering(slow, not_a_result, strength=1, seed=seed + i).cells
    for predicate, refusal in REFUSED:

        def outside(cell: Cell, predicate: Any = predicate) -> str | None:
            reason = left_out(subject, cell)
            return reason or (None if predicate(subject, cell) else "not this refusal")

        found += cells.sample(every, outside, int(DRAWN_REFUSED * (1 if refusal.always else 2) * MORE), seed=seed)
        # at random, a refusal of two rare choices would have no cell
        close = [cell for cell in cells.near(every) if predicate(subject, cell) and left_out(subject, cell) is None]
        found += random.Random(seed).sample(close, min(len(close), DRAWN_REFUSED))  # noqa: S311 -- a sample, not a secret
    return Matrix(found, pairs.pairs, pairs.left_out)


def is_slow(cell: Cell) -> bool:
    """Whether XLA or Dynamo compile something for it."""
    return cell["library"] is Library.JAX or cell["use"] is Use.COMPILE


def _split(every: Axes) -> tuple[Axes | None, Axes | None]:
    """The axes without what is compiled for every cell, and with nothing else."""
    for name, compiled in (("library", Library.JAX), ("use", Use.COMPILE)):
        if compiled in every[name]:
            others = tuple(choice for choice in every[name] if choice is not compiled)
            return {**every, name: others} if others else None, {**every, name: (compiled,)}
    return every, None
