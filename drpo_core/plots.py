"""Figures: an objective's weight as a function, and what objectives do to recorded rollouts.

Needs matplotlib, of the extra `cli`. ``python -m drpo_core.plots OUT.svg`` draws the README's figure; the same
matplotlib writes the same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from drpo_core.audit import BINS, Row
from drpo_core.explorer import COLOURS
from drpo_core.objectives import DPPO, DRPO, SPO, MaskDRPO, PPOClip
from drpo_core.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from drpo_core.audit import AnyObjective, Curve, Report, Snapshot

__all__ = ["SUFFIXES", "audit_figure", "save", "weight_figure"]

SUFFIXES = (".png", ".svg", ".pdf")
README_OBJECTIVES: tuple[AnyObjective, ...] = (
    PPOClip(eps=0.2),
    SPO(eps=0.2),
    DPPO(delta=0.15),
    MaskDRPO(delta=0.15),
    DRPO(delta=0.15),
)

# line styles tell thresholds apart
_STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "x", "+", "^", "s")
# PPO-clip and Mask-DRPO run on DPPO-TV, Mask-DRPO also on DRPO: what is beneath must show
_WIDTHS = {"DPPO-TV": 4.0, "DRPO": 2.2}
_ORDER = {"DPPO-TV": 2.1, "DRPO": 2.2, "PPO-clip": 2.3, "Mask-DRPO": 2.4}
# the weight is a function of the shift and the sign of A alone
_OF_SHIFT = ("PG-IS", "DPPO-TV", "DRPO", "Mask-DRPO")
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
    objectives: Sequence[AnyObjective] = README_OBJECTIVES,
    *,
    behavior_probs: Sequence[float] = (0.01, 0.5),
    advantage: float = 1.0,
    limits: tuple[float, float] = (-2.6, 3.4),
) -> Figure:
    """Gradient weight of objectives against π, one panel for each probability μ the token had when it was sampled.

    Parameters
    ----------
    objectives
        Such as ``drpo_core.DRPO(delta=0.15)``.
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
    >>> from drpo_core.plots import weight_figure
    >>> len(weight_figure(behavior_probs=[0.1, 0.3, 0.9]).axes)
    3
    """
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(4.1 * len(behavior_probs), 3.5), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(behavior_probs), sharey=True))
        rows = [Row(objective) for objective in objectives]
        styles = _line_styles(rows)
        for axis, mu in zip(axes, behavior_probs, strict=True):
            # steps of a rare token's region are narrow: log-spaced points around μ beside evenly spaced ones
            pi = np.unique(np.concatenate((np.linspace(1e-4, 1.0, 2001), mu * np.geomspace(1e-2, min(1e2, 1 / mu), 2001))))
            tokens = Tokens.of(np.log(pi), np.full_like(pi, np.log(mu)), np.full_like(pi, advantage), xp=np)
            axis.axvline(mu, color="#bbbbbb", linewidth=1.0, zorder=0)
            axis.annotate("μ", (mu, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points")
            for row, style in zip(rows, styles, strict=True):
                axis.plot(pi, row.objective.weight(tokens), label=row.label, **style)
            _frame(axis, limits)
            axis.set(xlabel="π, probability under the policy being trained", xlim=(0.0, 1.0))
            axis.set_title(f"sampled with μ = {mu:g}", loc="left")
        axes[0].set_ylabel(f"gradient weight w  (A {'>' if advantage > 0 else '<'} 0)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, handlelength=2.4)
    return figure


def audit_figure(report: Report, *, limits: tuple[float, float] = (-3.0, 4.0)) -> Figure:
    """Mean weight that each objective gives the rollouts' tokens, by shift, over the tokens' own histogram.

    Lines where the weight is a function of the shift; points where it is not (PPO-clip, SPO, CISPO, DPPO-KL).

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
    styles = [
        style if curve.row.family in _OF_SHIFT else _as_points(style, i)
        for i, (curve, style) in enumerate(zip(snapshot.curves, _line_styles([c.row for c in snapshot.curves]), strict=True))
    ]
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


def _as_points(style: dict[str, Any], i: int) -> dict[str, Any]:
    """Points, because tokens of one shift differ in weight and a line would join what is unrelated."""
    marker = _MARKERS[i % len(_MARKERS)]
    return {"color": style["color"], "linestyle": "none", "marker": marker, "markersize": 3.0, "alpha": 0.8}


def _points(curve: Curve, counts: np.ndarray[Any, Any], side: int, edges: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Bins that hold tokens; a line joins them over the empty ones."""
    held = counts > 0
    return (0.5 * (edges[1:] + edges[:-1]))[held], curve.total[side][held] / counts[held]


def _frame(axis: Axes, limits: tuple[float, float]) -> None:
    axis.axhline(0.0, color="#666666", linewidth=0.7, zorder=0)
    axis.axhline(1.0, color="#cccccc", linewidth=0.7, zorder=0)
    axis.set_ylim(limits)


def _line_styles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A colour for each family, a line style for each of its thresholds."""
    seen: dict[str, int] = {}
    styles = []
    for row in rows:
        nth = seen.get(row.family, 0)
        seen[row.family] = nth + 1
        # a shorter dash than any threshold's, so that the line beneath shows
        line = (nth * 1.0, (2.5, 1.5)) if row.family == "Mask-DRPO" else _STYLES[nth % len(_STYLES)]
        styles.append(
            {
                "color": COLOURS[row.family],
                "linestyle": line,
                "linewidth": _WIDTHS.get(row.family, 1.5),
                "zorder": _ORDER.get(row.family, 2.0),
            }
        )
    return styles


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m drpo_core.plots OUT.svg")
    save(weight_figure(), sys.argv[1])
