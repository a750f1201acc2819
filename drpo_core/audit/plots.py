"""Figures: an objective's weight as a function, and what objectives do to recorded rollouts.

Needs matplotlib, of the extra `cli`. ``python -m drpo_core.audit.plots OUT.svg`` draws the README's figure; the same
matplotlib writes the same bytes.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from drpo_core.audit.palette import MARKERS, colours, line
from drpo_core.audit.report import BINS
from drpo_core.audit.selection import Row
from drpo_core.objectives import OBJECTIVES
from drpo_core.objectives.protocol import weight_of
from drpo_core.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from drpo_core.audit.report import Curve, Report, Snapshot
    from drpo_core.objectives import Objective

__all__ = ["SUFFIXES", "audit_figure", "save", "weight_figure"]

SUFFIXES = (".png", ".svg", ".pdf")

_DATE = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}, ".pdf": {"CreationDate": None, "Producer": None}}
_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "svg.hashsalt": "drpo-core",
    "svg.fonttype": "path",
}


def weight_figure(
    objectives: Sequence[Objective] | None = None,
    *,
    behavior_probs: Sequence[float] = (0.01, 0.5),
    advantage: float = 1.0,
    limits: tuple[float, float] = (-2.6, 3.4),
) -> Figure:
    """Gradient weight of objectives against π, one panel for each probability μ the token had when it was sampled.

    Parameters
    ----------
    objectives
        Such as ``drpo_core.DRPO(delta=0.15)``; default: every one of the table that bounds something, at its first typical
        threshold.
    behavior_probs
        μ, one a panel.
    advantage
        A; only its sign matters.
    limits
        Range of the weight axis.

    Returns
    -------
    matplotlib.figure.Figure
        To be written with `save`.

    Examples
    --------
    >>> from drpo_core.audit.plots import weight_figure
    >>> len(weight_figure(behavior_probs=[0.1, 0.3, 0.9]).axes)
    3
    """
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(4.1 * len(behavior_probs), 3.5), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(behavior_probs), sharey=True))
        rows = [Row(objective) for objective in (_bounding() if objectives is None else objectives)]
        styles = _line_styles(rows)
        for axis, mu in zip(axes, behavior_probs, strict=True):
            # log-spaced points around μ besides evenly spaced ones, because the region of a rare token is narrow
            pi = np.unique(np.concatenate((np.linspace(1e-4, 1.0, 2001), mu * np.geomspace(1e-2, min(1e2, 1 / mu), 2001))))
            tokens = Tokens.checked(np.log(pi), np.full_like(pi, np.log(mu)), np.full_like(pi, advantage))
            axis.axvline(mu, color="#bbbbbb", linewidth=1.0, zorder=0)
            axis.annotate("μ", (mu, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points")
            for row, style in zip(rows, styles, strict=True):
                axis.plot(pi, weight_of(row.objective, tokens), label=row.label, **style)
            _frame(axis, limits)
            axis.set(xlabel="π, probability under the policy being trained", xlim=(0.0, 1.0))
            axis.set_title(f"sampled with μ = {mu:g}", loc="left")
        axes[0].set_ylabel(f"gradient weight w  (A {'>' if advantage > 0 else '<'} 0)")
        handles, labels = axes[0].get_legend_handles_labels()
        columns = len(labels) if len(labels) <= 5 else -(-len(labels) // 2)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.4)
    return figure


def audit_figure(report: Report, *, limits: tuple[float, float] = (-3.0, 4.0)) -> Figure:
    """Mean weight that each objective gives the rollouts' tokens, by shift, over the tokens' own histogram.

    Lines where the weight is a function of the shift and the sign of A; points where it is not (such as PPO-clip).

    Parameters
    ----------
    report
        A result of ``drpo_core.audit.audit(…, curves=True)``.
    limits
        Range of the weight axis.

    Returns
    -------
    matplotlib.figure.Figure
        To be written with `save`.
    """
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(10.5, 4.6 * len(report.snapshots) + 0.5), layout="constrained")
        blocks: Any = figure.subfigures(len(report.snapshots), 1, squeeze=False)[:, 0]
        for block, (name, snapshot) in zip(blocks, report.snapshots.items(), strict=True):
            _draw_snapshot(block, name, snapshot, limits)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as its suffix says, without a date and with stable identifiers.

    Parameters
    ----------
    figure
        From `weight_figure` or `audit_figure`.
    path
        A .png, .svg or .pdf file.

    Raises
    ------
    ValueError
        If the suffix is another.
    OSError
        If the file can't be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        msg = f"{path}: expected a file named {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}"
        raise ValueError(msg)
    with mpl.rc_context(_RC):
        figure.savefig(path, format=suffix[1:], dpi=150, metadata=_DATE[suffix])


def _draw_snapshot(block: Any, name: str, snapshot: Snapshot, limits: tuple[float, float]) -> None:
    axes = block.subplots(2, 2, sharex=True, sharey="row", height_ratios=(2.4, 1.0))
    edges = np.linspace(-1.0, 1.0, BINS + 1)
    styles = _curve_styles([curve.row for curve in snapshot.curves])
    occupied = np.abs(edges)[:-1][snapshot.counts.sum(axis=0) > 0]
    reach = min(1.0, 1.15 * max(float(occupied.max(initial=0.0)), 0.05))
    for side, sign in enumerate(("A > 0", "A < 0")):
        above, below = axes[:, side]
        counts = snapshot.counts[side]
        for curve, style in zip(snapshot.curves, styles, strict=True):
            above.plot(*_points(curve, counts, side, edges), label=curve.row.label, **style)
        _frame(above, limits)
        # an array's name is not mathematical notation
        above.set_title(f"{name.replace('$', chr(92) + '$')},  {sign}", loc="left")
        below.stairs(counts, edges, fill=True, color="#bbbbbb")
        below.set_yscale("log", nonpositive="clip")
        below.set(xlabel="shift π − μ", xlim=(-reach, reach), ylim=(0.5, max(2.0, 2.0 * snapshot.counts.max())))
    axes[0, 0].set_ylabel("mean weight w")
    axes[1, 0].set_ylabel("tokens")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    block.legend(handles, labels, loc="outside right center", frameon=False, handlelength=2.8)


def _bounding() -> list[Objective]:
    """Return each objective of the table that bounds something, at its first typical threshold."""
    return [family.make(family.typical[0]) for family in OBJECTIVES if family.measure and family.typical]


def _is_function_of_shift(objective: Objective) -> bool:
    """Compare rare and common tokens of the same shift: return whether the weight depends on the shift and sign of A alone."""
    shift = np.linspace(-0.987, 0.987, 401)
    distance = np.abs(shift)
    rare = 1e-3 * (1.0 - distance)
    common = 0.5 * (1.0 - distance)
    weights = []
    for smaller in (rare, common):
        log_smaller, log_larger = np.log(smaller), np.log(smaller + distance)
        log_pi, log_mu = np.where(shift < 0, log_smaller, log_larger), np.where(shift < 0, log_larger, log_smaller)
        for a in (1.0, -1.0):
            tokens = Tokens.checked(log_pi, log_mu, np.full_like(shift, a))
            weights.append(weight_of(objective, tokens))
    return np.allclose(weights[:2], weights[2:], rtol=1e-6, atol=1e-6, equal_nan=True)


def _curve_styles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return lines where the weight is a function of the shift, else points: a line would join what is unrelated."""
    functions = [_is_function_of_shift(row.objective) for row in rows]
    lines = iter(_line_styles([row for row, function in zip(rows, functions, strict=True) if function]))
    colour = colours(row.family for row in rows)
    points = {"linestyle": "none", "markersize": 3.0, "alpha": 0.8}
    return [
        next(lines) if function else {"color": colour[row.family], "marker": MARKERS[i % len(MARKERS)], **points}
        for i, (row, function) in enumerate(zip(rows, functions, strict=True))
    ]


def _points(curve: Curve, counts: np.ndarray[Any, Any], side: int, edges: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Bins that hold tokens; a line joins them over the empty ones."""
    held = counts > 0
    return (0.5 * (edges[1:] + edges[:-1]))[held], curve.total[side][held] / counts[held]


def _frame(axis: Axes, limits: tuple[float, float]) -> None:
    axis.axhline(0.0, color="#666666", linewidth=0.7, zorder=0)
    axis.axhline(1.0, color="#cccccc", linewidth=0.7, zorder=0)
    axis.set_ylim(limits)


def _line_styles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a colour for each family and a line style for each of its thresholds.

    Each line is thinner than the one before it and drawn above it, so that all show where lines coincide.
    """
    colour, seen = colours(row.family for row in rows), Counter[str]()
    widths = np.geomspace(3.4, 1.2, len(rows))
    styles = []
    for i, row in enumerate(rows):
        styles.append(
            {
                "color": colour[row.family],
                "linestyle": line(list(colour).index(row.family), seen[row.family]),
                "linewidth": float(widths[i]),
                "zorder": 2.0 + i / len(rows),
            }
        )
        seen[row.family] += 1
    return styles


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m drpo_core.audit.plots OUT.svg")
    save(weight_figure(), sys.argv[1])
