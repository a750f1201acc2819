"""What each objective would do to recorded rollouts, in one bounded-memory pass over the file per snapshot.

Every figure is a statistic of `drpo_core.diagnostics`, merged over chunks; nothing is computed a second way.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from drpo_core.diagnostics import Diagnostics, Mean, merge_diagnostics, summarize, token_diagnostics
from drpo_core.divergence import binary_kl_of
from drpo_core.objectives import CISPO, DPPO, DRPO, SPO, MaskDRPO, PolicyGradient, PPOClip
from drpo_core.tokens import Tokens
from drpo_core.rollouts import RolloutError
from drpo_core.objectives.thresholds import VacuousTrustRegionWarning
from drpo_core.validation import find_problems

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from drpo_core.rollouts import Chunk, Rollouts

    Values = np.ndarray[Any, Any]
    Advance: TypeAlias = Callable[[int], object]

__all__ = ["SCHEMA_VERSION", "Audited", "Curve", "Report", "Row", "Snapshot", "Threshold", "active_tokens", "audit", "rows"]

SCHEMA_VERSION = 1
RARE = (0.1, 0.01, 0.001)
DATA_FIGURES = (
    "ratio_mean", "ratio_max", "log_ratio_abs_mean", "k1_mean", "k3_mean", "binary_tv_mean", "binary_tv_max",
    "invalid_fraction",
)  # fmt: skip
# bins of the shift π − μ in [−1, 1]; an odd number, so that on-policy tokens fill one bin
BINS = 201

AnyObjective: TypeAlias = PolicyGradient | PPOClip | CISPO | SPO | DPPO | DRPO | MaskDRPO
Threshold: TypeAlias = float | tuple[float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """An objective to audit: `quantile` if its threshold was chosen to drop that share, `warning` if it is vacuous."""

    objective: AnyObjective
    quantile: float | None = None
    warning: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The hyper-parameters that are set."""
        fields = dataclasses.fields(self.objective)
        values = {item.name: getattr(self.objective, item.name) for item in fields}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def name(self) -> str:
        """As one would write it in Python."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())
        return f"{type(self.objective).__name__}({arguments})"

    @property
    def family(self) -> str:
        """The objective's name as the papers write it."""
        if isinstance(self.objective, DPPO):
            return {"binary_tv": "DPPO-TV", "binary_kl": "DPPO-KL"}[self.objective.divergence]
        names = {PolicyGradient: "PG-IS", PPOClip: "PPO-clip", MaskDRPO: "Mask-DRPO"}
        return names.get(type(self.objective), type(self.objective).__name__)

    @property
    def label(self) -> str:
        """Family and threshold, for people."""
        symbols = {"delta": "δ", "eps": "ε", "max_ratio": "c"}
        numbers = {name: value for name, value in self.parameters.items() if name != "divergence"}
        for name in ("delta", "eps"):
            if f"{name}_low" in numbers:
                numbers = {name: (numbers[f"{name}_low"], numbers[f"{name}_high"])}
        parts = [
            f"{symbols[name]}={value:.4g}"
            if not isinstance(value, tuple)
            else f"{symbols[name]}={value[0]:.4g}/{value[1]:.4g}"
            for name, value in numbers.items()
        ]
        return " ".join((self.family, *parts))


@dataclass(slots=True)
class Curve:
    """Mean weight in each bin of the shift, for A > 0 and for A < 0."""

    row: Row
    total: Values = field(default_factory=lambda: np.zeros((2, BINS)))


@dataclass(slots=True)
class Audited:
    """A row and its figures."""

    row: Row
    figures: dict[str, float]


@dataclass(slots=True)
class Snapshot:
    """The data's own health, each objective's figures, and what the plot needs.

    `counts` is the histogram of active tokens over `BINS` bins of the shift, for A > 0 and for A < 0.
    """

    health: dict[str, Any]
    objectives: list[Audited]
    warnings: list[str]
    counts: Values
    curves: list[Curve]


