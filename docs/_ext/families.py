"""What the pages show of the objectives, made from `drpo_core.objectives.OBJECTIVES` and the classes' docstrings."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import drpo_core
from drpo_core import objectives

if TYPE_CHECKING:
    from drpo_core.objectives import Family, Threshold


def name_of(family: Family) -> str:
    """The name that the file of a family, its page and its file of proofs share: ``drpo`` for Mask-DRPO too."""
    return family.objective.__module__.rpartition(".")[2]


def statement(family: Family) -> str:
    """The first sentence of the class's docstring, without the name that it begins with."""
    first = (inspect.getdoc(family.objective) or "").partition("\n")[0]
    return first.partition(": ")[2] or first


def thresholds(family: Family) -> str:
    """The parameter and the values that `drpo audit` shows: ``eps`` = 0.2, 0.2/0.28."""
    if family.threshold is None:
        return "–"
    return f"`{family.threshold}` = {', '.join(map(_number, family.typical))}"


def table() -> list[str]:
    """Lines of Markdown; pages are named from the root of docs."""
    rows = [
        (
            f"[{family.name}](/derivations/{name_of(family)}.md)",
            f"`{family.objective.__name__}`",
            statement(family).replace("|", r"\|"),
            thresholds(family),
            family.measure or "–",
        )
        for family in objectives.OBJECTIVES
    ]
    head = ("family", "class", "loss L and weight w", "threshold, as `drpo audit` shows it", "what it bounds")
    return ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]


def classes() -> list[str]:
    """The classes, each once, as Sphinx finds them: ``drpo_core.DRPO``."""
    names = dict.fromkeys(family.objective.__name__ for family in objectives.OBJECTIVES)
    return [f"{'drpo_core' if name in drpo_core.__all__ else 'drpo_core.objectives'}.{name}" for name in names]


def _number(threshold: Threshold) -> str:
    return "/".join(f"{side:g}" for side in threshold) if isinstance(threshold, tuple) else f"{threshold:g}"
