"""The study's figures. The same results give the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from drpo_core import token_loss_and_gradient
from drpo_core.audit import BUNDLED, open_rollouts
from study.cells import METHODS, SIX, objective
from study.measures import batches, final_reward, moving
from study.train import WEIGHT_EDGES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from study.results import Result
    from study.verdicts import Line, Runs, Verdict

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "svg.hashsalt": "drpo-study",
    "svg.fonttype": "path",
}
# Okabe and Ito's palette, which colour-blind readers can tell apart; a method has one colour in all figures
COLOURS = {
    "pg-is": "#000000",
    "grpo": "#E69F00",
    "spo": "#56B4E9",
    "dppo-tv": "#009E73",
    "dppo-kl": "#CC79A7",
    "drpo": "#D55E00",
}
OTHER = "#0072B2"
DOTTED = (0, (1, 1))
NAMES = {
    "pg-is": "PG-IS",
    "grpo": "GRPO clip-higher",
    "spo": "SPO",
    "dppo-tv": "DPPO-TV",
    "dppo-kl": "DPPO-KL",
    "drpo": "DRPO",
    "mask-drpo": "Mask-DRPO",
    "drpo-without-a": "DRPO without |A|",
    "k1": "k1 penalty",
    "k2": "k2 penalty",
    "k3": "k3 penalty",
    "tv": "TV penalty",
    "chi2-without-a": "χ² penalty without |A|",
}
SMOOTH = 9
"""Width of the moving average of learning curves, in batches."""


def title(line: Line) -> str:
    """The name of a method with its threshold."""
    name, threshold = line
    return f"{NAMES[name]} {threshold:g}" if METHODS[name].grid else NAMES[name]


def save(figure: Figure, path: Path) -> Path:
    """Save a figure as SVG, without a date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    # matplotlib leaves blanks at the ends of lines
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path


def _style(line: Line) -> dict[str, object]:
    return {"color": COLOURS.get(line[0], OTHER)}


def _draw(
    axis: Axes, results: Sequence[Result], name: str, style: dict[str, object], label: str | None, width: int = 1
) -> None:
    """Draw a thin curve for each seed and a thick one for their mean."""
    if not results:
        return
    x = batches(results[0], name)
    width = min(width, len(x))
    curves = np.array([moving(run.curves[name], width) for run in results])
    x = moving(x, width)
    for curve in curves:
        axis.plot(x, curve, lw=0.6, alpha=0.4, **style)
    axis.plot(x, np.nanmean(curves, axis=0), lw=1.8, label=label, **style)


def learning_curves(runs: Runs, lines: Sequence[Line], settings: Sequence[str] = tuple(SIX)) -> Figure:
    """Reward over the batches, with a panel for each setting."""
    with mpl.rc_context(STYLE):
        columns = min(3, len(settings))
        rows = -(-len(settings) // columns)
        figure = Figure(figsize=(3.7 * columns, 2.6 * rows + 0.8), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
        for axis, setting in zip(axes, settings, strict=False):
            for line in lines:
                _draw(axis, list(runs.get((setting, line), {}).values()), "reward", _style(line), title(line), SMOOTH)
            axis.set(title=setting, xlabel="rollout batch", ylim=(0, 1))
        figure.axes[0].set_ylabel(f"reward (mean over {SMOOTH} batches)")
        _legend(figure)
        return figure


def mismatch(runs: Runs, lines: Sequence[Line], settings: Sequence[str] = tuple(SIX)) -> Figure:
    """Mean |π − μ|, k3 and E_μ[r] at the first and the last step of each batch, with a column for each setting."""
    rows = {"tv": "mean |π − μ|", "k3": "mean k3, nats", "ratio": "mean r"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(settings) + 1.2, 7.0), layout="constrained")
        axes = figure.subplots(3, len(settings), sharex=True, sharey="row", squeeze=False)
        for column, setting in enumerate(settings):
            for row, (name, label) in enumerate(rows.items()):
                axis = axes[row, column]
                for line in lines:
                    results = list(runs.get((setting, line), {}).values())
                    for curve, dash in ((name, DOTTED), (f"{name}_last", "-")):
                        if results:
                            y = np.nanmean([run.curves[curve] for run in results], axis=0)
                            label_of = title(line) if row == 0 and dash == "-" else None
                            axis.plot(batches(results[0], curve), y, lw=1.3, linestyle=dash, label=label_of, **_style(line))
                if name != "ratio":
                    axis.set_yscale("log")
                if column == 0:
                    axis.set_ylabel(label)
                if row == 0:
                    axis.set_title(setting)
            axes[2, column].set_xlabel("rollout batch")
        figure.suptitle("dotted: first step of a batch (number formats); solid: last step (with staleness)", fontsize=9)
        _legend(figure)
        return figure


def sensitivity(runs: Runs, setting: str) -> Figure:
    """Final reward against the threshold, with a panel for each method. Dots are seeds; the dashed line is PG-IS."""
    methods = [name for name, method in METHODS.items() if method.grid]
    reference = [final_reward(run) for run in runs.get((setting, ("pg-is", 0.0)), {}).values()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 6.4), layout="constrained")
        for axis, name in zip(figure.subplots(3, 4, sharey=True).flat, methods, strict=False):
            points = [
                (threshold, final_reward(run))
                for threshold in METHODS[name].grid
                for run in runs.get((setting, (name, threshold)), {}).values()
            ]
            for threshold, reward in points:
                axis.plot(threshold, reward, "o", color=COLOURS.get(name, OTHER), ms=4)
            means = [
                (t, np.mean([y for x, y in points if x == t])) for t in METHODS[name].grid if any(x == t for x, _ in points)
            ]
            axis.plot(*zip(*means, strict=True) if means else ([], []), color=COLOURS.get(name, OTHER), lw=1.2)
            if reference:
                axis.axhline(float(np.mean(reference)), color="#000000", lw=0.8, ls="--")
            axis.set(title=NAMES[name], xscale="log", ylim=(0, 1), xlabel="threshold")
            axis.set_xlim(METHODS[name].grid[0] / 1.5, METHODS[name].grid[-1] * 1.5)
            axis.set_xticks(METHODS[name].grid, [f"{t:g}" for t in METHODS[name].grid])
            axis.minorticks_off()
        figure.axes[0].set_ylabel("final reward")
        figure.suptitle(f"Tuning seeds in {setting}; dashed: PG-IS", fontsize=9)
        return figure