@dataclass(slots=True)
class Report:
    """The audit of a file."""

    file: str
    arrays: dict[str, Any]
    snapshots: dict[str, Snapshot]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The report as strict JSON: what is not a finite number is None. `docs/audit.md` describes it."""
        from drpo_core import __version__  # noqa: PLC0415 - the package imports nothing of the audit, but not the reverse

        return {
            "version": SCHEMA_VERSION,
            "drpo_core": __version__,
            "file": self.file,
            "arrays": self.arrays,
            "notes": self.notes,
            "snapshots": {
                name: {
                    "health": _strict(snapshot.health),
                    "warnings": snapshot.warnings,
                    "objectives": [
                        {
                            "name": audited.row.name,
                            "objective": type(audited.row.objective).__name__,
                            "parameters": audited.row.parameters,
                            "quantile": audited.row.quantile,
                            "warning": audited.row.warning,
                            **_strict(audited.figures),
                        }
                        for audited in snapshot.objectives
                    ],
                }
                for name, snapshot in self.snapshots.items()
            },
        }


def rows(
    *,
    delta: Sequence[Threshold] = (0.15, 12.5),
    delta_kl: Sequence[Threshold] = (0.05,),
    eps: Sequence[Threshold] = (0.2, (0.2, 0.28)),
    max_ratio: Sequence[float] = (5.0,),
    quantile: float | None = None,
) -> list[Row]:
    """Objectives at each of the given thresholds; a threshold is one number, or (low, high).

    At δ ≥ 1 DPPO Binary-TV and Mask-DRPO are the unregularised surrogate, so only DRPO gets a row there.

    Parameters
    ----------
    delta
        δ of DPPO Binary-TV, DRPO and Mask-DRPO, differences of probabilities.
    delta_kl
        δ of DPPO Binary-KL, nats.
    eps
        ε of PPO-clip and SPO, differences of importance ratios.
    max_ratio
        c of CISPO.
    quantile
        The share of diverging tokens that these thresholds drop, if they were chosen so.

    Returns
    -------
    list
        Rows by family.

    Raises
    ------
    TypeError, ValueError
        If a threshold is not a finite positive number.

    Examples
    --------
    >>> from drpo_core.audit import rows
    >>> [row.label for row in rows(delta=[0.1, 2.0], delta_kl=[], eps=[(0.2, 0.28)], max_ratio=[])]
    ['PPO-clip ε=0.2/0.28', 'SPO ε=0.2/0.28', 'DPPO-TV δ=0.1', 'DRPO δ=0.1', 'DRPO δ=2', 'Mask-DRPO δ=0.1']
    """
    small = [value for value in delta if np.max(value) < 1.0]
    wanted: list[tuple[type[AnyObjective], str, Sequence[Threshold], dict[str, Any]]] = [
        (CISPO, "max_ratio", max_ratio, {}),
        (PPOClip, "eps", eps, {}),
        (SPO, "eps", eps, {}),
        (DPPO, "delta", small, {}),
        (DPPO, "delta", delta_kl, {"divergence": "binary_kl"}),
        (DRPO, "delta", delta, {}),
        (MaskDRPO, "delta", small, {}),
    ]
    return [_row(kind, name, value, quantile, more) for kind, name, values, more in wanted for value in values]


def _row(kind: type[AnyObjective], name: str, value: Threshold, quantile: float | None, more: dict[str, Any]) -> Row:
    sides: dict[str, Any] = (
        {name: value} if not isinstance(value, tuple) else {f"{name}_low": value[0], f"{name}_high": value[1]}
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VacuousTrustRegionWarning)
        objective = kind(**sides, **more)
    return Row(objective, quantile, str(caught[0].message) if caught else None)


def audit(
    rollouts: Rollouts,
    objectives: Sequence[Row] | None = None,
    *,
    quantiles: Sequence[float] = (),
    curves: bool = False,
    advance: Advance = lambda _: None,
    file: str | None = None,
) -> Report:
    """What each objective would do to every snapshot of recorded rollouts.

    Parameters
    ----------
    rollouts
        A file opened with `drpo_core.rollouts.open_rollouts`.
    objectives
        Rows to audit beside PG-IS, which is always the first; default: ``rows()``.
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

    Examples
    --------
    >>> from importlib.resources import files
    >>> from drpo_core.audit import audit
    >>> from drpo_core.rollouts import open_rollouts
    >>> path = files("drpo_core") / "data" / "gemma3_270m_arithmetic.npz"
    >>> report = audit(open_rollouts(path, snapshots=["lr2e5_step8"]))
    >>> round(report.snapshots["lr2e5_step8"].health["binary_tv_mean"], 5)
    0.21753
    """
    table = [Row(PolicyGradient()), *(rows() if objectives is None else objectives)]
    snapshots = {}
    for name in rollouts.snapshots:
        # log-probs far above 0 are reported as such; that their exponentials overflow adds nothing
        with np.errstate(over="ignore", invalid="ignore"):
            added, notes = _rows_at(rollouts, name, quantiles, advance)
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


# --- one pass: figures and health ------------------------------------------------------------------------------------


class _Tally:
    """Counts of what is wrong with the data, and where it first is."""

    def __init__(self) -> None:
        self.tokens = 0
        self.counts: dict[tuple[str, str], int] = {}
        self.first: dict[tuple[str, str], tuple[int, ...]] = {}
        self.masked_nan = dict.fromkeys(("log_prob", "behavior_log_prob", "advantages"), 0)

    def add(self, chunk: Chunk, tolerance: float) -> None:
        """Count a chunk's problems."""
        self.tokens += len(chunk.mask)
        for name in self.masked_nan:
            self.masked_nan[name] += int(np.count_nonzero(np.isnan(getattr(chunk, name)) & ~chunk.mask))
        for argument, kind, count, first in find_problems(*chunk[:3], mask=chunk.mask, tolerance=tolerance):
            key = (argument, "positive" if kind.startswith("above") else kind)
            self.counts[key] = self.counts.get(key, 0) + count
            self.first.setdefault(key, chunk.locate(first[0]))

    def refuse_nan(self, arrays: Mapping[str, str]) -> None:
        """Raise if a valid token has a NaN: there is no figure it would not spoil."""
        for (argument, kind), count in self.counts.items():
            if kind == "NaN":
                first = self.first[argument, kind]
                index = first[0] if len(first) == 1 else first
                msg = f"{arrays[argument]}: {count} NaN at valid tokens, the first at index {index}"
                raise RolloutError(msg)

    def by_argument(self, *kinds: str) -> dict[str, int]:
        """Counts of some kinds of problem."""
        return {name: sum(self.counts.get((name, kind), 0) for kind in kinds) for name in self.masked_nan}

    def warnings(self, arrays: Mapping[str, str]) -> list[str]:
        """One line for each kind of problem."""
        meaning = {
            "positive": "a value above 0, which no log-prob has",
            "-inf": "-inf",
            "+inf": "+inf, and enter no figure",
        }
        excluded = {("behavior_log_prob", "-inf"), ("advantages", "-inf")}
        return [
            f"{arrays[argument]}: {count} valid tokens hold {meaning[kind]}"
            f"{', and enter no figure' if (argument, kind) in excluded else ''}"
            f" (first at {self.first[argument, kind]})"
            for (argument, kind), count in self.counts.items()
        ]


