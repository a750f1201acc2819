"""The audit itself: one pass over the file for each snapshot, in bounded memory.

Every figure is a statistic of `drpo_core.diagnostics`, merged over chunks; nothing is computed in a second way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from drpo_core.audit.health import Tally
from drpo_core.audit.quantiles import rows_at
from drpo_core.audit.readers import RolloutError
from drpo_core.audit.report import BINS, Audited, Curve, Report, Snapshot
from drpo_core.audit.selection import Row, as_row, rows
from drpo_core.audit.tokens import ChunkTokens
from drpo_core.diagnostics import (
    Diagnostics,
    Mean,
    data_diagnostics,
    merge_diagnostics,
    objective_diagnostics,
    summarize,
)
from drpo_core.objectives import PolicyGradient
from drpo_core.objectives.protocol import check_objective, inside_of, ratio_weight_of, weight_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drpo_core.audit.readers import Chunk, Rollouts
    from drpo_core.objectives import Objective

    Values = np.ndarray[Any, Any]

__all__ = ["DATA_FIGURES", "audit"]

RARE = (0.1, 0.01, 0.001)
# so many chunks' statistics are merged in one go, because merging them one by one costs more than the statistics
MERGED_AT_ONCE = 64
DATA_FIGURES = (
    "ratio_mean", "ratio_max", "log_ratio_abs_mean", "k1_mean", "k3_mean", "binary_tv_mean", "binary_tv_max",
    "invalid_fraction",
)  # fmt: skip


def audit(
    rollouts: Rollouts,
    objectives: Sequence[Row | Objective] | None = None,
    *,
    quantiles: Sequence[float] = (),
    curves: bool = False,
    advance: Callable[[int], object] = lambda _: None,
    file: str | None = None,
) -> Report:
    """Compute what each objective would do to every snapshot of recorded rollouts.

    Parameters
    ----------
    rollouts
        A file opened with `open_rollouts`.
    objectives
        What to audit beside PG-IS, which is always the first: objectives, which may be your own, or rows; default:
        ``rows()``.
    quantiles
        Shares q, 0 < q < 1: add rows at the thresholds that drop a share q of the diverging tokens.
    curves
        Whether to gather the mean weight by shift, which the plot needs.
    advance
        Called with the number of tokens read since the last call.
    file
        The report's name of the file; default: its path.

    Returns
    -------
    Report
        Figures by snapshot.

    Raises
    ------
    RolloutError
        If a valid token has a NaN, no token is valid, or the file is damaged.
    TypeError
        If an objective lacks a method, or a method returns anything but an array of the tokens' shape.

    Examples
    --------
    >>> from drpo_core.audit import BUNDLED, audit, open_rollouts
    >>> report = audit(open_rollouts(BUNDLED, snapshots=["lr2e5_step8"]))
    >>> round(report.snapshots["lr2e5_step8"].health["binary_tv_mean"], 5)
    0.21753
    """
    table = [Row(PolicyGradient()), *(rows() if objectives is None else map(as_row, objectives))]
    for row in table:
        check_objective(row.objective)
    snapshots = {}
    for name in rollouts.snapshots:
        # log-probs far above 0 are reported as such; warnings that their exponentials overflow would add nothing
        with np.errstate(over="ignore", invalid="ignore"):
            added, notes = rows_at(rollouts, name, quantiles, advance)
            snapshots[name] = _snapshot(rollouts, name, [*table, *added], advance, curves=curves)
        snapshots[name].warnings += notes
    arrays: dict[str, Any] = {
        "log_prob": rollouts.snapshots,
        "behavior_log_prob": rollouts.behavior_log_prob,
        "advantages": rollouts.advantages,
        "mask": rollouts.mask,
    }
    notes = [*rollouts.notes, *dict.fromkeys(row.warning for row in table if row.warning)]
    return Report(file or str(rollouts.path), arrays, snapshots, notes)


def _snapshot(
    rollouts: Rollouts, name: str, table: Sequence[Row], advance: Callable[[int], object], *, curves: bool
) -> Snapshot:
    arrays = {
        "log_prob": rollouts.snapshots[name],
        "behavior_log_prob": rollouts.behavior_log_prob,
        "advantages": rollouts.advantages,
    }
    tally, tolerance = Tally(), rollouts.tolerance(name)
    merged = _Merged()
    counts, drawn = np.zeros((2, BINS)), [Curve(row) for row in table if curves]
    for chunk in rollouts.chunks(name):
        tally.add(chunk, tolerance)
        found = ChunkTokens.of(chunk)
        tokens, sets = found.tokens, found.sets
        places = _places(found) if curves else np.empty(0, np.intp)
        counts += _histogram(places)
        part = [data_diagnostics(tokens, sets) | _shares(chunk, found)]
        for i, row in enumerate(table):
            weight = weight_of(row.objective, tokens)
            ratio_weight, inside = ratio_weight_of(row.objective, tokens), inside_of(row.objective, tokens)
            part.append(objective_diagnostics(tokens, weight, ratio_weight, inside, sets))
            if curves:
                drawn[i].total += _histogram(places, weight[sets.active.where])
        merged.add(part)
        advance(len(chunk.mask))
    tally.refuse_nan(arrays)
    data, *objectives = merged.all() or [{}]
    if not data or data["valid_fraction"][0] == 0.0:
        msg = f"{rollouts.mask or rollouts.path}: no token is valid, there is nothing to audit"
        raise RolloutError(msg)
    audited = [Audited(row, summarize(statistics)) for row, statistics in zip(table, objectives, strict=True)]
    return Snapshot(_health(tally, data), audited, tally.warnings(arrays), counts, drawn)


class _Merged:
    """Statistics of any number of chunks in bounded memory: one list a chunk, merged every so often."""

    def __init__(self) -> None:
        self.parts: list[list[Diagnostics]] = []

    def add(self, part: list[Diagnostics]) -> None:
        """Add the statistics of a chunk."""
        self.parts.append(part)
        if len(self.parts) == MERGED_AT_ONCE:
            self.parts = [self.all()]

    def all(self) -> list[Diagnostics]:
        """Return the statistics of all chunks; an empty list if there was none."""
        return [merge_diagnostics(*column) for column in zip(*self.parts, strict=True)]


def _shares(chunk: Chunk, found: ChunkTokens) -> Diagnostics:
    """Return shares of tokens, and the mean of (r − 1)², which `drpo_core.diagnostics` does not have."""

    def share(condition: Values, of: Values) -> Mean:
        return Mean(*(np.asarray(np.count_nonzero(where), np.float64) for where in (condition & of, of)))

    usable = found.sets.valid.where
    squares = np.square(found.tokens.ratio_minus_one[usable], dtype=np.float64)
    return {
        "ratio_square_mean": Mean(squares.sum(), np.asarray(squares.size, np.float64)),
        "valid_fraction": share(chunk.mask, np.ones_like(chunk.mask)),
        "active_fraction": share(found.active, chunk.mask),
        "diverging_fraction": share(found.diverging, found.active),
        **{f"rare_{p:g}": share(chunk.behavior_log_prob <= math.log(p), chunk.mask) for p in RARE},
    }


def _health(tally: Tally, data: Diagnostics) -> dict[str, Any]:
    """Return what the report says about the data: counts, figures that no objective enters, and what is wrong."""
    figures = summarize(data)
    valid, active, diverging = (int(data[f"{name}_fraction"][0]) for name in ("valid", "active", "diverging"))
    return {
        "tokens": tally.tokens,
        "valid_tokens": valid,
        "masked_tokens": tally.tokens - valid,
        "active_tokens": active,
        "diverging_tokens": diverging,
        "masked_nan": tally.masked_nan,
        "positive_log_prob": {key: n for key, n in tally.by_argument("positive").items() if key != "advantages"},
        "infinite": tally.by_argument("+inf", "-inf"),
        **{key: figures[key] for key in DATA_FIGURES},
        "ratio_standard_error": _standard_error(data),
        "active_fraction": figures["active_fraction"],
        "diverging_fraction": figures["diverging_fraction"],
        "rare_fraction": {f"{p:g}": figures[f"rare_{p:g}"] for p in RARE},
    }


def _standard_error(data: Diagnostics) -> float:
    """Return that of the mean ratio: tokens add up, for under μ each r − 1 is of mean 0 whatever came before it."""
    mean, square = (float(data[name].value) for name in ("ratio_mean", "ratio_square_mean"))
    count = float(data["ratio_mean"].count)
    return math.sqrt(max(0.0, square - (mean - 1.0) ** 2) / (count - 1.0)) if count > 1.0 else math.nan


def _places(found: ChunkTokens) -> Values:
    """Return each active token's bin in the flattened histogram: by shift, first those with A > 0."""
    shift, a = found.tokens.shift[found.active], found.tokens.advantages[found.active]
    # log-probs above 0 can put the shift outside [−1, 1], or make it NaN
    scaled = np.nan_to_num((shift + 1.0) * (0.5 * BINS), nan=0.5 * BINS)
    places: Values = np.clip(scaled, 0, BINS - 1).astype(np.intp) + BINS * (a < 0.0)
    return places


def _histogram(places: Values, weights: Values | None = None) -> Values:
    counts: Values = np.bincount(places, weights=weights, minlength=2 * BINS).reshape(2, BINS)
    return counts
