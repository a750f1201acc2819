"""Tables and figures of results, complete or not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from study import figures
from study.cells import DEFAULT, FURTHER, HEADLINE, METHODS, SEEDS, SIX, STRESS, STRESSED, TUNED_IN, TUNING_SEEDS, thresholds
from study.figures import title
from study.intervals import Interval, bootstrap, interquartile_mean, mean
from study.measures import batches_to_level, collapsed, final_reward, largest_mismatch, rare, spikes
from study.results import read_all
from study.runner import tuned_thresholds
from study.train import WEIGHT_EDGES
from study.verdicts import MARGIN, among_equals, as_published, decide, scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from study.results import Result
    from study.verdicts import Line, Runs, Verdict

PG_IS: Line = ("pg-is", 0.0)
HISTOGRAMS: tuple[Line, ...] = (
    PG_IS,
    ("grpo", 0.28),
    ("spo", 12.5),
    ("dppo-tv", 0.15),
    ("drpo", 12.5),
    ("drpo", 2.5),
    ("drpo", 0.15),
)


def grouped(results: Iterable[Result]) -> Runs:
    """Runs by setting and line, then by seed."""
    runs: Runs = {}
    for result in results:
        cell = result.cell
        runs.setdefault((cell.setting, (cell.method, cell.threshold)), {})[cell.seed] = result
    return runs


def quick(source: Path, drawings: Path) -> str:
    """Draw the quick run into a folder; returns a table of what it measured."""
    runs = grouped(read_all(source))
    figures.save(figures.quick(runs, TUNED_IN), drawings / "quick.svg")
    lines = list(dict.fromkeys(line for _, line in runs))
    seeds = sorted({seed for by_seed in runs.values() for seed in by_seed})
    return _markdown(
        ["method", *(f"final reward, seed {seed}" for seed in seeds), "E_μ[r], last step", "collapses"],
        [
            [
                title(line),
                *(_number(by_seed.get(seed), final_reward) for seed in seeds),
                f"{np.mean([np.nanmean(run.curves['ratio_last']) for run in by_seed.values()]):.3f}",
                f"{sum(collapsed(run) for run in by_seed.values()):.0f}",
            ]
            for line in lines
            for by_seed in [runs[TUNED_IN, line]]
        ],
    )


def report(source: Path, tables: Path, drawings: Path) -> str:
    """Write the tables to a file and draw every figure into a folder; returns the tables."""
    everything = read_all(source)
    tuning = grouped(r for r in everything if r.cell.seed in TUNING_SEEDS and r.cell.training == DEFAULT)
    compared = [r for r in everything if r.cell.seed not in TUNING_SEEDS]
    runs = grouped(r for r in compared if r.cell.training == DEFAULT)
    stressed = grouped(r for r in compared if r.cell.training != DEFAULT)
    tuned = tuned_thresholds(everything)
    # the planned seeds, and those that any run has beyond them
    seeds = sorted({*SEEDS, *(r.cell.seed for r in compared)})
    lines = [(name, t) for name in METHODS for t in thresholds(name, tuned)]
    headline: list[Line] = [(name, METHODS[name].published[0]) for name in HEADLINE]

    decided = decide(runs, tuned, seeds)
    parts = ["**Verdicts**", verdict_table(decided)]
    parts += ["**H1's rule among equals**", equals_table(runs, seeds)]
    parts += ["**Final reward**", reward_table(runs, lines, tuple(SIX), seeds, tuned)]
    parts += ["**Difference to PG-IS over the six settings**", difference_table(runs, lines, tuple(SIX), seeds)]
    parts += ["**Stability and efficiency over the six settings**", stability_table(runs, lines, tuple(SIX), seeds)]
    parts += ["**Further settings**", reward_table(runs, headline_lines(tuned), tuple(FURTHER), seeds, tuned)]
    parts += [
        f"**At {STRESS:g} times the learning rate**",
        reward_table(stressed, headline_lines(tuned), STRESSED, seeds, tuned),
        "**Stability there**",
        stability_table(stressed, headline_lines(tuned), STRESSED, seeds),
    ]
    parts += ["**Tuning**", tuning_table(tuning, tuned)]
    parts += ["**Mismatch**", mismatch_table(runs, headline)]
    counts = {"study": study_weights(runs, HISTOGRAMS)}
    counts |= {name: figures.gemma_weights(HISTOGRAMS, snapshot) for name, snapshot in figures.GEMMA.items()}
    parts += ["**Weights**", weight_table(counts)]
    text = "\n\n".join(parts) + "\n"
    tables.parent.mkdir(parents=True, exist_ok=True)
    tables.write_text(text)

    figures.save(figures.verdicts(decided, MARGIN), drawings / "verdicts.svg")
    figures.save(figures.learning_curves(runs, headline), drawings / "learning.svg")
    figures.save(figures.mismatch(runs, headline), drawings / "mismatch.svg")
    figures.save(figures.sensitivity(tuning, TUNED_IN), drawings / "sensitivity.svg")
    figures.save(figures.weight_histograms(counts), drawings / "weights.svg")
    return text


def headline_lines(tuned: dict[str, float]) -> list[Line]:
    """Every threshold of the headline methods."""
    return [(name, t) for name in HEADLINE for t in thresholds(name, tuned)]


def study_weights(runs: Runs, lines: Sequence[Line]) -> dict[Line, np.ndarray]:
    """Histogram of the weights of all runs, for each line."""
    found = {line: [np.array(r.weights) for (_, of), by in runs.items() if of == line for r in by.values()] for line in lines}
    return {line: np.sum(counts, axis=0) for line, counts in found.items() if counts}


def verdict_table(decided: Sequence[Verdict]) -> str:
    """Table of the hypotheses, each with the difference that decides it."""
    rows = [[v.name, v.claim, str(v.difference or "–"), v.decision] for v in decided]
    return _markdown(["", "claim", "difference [95 %]", "decision"], rows)


def equals_table(runs: Runs, seeds: Sequence[int]) -> str:
    """Table of how often H1's rule makes each decision when the methods are equal."""
    table = scores(runs, tuple(SIX), as_published(), final_reward, seeds)
    if table is None:
        return "(some of its runs are missing)"
    shares = among_equals(table)
    return _markdown(list(shares), [[f"{100.0 * share:.0f} %" for share in shares.values()]])