def _snapshot(rollouts: Rollouts, name: str, table: Sequence[Row], advance: Advance, *, curves: bool) -> Snapshot:
    arrays = {
        "log_prob": rollouts.snapshots[name],
        "behavior_log_prob": rollouts.behavior_log_prob,
        "advantages": rollouts.advantages,
    }
    tally, tolerance = _Tally(), rollouts.tolerance(name)
    merged: list[Diagnostics] = []
    counts, drawn = np.zeros((2, BINS)), [Curve(row) for row in table if curves]
    for chunk in rollouts.chunks(name):
        tally.add(chunk, tolerance)
        part = [token_diagnostics(row.objective, *chunk[:3], mask=chunk.mask) for row in table] + [_own_statistics(chunk)]
        merged = [merge_diagnostics(*pair) for pair in zip(merged, part, strict=True)] if merged else part
        if curves:
            _add_to_curves(chunk, counts, drawn)
        advance(len(chunk.mask))
    tally.refuse_nan(arrays)
    total = {key: int(share.total) for key, share in merged[-1].items() if isinstance(share, Mean)} if merged else {}
    if not total.get("valid_fraction"):
        msg = f"{rollouts.mask or rollouts.path}: no token is valid, there is nothing to audit"
        raise RolloutError(msg)
    *figures, own = (summarize(statistics) for statistics in merged)
    health = {
        "tokens": tally.tokens,
        "valid_tokens": total["valid_fraction"],
        "masked_tokens": tally.tokens - total["valid_fraction"],
        "active_tokens": total["active_fraction"],
        "diverging_tokens": total["diverging_fraction"],
        "masked_nan": tally.masked_nan,
        "positive_log_prob": {key: n for key, n in tally.by_argument("positive").items() if key != "advantages"},
        "infinite": tally.by_argument("+inf", "-inf"),
        **{key: figures[0][key] for key in DATA_FIGURES},
        "active_fraction": own["active_fraction"],
        "diverging_fraction": own["diverging_fraction"],
        "rare_fraction": {f"{p:g}": own[f"rare_{p:g}"] for p in RARE},
    }
    audited = [
        Audited(row, {key: value for key, value in found.items() if key not in DATA_FIGURES})
        for row, found in zip(table, figures, strict=True)
    ]
    return Snapshot(health, audited, tally.warnings(arrays), counts, drawn)


