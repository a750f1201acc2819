"""Cells of a product of axes: every pair of choices in some cell, a seeded sample of the rest, and a failing cell made small."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Axes = dict[str, tuple[Any, ...]]
Cell = dict[str, Any]

_ATTEMPTS, _REPAIRS, _CANDIDATES = 12, 12, 3


class Cells(NamedTuple):
    """Cells to run; how many pairs of choices they have between them, and how many can't be had, by reason."""

    cells: list[Cell]
    pairs: int
    left_out: Counter[str]


def base(axes: Axes) -> Cell:
    """The first choice on every axis."""
    return {name: choices[0] for name, choices in axes.items()}


def label(cell: Cell, axes: Axes) -> str:
    """What of a cell is not the base, as a few words."""
    words = [f"{n}={getattr(v, 'value', v)}" for n, v in cell.items() if v is not axes[n][0] and v != axes[n][0]]
    return " ".join(words) or "base"


def covering(axes: Axes, left_out: Callable[[Cell], str | None], *, strength: int = 2, seed: int = 0) -> Cells:
    """Few cells in which every pair of choices of two axes occurs, except pairs that no cell may have.

    With a strength of 1, every choice of every axis.
    """
    rng = random.Random(seed)  # noqa: S311 -- a sample, not a secret
    axes, reasons = _possible(axes, left_out, rng)
    names = list(axes)
    index = {name: {id_(choice): choice for choice in axes[name]} for name in names}
    open_pairs = {
        frozenset(zip(some, map(id_, choices), strict=True)): None
        for some in itertools.combinations(names, strength)
        for choices in itertools.product(*(axes[name] for name in some))
    }
    every, cells = len(open_pairs), []
    impossible = Counter[str]()

    def close(cell: Cell) -> int:
        found = [pair for pair in _pairs(cell, names, strength) if pair in open_pairs]
        for pair in found:
            del open_pairs[pair]
        return len(found)

    if left_out(base(axes)) is None:
        cells.append(base(axes))
        close(cells[0])
    order = list(open_pairs)
    rng.shuffle(order)
    for pair in order:
        if pair not in open_pairs:
            continue
        fixed = {name: index[name][choice] for name, choice in pair}
        candidates = []
        reason = ""
        for attempt in range(_ATTEMPTS):
            start = base(axes) if attempt == 0 else {n: rng.choice(c) for n, c in axes.items()}
            cell, reason = _repaired({**start, **fixed}, fixed, axes, left_out, rng)
            if cell is not None:
                candidates.append(cell)
                if len(candidates) == _CANDIDATES:
                    break
        if not candidates:
            del open_pairs[pair]
            impossible[reason] += 1
            continue
        best = max(candidates, key=lambda c: sum(p in open_pairs for p in _pairs(c, names, strength)))
        close(best)
        cells.append(best)
    return Cells(cells, every - impossible.total(), reasons + impossible)


def sample(axes: Axes, left_out: Callable[[Cell], str | None], size: int, *, seed: int) -> list[Cell]:
    """Cells at random."""
    rng = random.Random(seed)  # noqa: S311 -- a sample, not a secret
    cells = []
    for _ in range(size):
        cell, _reason = _repaired({n: rng.choice(c) for n, c in axes.items()}, {}, axes, left_out, rng)
        if cell is not None:
            cells.append(cell)
    return cells


def near(axes: Axes) -> Iterator[Cell]:
    """The base with one choice, or a pair of choices, changed."""
    start = base(axes)
    for first, second in itertools.combinations(axes, 2):
        for choices in itertools.product(axes[first], axes[second]):
            yield {**start, first: choices[0], second: choices[1]}


def product(axes: Axes, names: Iterable[str]) -> list[Cell]:
    """Every combination on some axes, the others at their base."""
    names = list(names)
    return [
        {**base(axes), **dict(zip(names, choices, strict=True))} for choices in itertools.product(*(axes[n] for n in names))
    ]


def smallest(cell: Cell, axes: Axes, fails: Callable[[Cell], bool]) -> Cell:
    """A failing cell with every axis at its base whose choice plays no part in the failure."""
    for name, choices in axes.items():
        if cell[name] is not choices[0]:
            simpler = {**cell, name: choices[0]}
            if fails(simpler):
                cell = simpler
    return cell


def id_(choice: Any) -> str:
    """What tells a choice from the others of its axis (True and 1, or members of two enumerations, may be equal)."""
    return f"{type(choice).__name__}:{choice}"


def _pairs(cell: Cell, names: list[str], size: int) -> Iterable[frozenset[tuple[str, str]]]:
    tagged = [(name, id_(cell[name])) for name in names]
    return (frozenset(pair) for pair in itertools.combinations(tagged, size))


def _possible(axes: Axes, left_out: Callable[[Cell], str | None], rng: random.Random) -> tuple[Axes, Counter[str]]:
    """The axes without the choices that no cell may have, and how many pairs those would have been in, by reason."""
    reasons, kept = Counter[str](), {}
    for name, choices in axes.items():
        kept[name] = tuple(
            choice for choice in choices if choice is choices[0] or _some_cell(name, choice, axes, left_out, rng, reasons)
        )
    return kept, reasons


def _some_cell(
    name: str, choice: Any, axes: Axes, left_out: Callable[[Cell], str | None], rng: random.Random, reasons: Counter[str]
) -> bool:
    reason = ""
    for attempt in range(_ATTEMPTS):
        start = base(axes) if attempt == 0 else {n: rng.choice(c) for n, c in axes.items()}
        cell, reason = _repaired({**start, name: choice}, {name: choice}, axes, left_out, rng)
        if cell is not None:
            return True
    reasons[reason] += sum(len(choices) for other, choices in axes.items() if other != name)
    return False


def _repaired(
    cell: Cell, fixed: Cell, axes: Axes, left_out: Callable[[Cell], str | None], rng: random.Random
) -> tuple[Cell | None, str]:
    """The cell with other choices where it would be left out; and why, if that doesn't help."""
    free = [name for name in axes if name not in fixed]
    reason = left_out(cell)
    first = reason
    for _ in range(_REPAIRS):
        if reason is None:
            return cell, ""
        # set a few axes anew, or back to their base
        changed = dict(cell)
        for name in rng.sample(free, min(3, len(free))):
            changed[name] = axes[name][0] if rng.random() < 0.5 else rng.choice(axes[name])
        cell, reason = changed, left_out(changed)
    if reason is None:
        return cell, ""
    # the fixed pair alone
    alone = {**base(axes), **fixed}
    return None, left_out(alone) or first or reason
