"""Failing cells of a subject as one error: each kind once, in its smallest cell."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from contract import cells, open_cells
from contract.check import check, is_slow
from contract.subjects import axes_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from contract.cells import Cell

SHRUNK = int(os.environ.get("CONTRACT_SHRUNK", "3"))
"""How many kinds of failures of one test are made small."""


def run(subject: str, some: Iterable[Cell]) -> Counter[str]:
    """Check cells; raise one AssertionError that lists what fails. Gives how many held and were refused."""
    outcomes: Counter[str] = Counter()
    kinds: dict[str, list[Cell]] = {}
    for cell in some:
        try:
            outcomes[check(subject, cell)] += 1
        except Exception as error:  # noqa: BLE001 -- listed below
            known = open_cells.reason(subject, error)
            if known is None:
                kinds.setdefault(kind(error), []).append(cell)
            else:
                outcomes[f"open ({known})"] += 1
    if kinds:
        raise AssertionError("\n".join(lines(subject, kinds)))
    return outcomes


def kind(error: Exception) -> str:
    """An error without its numbers."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    text = re.sub(r"diagnostics/\w+(/\w+)?", "diagnostics/…", text)
    return re.sub(r"-?\d+\.?\d*(e[-+]?\d+)?|\bnan\b|-?\binf\b", "#", text)[:200]


def lines(subject: str, kinds: dict[str, list[Cell]], shrunk: int = SHRUNK) -> list[str]:
    """How often each kind of failure occurs, and where at its smallest."""
    every = axes_of(subject)
    report = []
    for place, (what, failing) in enumerate(sorted(kinds.items(), key=lambda item: -len(item[1]))):
        cell = min(failing, key=lambda c: len(cells.label(c, every)))
        if place < shrunk and not (is_slow(subject, cell) and place > 1):
            cell = cells.smallest(cell, every, lambda c, what=what: fails_alike(subject, c, what))
        report.append(f"{len(failing):4} × {subject} [{cells.label(cell, every)}] {message(subject, cell) or what}")
    return report


def fails_alike(subject: str, cell: Cell, what: str) -> bool:
    """Whether a cell fails in the same way."""
    try:
        check(subject, cell)
    except Exception as error:  # noqa: BLE001
        return kind(error) == what
    return False


def message(subject: str, cell: Cell) -> str:
    """What a cell fails with, in full."""
    try:
        check(subject, cell)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def reproduce(subject: str, cell: Cell) -> Any:
    """Run a cell of a report again; with a debugger, say."""
    return check(subject, {**cells.base(axes_of(subject)), **cell})