def _own_statistics(chunk: Chunk) -> Diagnostics:
    """What `diagnostics` has no name for, in its form: shares of valid, active, diverging and rare tokens."""
    tokens, active = active_tokens(chunk)

    def share(condition: Values, of: Values) -> Mean:
        return Mean(*(np.asarray(np.count_nonzero(where), np.float64) for where in (condition & of, of)))

    return {
        "valid_fraction": share(chunk.mask, np.ones_like(chunk.mask)),
        "active_fraction": share(active, chunk.mask),
        "diverging_fraction": share(_diverging(tokens), active),
        **{f"rare_{p:g}": share(chunk.behavior_log_prob <= math.log(p), chunk.mask) for p in RARE},
    }


def active_tokens(chunk: Chunk) -> tuple[Tokens, Values]:
    """A chunk's tokens, and which of them have a finite A ≠ 0 and finite log-probs, as in `diagnostics`."""
    tokens = Tokens.checked(*chunk[:3], mask=chunk.mask)
    a = tokens.advantages
    finite = np.isfinite(a) & np.isfinite(tokens.behavior_log_prob) & (tokens.log_prob < np.inf)
    return tokens, chunk.mask & finite & (a != 0.0)


def _diverging(tokens: Tokens) -> Values:
    return np.asarray(tokens.along_advantage(tokens.log_ratio) > 0.0)


def _add_to_curves(chunk: Chunk, counts: Values, curves: Sequence[Curve]) -> None:
    tokens, active = active_tokens(chunk)
    # log-probs above 0 can put the shift outside [−1, 1], or make it NaN
    scaled = np.nan_to_num((tokens.shift[active] + 1.0) * (0.5 * BINS), nan=0.5 * BINS)
    bins = np.clip(scaled, 0, BINS - 1).astype(np.intp)
    places = bins + BINS * (tokens.advantages[active] < 0.0)
    counts += np.bincount(places, minlength=2 * BINS).reshape(2, BINS)
    for curve in curves:
        weight = curve.row.objective.weight(tokens)[active]
        curve.total += np.bincount(places, weights=weight, minlength=2 * BINS).reshape(2, BINS)


