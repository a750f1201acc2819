"""Results of runs, in one of two forms with one reader.

While runs are made, each has a file of JSON lines in a folder, written whole or not at all. `pack` puts the runs of a
folder into one Parquet file, a row for each run, and `unpack` writes the same folder again, byte for byte.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from study.cells import Cell, Training

if TYPE_CHECKING:
    from collections.abc import Iterator

STUDIES = Path(__file__).parents[1]
FULL, QUICK = STUDIES / "results" / "full.parquet", STUDIES / "results" / "quick.parquet"
"""The results that the repository keeps: of the comparison, and of the quick run."""
PAGES = STUDIES.parent / "docs" / "study"
"""The folder of the site's pages, with the tables and figures drawn from these results."""
STARTS = STUDIES.parent / "build" / "study"
"""Pre-fitted parameters; missing ones are made again."""
DIGITS = 4
BLOCK = 4
"""Batches that one number of a curve summarises: their mean, or their maximum for MAXIMA. `reward` keeps every batch."""
MAXIMA = {"ratio_max", "tv_max", "norm"}
LOG = "seconds.txt"
"""A line for each computed run: its seconds and its name. Apart from the run files, which never depend on the time."""

Record = dict[str, Any]
"""A run as JSON values: `run` (its name), `cell`, `prefit`, `curves` and `weights`; packed also `computed`."""


class UnusableError(Exception):
    """A folder or file cannot be used as it was meant; the message says why."""


@dataclass(frozen=True)
class Result:
    """A run: its cell, the steps and reward of its pre-fit, its curves by name and its histogram of weights (`train.run`)."""

    cell: Cell
    prefit: dict[str, float]
    curves: dict[str, list[float]]
    weights: list[int]


def compact(curves: dict[str, list[float]]) -> dict[str, list[float]]:
    """The curves to keep, from curves with a number for each batch."""
    return {
        name: values if name == "reward" else [_block(name, values[i : i + BLOCK]) for i in range(0, len(values), BLOCK)]
        for name, values in curves.items()
    }


def _block(name: str, values: list[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return math.nan
    return max(known) if name in MAXIMA else sum(known) / len(known)


def check_folder(source: Path) -> None:
    """Refuse a Parquet file where runs are to be written."""
    if source.is_file():
        msg = f"results: expected a folder for run files, got the file {source}; `unpack` makes a folder of it"
        raise UnusableError(msg)


def check_runs(source: Path) -> None:
    """Refuse a source without runs."""
    if not names(source):
        msg = f"results: expected a Parquet file or a folder of run files, found no run in {source}"
        raise UnusableError(msg)


def names(source: Path) -> set[str]:
    """Names of the finished runs in a folder or a Parquet file."""
    if source.is_file():
        return set(pq.read_table(source, columns=["run"])["run"].to_pylist())
    return {path.stem for path in _run_files(source)}


def read_all(source: Path) -> list[Result]:
    """Every finished run of a folder or a Parquet file, in order of file name."""
    return [_result(record) for record in _records(source)]


def path_of(folder: Path, cell: Cell) -> Path:
    """The file for the result of a cell."""
    return folder / f"{cell.name}.jsonl"


def write(folder: Path, result: Result) -> None:
    """Write the file of a run; it gets its name when it is complete."""
    # JSON has no NaN: null
    curves = {name: [_number(v) for v in values] for name, values in result.curves.items()}
    cell = asdict(result.cell)
    _write_run(
        folder,
        {"run": result.cell.name, "cell": cell, "prefit": result.prefit, "curves": curves, "weights": result.weights},
    )


def log(folder: Path, cell: Cell, seconds: float) -> None:
    """Add the time that a run took to the folder's log."""
    with (folder / LOG).open("a") as file:
        file.write(_log_line(cell.name, seconds))


def pack(folder: Path, file: Path) -> int:
    """Put the runs of a folder, with what its log says of them, into a Parquet file; returns how many.

    A row has `run`, `cell`, `prefit`, `curves` (null where a number is unknown), `weights` and `computed`: the seconds
    that the run took and its place in the log, for each time that it was computed.
    """
    check_folder(folder)
    check_runs(folder)
    computed: dict[str, list[dict[str, float]]] = {}
    lines = (folder / LOG).read_text().splitlines() if (folder / LOG).exists() else []
    for place, line in enumerate(lines):
        seconds, name = line.split(" ", 1)
        computed.setdefault(name, []).append({"place": place, "seconds": float(seconds)})
    rows = [{**record, "computed": computed.get(record["run"], [])} for record in _records(folder)]
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.part")
    pq.write_table(pa.Table.from_pylist(rows), unfinished, compression="zstd", compression_level=19)
    unfinished.replace(file)
    return len(rows)


def unpack(file: Path, folder: Path) -> int:
    """Write the run files and the log that were packed into a folder without runs; returns how many runs."""
    check_runs(file)
    if names(folder):
        msg = f"folder: expected one without runs, found {len(names(folder))} in {folder}"
        raise UnusableError(msg)
    rows = list(_records(file))
    for row in rows:
        _write_run(folder, row)
    computed = sorted((c["place"], _log_line(row["run"], c["seconds"])) for row in rows for c in row["computed"])
    if computed:
        (folder / LOG).write_text("".join(line for _, line in computed))
    return len(rows)


def _run_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.*.jsonl"))


def _records(source: Path) -> Iterator[Record]:
    if not source.is_file():
        yield from map(_read_run, _run_files(source))
        return
    for row in pq.read_table(source).to_pylist():
        # a name that only other runs have is null here
        yield row | {name: {k: v for k, v in row[name].items() if v is not None} for name in ("prefit", "curves")}


def _read_run(path: Path) -> Record:
    head, *lines = map(json.loads, path.read_text().splitlines())
    curves = {line["curve"]: line["values"] for line in lines if "curve" in line}
    (weights,) = (line["weights"] for line in lines if "weights" in line)
    return {"run": path.stem, **head, "curves": curves, "weights": weights}


def _write_run(folder: Path, record: Record) -> None:
    lines = [
        {"cell": record["cell"], "prefit": record["prefit"]},
        *({"curve": name, "values": values} for name, values in record["curves"].items()),
        {"weights": record["weights"]},
    ]
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{record['run']}.{os.getpid()}.part"
    unfinished.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    unfinished.replace(folder / f"{record['run']}.jsonl")


def _log_line(name: str, seconds: float) -> str:
    return f"{seconds:.1f} {name}\n"


def _result(record: Record) -> Result:
    cell = Cell(**{**record["cell"], "training": Training(**record["cell"]["training"])})
    curves = {name: [math.nan if v is None else v for v in values] for name, values in record["curves"].items()}
    return Result(cell, record["prefit"], curves, record["weights"])


def _number(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def in_words(differences: dict[str, float]) -> str:
    """Largest differences, as the comparisons of implementations print them."""
    return "largest differences: " + ", ".join(f"{name} {value:.2g}" for name, value in differences.items())
