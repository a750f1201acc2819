"""Colours and line styles, by position in the table of objectives: what is drawn needs no style of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_core.objectives import OBJECTIVES

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["COLOURS", "MARKERS", "colours", "line"]

# Okabe and Ito's colours, then some of Tol's: colour-blind readers can tell them apart
COLOURS = (
    "#000000", "#999999", "#0072B2", "#56B4E9", "#E69F00", "#CC79A7", "#D55E00", "#009E73",
    "#882255", "#332288", "#999933", "#661100", "#44AA99", "#AA4499", "#117733", "#DDCC77",
    "#88CCEE", "#CC6677", "#EE8866", "#BBCC33", "#77AADD", "#6699CC", "#997700", "#EE3377",
)  # fmt: skip
SOLID: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
BROKEN: tuple[Any, ...] = ((0, (2.5, 1.5)), (0, (2.5, 1.5, 0.8, 1.5)), (0, (0.8, 0.8)), (0, (2.5, 3)), (0, (0.8, 2.4)))
MARKERS = ("o", "x", "+", "^", "s")


def colours(families: Iterable[str] = ()) -> dict[str, str]:
    """Return a colour for every line of the table, in its order, and then for each name that it does not have.

    Parameters
    ----------
    families
        Names of objectives, in the order in which they appear.

    Returns
    -------
    dict
        Colour by name, such as ``"#D55E00"``.

    Examples
    --------
    >>> from drpo_core.audit.palette import colours
    >>> colours(["DRPO", "Mine"])["Mine"]
    '#882255'
    """
    names = dict.fromkeys((*(family.name for family in OBJECTIVES), *families))
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def line(position: int, nth: int) -> Any:
    """Return the line style of a family's nth threshold, as matplotlib takes it.

    Every other family has broken lines, so that a solid one beneath shows through the gaps.
    """
    styles = BROKEN if position % 2 else SOLID
    return styles[nth % len(styles)]