def reward_table(
    runs: Runs, lines: Sequence[Line], settings: Sequence[str], seeds: Sequence[int], tuned: dict[str, float]
) -> str:
    """Table of the final reward: interquartile means with intervals, for each setting and for all of them."""
    rows = []
    for line in lines:
        name = title(line) + (" (tuned)" if tuned.get(line[0]) == line[1] else "")
        cells = [_interval(runs, [setting], line, final_reward, seeds) for setting in settings]
        rows.append([name, *cells, _interval(runs, settings, line, final_reward, seeds)])
    return _markdown(["method", *settings, "all"], rows)


def difference_table(runs: Runs, lines: Sequence[Line], settings: Sequence[str], seeds: Sequence[int]) -> str:
    """Table of each line's final reward minus PG-IS's on the same seeds.

    The difference is one of interquartile means; the standard deviation is that of the pairs of runs.
    """
    rows = []
    for line in lines:
        found = scores(runs, settings, [line, PG_IS], final_reward, seeds) if line != PG_IS else None
        if found is not None:
            value, samples = bootstrap(found, interquartile_mean)
            interval = Interval.of(value[0] - value[1], samples[:, 0] - samples[:, 1])
            rows.append([title(line), str(interval), f"{np.std(found[..., 0] - found[..., 1]):.3f}"])
    return _markdown(["method", "difference [95 %]", "standard deviation of a pair of runs"], rows)


def weight_table(counts: dict[str, dict[Line, np.ndarray]]) -> str:
    """Table of the share of weights in two ranges around 1, and below 0, for each source of active tokens."""
    ranges = {"0.995 ≤ w < 1.005": (0.995, 1.005), "0.92 ≤ w < 1.08": (0.92, 1.08), "w < 0": (-math.inf, 0.0)}
    rows = []
    for source, by_line in counts.items():
        for line, bins in by_line.items():
            ends = [(WEIGHT_EDGES.index(low), WEIGHT_EDGES.index(high)) for low, high in ranges.values()]
            rows.append([source, title(line), *(f"{100.0 * bins[i:j].sum() / bins.sum():.1f} %" for i, j in ends)])
    return _markdown(["tokens", "method", *ranges], rows)


def stability_table(runs: Runs, lines: Sequence[Line], settings: Sequence[str], seeds: Sequence[int]) -> str:
    """Table of each line's collapses, spikes, mismatch, rare tokens and efficiency."""
    measures: dict[str, Callable[[Result], float]] = {
        "share of collapses": collapsed,
        "norm spikes a run": spikes,
        "largest mean abs(π − μ)": largest_mismatch,
        "batches to reward 0.5": batches_to_level,
        "tokens with μ ≤ 0.01": rare,
    }
    rows = [[title(line), *(_interval(runs, settings, line, m, seeds, mean) for m in measures.values())] for line in lines]
    return _markdown(["method", *measures], rows)


def mismatch_table(runs: Runs, lines: Sequence[Line]) -> str:
    """Table of the mean mismatch: at a batch's first step (number formats) and at its last (with staleness)."""
    names = ("tv", "k3", "ratio", "tv_last", "k3_last", "ratio_last")
    rows = []
    for setting in SIX | FURTHER:
        results = [run for line in lines for run in runs.get((setting, line), {}).values()]
        values = [f"{np.mean([np.nanmean(run.curves[name]) for run in results]):.4f}" if results else "–" for name in names]
        rows.append([setting, *values])
    return _markdown(
        ["setting", *(f"{n}, {step} step" for step in ("first", "last") for n in ("mean abs(π − μ)", "k3", "E_μ[r]"))], rows
    )


def tuning_table(runs: Runs, tuned: dict[str, float]) -> str:
    """Table of the mean final reward at each tried threshold; the chosen one is bold."""
    rows = []
    for name, method in METHODS.items():
        cells = []
        for threshold in method.grid:
            values = [final_reward(run) for run in runs.get((TUNED_IN, (name, threshold)), {}).values()]
            shown = f"{threshold:g}: {np.mean(values):.3f}" if values else f"{threshold:g}: –"
            cells.append(f"**{shown}**" if tuned.get(name) == threshold else shown)
        if cells:
            rows.append([figures.NAMES[name], *cells])
    return _markdown(["method", *(f"value {i + 1}" for i in range(5))], rows)


def _interval(
    runs: Runs,
    settings: Sequence[str],
    line: Line,
    measure: Callable[[Result], float],
    seeds: Sequence[int],
    statistic: Callable[..., np.ndarray] = interquartile_mean,
) -> str:
    found = scores(runs, settings, [line], measure, seeds)
    if found is None:
        there = sum(seed in runs.get((setting, line), {}) for setting in settings for seed in seeds)
        return f"({there} of {len(settings) * len(seeds)} runs)"
    value, samples = bootstrap(found, statistic)
    return str(Interval.of(value[0], samples[:, 0]))


def _number(result: Result | None, measure: Callable[[Result], float]) -> str:
    return "–" if result is None else f"{measure(result):.3f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # a bar would end the table's cell
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|A|", "abs(A)") for cell in line) + " |" for line in lines)