# --- thresholds at a quantile ----------------------------------------------------------------------------------------


def _rows_at(rollouts: Rollouts, name: str, quantiles: Sequence[float], advance: Advance) -> tuple[list[Row], list[str]]:
    """Rows at the thresholds that drop each share of the diverging tokens, and why some are missing."""
    found, notes = [], []
    measured = _thresholds(rollouts, name, quantiles, advance) if quantiles else {}
    for q in quantiles:
        usable = {}
        for measure in _MEASURES:
            value = measured[measure, q]
            usable[measure] = [value] if 0.0 < value < math.inf else []
            if not usable[measure]:
                notes.append(f"no finite threshold on {measure} above 0 drops a share {q:g} of the diverging tokens")
        found += rows(
            delta=usable["abs(π − μ)"], delta_kl=usable["Binary KL"], eps=usable["abs(r − 1)"], max_ratio=(), quantile=q
        )
    return found, notes


_MEASURES: dict[str, Callable[[Tokens], Values]] = {
    "abs(π − μ)": lambda tokens: np.abs(tokens.shift),
    "abs(r − 1)": lambda tokens: np.abs(tokens.ratio_minus_one),
    "Binary KL": lambda tokens: np.abs(binary_kl_of(tokens)),
}
_DIGIT = 16


def _thresholds(rollouts: Rollouts, name: str, quantiles: Sequence[float], advance: Advance) -> dict[tuple[str, float], float]:
    """The value that exactly round(q n) of n diverging tokens exceed, ties apart, for each measure and share q.

    A radix selection: floats ≥ 0 order like their bits, so each of four passes over the file counts the next 16 bits
    of those that share the bits found so far. float64, because that is what the objectives compare; 65,536 counters
    per measure and share, whatever the length of the file.
    """
    keys = [(measure, q) for measure in _MEASURES for q in quantiles]
    prefix, rank = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0)
    for shift in (48, 32, 16, 0):
        counts = {key: np.zeros(1 << _DIGIT, np.int64) for key in keys}
        for chunk in rollouts.chunks(name):
            for measure, bits in _bits(chunk):
                for q in quantiles:
                    counts[measure, q] += _next_digit(bits, prefix[measure, q], shift)
            advance(len(chunk.mask))
        for key in keys:
            below = np.cumsum(counts[key])
            if shift == 48:
                rank[key] = _rank(int(below[-1]), key[1])
            if rank[key] < 0:
                continue
            digit = int(np.searchsorted(below, rank[key], side="right"))
            rank[key] -= int(below[digit - 1]) if digit else 0
            prefix[key] = prefix[key] << _DIGIT | digit
    values = {key: float(np.uint64(prefix[key]).view(np.float64)) for key in keys}
    return {key: value if rank[key] >= 0 else math.nan for key, value in values.items()}


def _rank(n: int, q: float) -> int:
    """Position, in ascending order, of the value that round(q n) of n values exceed; −1 if there is none."""
    return n - 1 - min(round(q * n), n - 1) if n else -1


def _bits(chunk: Chunk) -> Iterator[tuple[str, Values]]:
    """The bit patterns of each measure of a chunk's diverging tokens."""
    tokens, active = active_tokens(chunk)
    where = active & _diverging(tokens)
    for measure, of in _MEASURES.items():
        yield measure, of(tokens)[where].view(np.uint64)


def _next_digit(bits: Values, prefix: int, shift: int) -> Values:
    """How many patterns that start with `prefix` have each value of the 16 bits at `shift`."""
    if shift + _DIGIT < 64:
        bits = bits[bits >> np.uint64(shift + _DIGIT) == np.uint64(prefix)]
    digits = (bits >> np.uint64(shift)) & np.uint64((1 << _DIGIT) - 1)
    return np.bincount(digits.astype(np.intp), minlength=1 << _DIGIT)


def _strict(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return _strict(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in values.items()}