GEMMA = {"Gemma, 8 steps at 1e-6": "lr1e6_step8", "Gemma, 8 steps at 2e-5": "lr2e5_step8"}
"""Snapshots of the Gemma rollouts: one of a healthy run and one of a diverging run."""


def gemma_weights(lines: Iterable[Line], snapshot: str) -> dict[Line, np.ndarray]:
    """Histograms of the weights at the active tokens of the bundled Gemma rollouts, over WEIGHT_EDGES."""
    rollouts = open_rollouts(BUNDLED)
    counts = {line: np.zeros(len(WEIGHT_EDGES) - 1, dtype=np.int64) for line in lines}
    for chunk in rollouts.chunks(snapshot):
        active = chunk.mask & (chunk.advantages != 0.0)
        tokens = (chunk.log_prob[active], chunk.behavior_log_prob[active], chunk.advantages[active])
        for line in counts:
            weight = token_loss_and_gradient(objective(*line), *tokens).weight
            counts[line] += np.histogram(weight, WEIGHT_EDGES)[0]
    return counts


def weight_histograms(counts: dict[str, dict[Line, np.ndarray]]) -> Figure:
    """Histograms of the weights at active tokens, with a column for each source of tokens and a row for each line."""
    lines = list(dict.fromkeys(line for column in counts.values() for line in column))
    shown = [
        WEIGHT_EDGES.index(edge) for edge in (-1.0, 0.0, 0.5, 0.9, 0.92, 0.96, 0.99, 1.0, 1.01, 1.04, 1.08, 1.1, 1.5, 2.0, 3.0)
    ]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(counts) + 0.6, 1.15 * len(lines) + 1.0), layout="constrained")
        axes = figure.subplots(len(lines), len(counts), sharex=True, sharey=True, squeeze=False)
        for column, (source, by_line) in enumerate(counts.items()):
            for row, line in enumerate(lines):
                axis, bins = axes[row, column], by_line.get(line)
                if bins is not None and bins.sum():
                    axis.bar(np.arange(len(bins)) + 0.5, bins / bins.sum(), width=0.9, **_style(line))
                axis.set_ylim(0, 1)
                axis.set_title(f"{title(line)}, {source}", fontsize=8, loc="left")
            axes[-1, column].set_xticks(shown, [f"{WEIGHT_EDGES[i]:g}" for i in shown], rotation=90, fontsize=8)
            axes[-1, column].set_xlabel("weight w: edges of the bins, finest around 1")
        figure.supylabel("share of tokens with A ≠ 0", fontsize=9)
        return figure


def verdicts(decided: Sequence[Verdict], margin: float) -> Figure:
    """Each hypothesis with its claim, the difference that decides it, the interval of that, and the decision."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 0.32 * len(decided) + 1.0), layout="constrained")
        axis = figure.subplots()
        axis.axvspan(-margin, margin, color="#EEEEEE", zorder=0)
        axis.axvline(0.0, color="#000000", lw=0.8, zorder=1)
        for row, verdict in enumerate(decided):
            if verdict.difference is not None:
                value, low, high = verdict.difference
                axis.plot([low, high], [row, row], color=OTHER, lw=2.0)
                axis.plot(value, row, "o", color=OTHER, ms=5)
            axis.annotate(verdict.decision, (1.01, row), xycoords=("axes fraction", "data"), va="center")
        axis.set_yticks(range(len(decided)), [f"{v.name}: {v.claim}" for v in decided])
        axis.set_ylim(len(decided) - 0.5, -0.5)
        axis.set_xlabel(f"difference of final reward (H2: of the share of collapses), 95 %; grey: the margin of ±{margin:g}")
        return figure


def quick(runs: Runs, setting: str) -> Figure:
    """Reward and mismatch of a few lines in one setting."""
    lines = list(dict.fromkeys(line for _, line in runs))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for line in lines:
            results = list(runs.get((setting, line), {}).values())
            _draw(left, results, "reward", _style(line), title(line), SMOOTH)
            for name, dash in (("tv_last", "-"), ("tv", DOTTED)):
                mean = np.nanmean([run.curves[name] for run in results], axis=0)
                right.plot(batches(results[0], name), mean, lw=1.8, linestyle=dash, **_style(line))
        for label, dash in (("last step of a batch: formats and staleness", "-"), ("first step: formats", DOTTED)):
            right.plot([], [], color="#777777", lw=1.8, linestyle=dash, label=label)
        seeds = len({seed for by_seed in runs.values() for seed in by_seed})
        name = f"Learning in {setting}, {seeds} seeds"
        left.set(xlabel="rollout batch", ylabel=f"reward (mean over {SMOOTH} batches)", ylim=(0, 1), title=name)
        right.set(
            xlabel="rollout batch",
            ylabel="mean |π − μ|",
            yscale="log",
            ylim=(5e-4, 4e-2),
            title="How far the policy is from what sampled",
        )
        left.legend(frameon=False, fontsize=8, loc="lower right")
        right.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.2))
        return figure


def _legend(figure: Figure) -> None:
    known: dict[str, object] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    if known:
        figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
