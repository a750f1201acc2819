"""Result files: one small file of JSON lines a run, written whole or not at all, the same bytes whenever it is run."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.cells import Cell, Training

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parents[1]
RESULTS, FIGURES = HERE / "results", HERE / "figures"
STARTS = HERE.parents[1] / "build" / "study"
"""Pre-fitted parameters: made again wherever they are missing."""
DIGITS = 4
BLOCK = 4
"""Rollout batches that one number of a curve stands for: their mean, of MAXIMA their largest. `reward` has every batch."""
MAXIMA = {"ratio_max", "tv_max", "norm"}


@dataclass(frozen=True)
class Result:
    """A run: its cell, the steps and reward of its pre-fit, curves by name and the histogram of weights (see `train.run`)."""

    cell: Cell
    prefit: dict[str, float]
    curves: dict[str, list[float]]
    weights: list[int]


def compact(curves: dict[str, list[float]]) -> dict[str, list[float]]:
    """Curves of every batch as they are kept."""
    return {
        name: values if name == "reward" else [_block(name, values[i : i + BLOCK]) for i in range(0, len(values), BLOCK)]
        for name, values in curves.items()
    }


def _block(name: str, values: list[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return math.nan
    return max(known) if name in MAXIMA else sum(known) / len(known)


def path_of(folder: Path, cell: Cell) -> Path:
    """Where the result of a cell is or will be."""
    return folder / f"{cell.name}.jsonl"


def write(folder: Path, result: Result) -> None:
    """Write the file of a run, complete before it has its name."""
    lines: list[dict[str, Any]] = [{"cell": asdict(result.cell), "prefit": result.prefit}]
    # JSON has no NaN: null
    lines += [{"curve": name, "values": [_number(v) for v in values]} for name, values in result.curves.items()]
    lines += [{"weights": result.weights}]
    path = path_of(folder, result.cell)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    unfinished.replace(path)


def read(path: Path) -> Result:
    """The run of a file."""
    head, *lines = map(json.loads, path.read_text().splitlines())
    cell = Cell(**{**head["cell"], "training": Training(**head["cell"]["training"])})
    curves = {line["curve"]: [math.nan if v is None else v for v in line["values"]] for line in lines if "curve" in line}
    (weights,) = (line["weights"] for line in lines if "weights" in line)
    return Result(cell, head["prefit"], curves, weights)


def read_all(folder: Path) -> Iterator[Result]:
    """Every finished run of a folder, in order of file name."""
    return map(read, sorted(folder.glob("*.*.jsonl")))


def _number(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def in_words(differences: dict[str, float]) -> str:
    """Largest differences, as the comparisons of implementations print them."""
    return "largest differences: " + ", ".join(f"{name} {value:.2g}" for name, value in differences.items())
