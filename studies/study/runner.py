"""Run the cells that have no result yet, two at a time, with a progress bar and the time left."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from study.cells import DEFAULT, METHODS, SEEDS, SETTINGS, Training, comparison_cells, tuning_cells
from study.measures import final_reward
from study.prefit import prefit
from study.results import STARTS, Result, compact, log, names, read_all, write
from study.task import Task
from study.train import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from study.cells import Cell

PROCESSES = 2
# seconds for a rollout batch and for a pre-fit, on one of two busy cores: the first estimate
COST = {"dense": 0.125, "moe": 0.17}
PREFIT_COST = {"dense": 15.0, "moe": 20.0}


def start_path(architecture: str, seed: int, folder: Path) -> Path:
    """The file with the pre-fitted parameters of a seed."""
    task = Task()
    return folder / f"{architecture}.{seed}.{task.exponent:g}.{task.wrong:g}.pt"


def start_of(architecture: str, seed: int, folder: Path = STARTS) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Pre-fitted parameters, and the pre-fit's steps and reward: from the folder, or made now."""
    path = start_path(architecture, seed, folder)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        torch.save(prefit(architecture, seed, Task()), unfinished)
        unfinished.replace(path)
    parameters, about = torch.load(path)
    return parameters, about


def run_cell(folder: Path, cell: Cell, starts: Path = STARTS) -> None:
    """Run a cell, write its file and log its time."""
    parameters, about = start_of(SETTINGS[cell.setting].architecture, cell.seed, starts)
    found = run(cell, parameters, Task())
    write(folder, Result(cell, about, compact(found["curves"]), found["weights"]))
    log(folder, cell, found["seconds"])


def _alone() -> None:
    # one thread in each process: reductions then have one order, and two processes fill two cores
    torch.set_num_threads(1)
    # the parent handles an interrupt; however it ends, no run outlives it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _prefit(starts: Path, start: tuple[str, int]) -> None:
    start_of(*start, starts)


def missing(source: Path, cells: Iterable[Cell]) -> list[Cell]:
    """Cells without a result in a folder or a Parquet file, each once."""
    there = names(source)
    return [cell for cell in dict.fromkeys(cells) if cell.name not in there]


def cost(cell: Cell) -> float:
    """Estimated seconds on one core."""
    return COST[SETTINGS[cell.setting].architecture] * cell.training.rollouts


def run_missing(
    folder: Path, cells: Sequence[Cell], processes: int = PROCESSES, label: str = "runs", starts: Path = STARTS
) -> None:
    """Run the cells without a result. Those with one are not touched: an interruption costs only the unfinished runs."""
    todo = missing(folder, cells)
    needed = dict.fromkeys((SETTINGS[cell.setting].architecture, cell.seed) for cell in todo)
    prefits = [(start, PREFIT_COST[start[0]]) for start in needed if not start_path(*start, starts).exists()]
    _in_processes("pre-fits", partial(_prefit, starts), prefits, processes)
    _in_processes(label, partial(run_cell, folder, starts=starts), [(cell, cost(cell)) for cell in todo], processes)


def _in_processes(label: str, work: Callable[[Any], object], jobs: Sequence[tuple[Any, float]], processes: int) -> None:
    if not jobs:
        return
    shown = f"{label} {{task.fields[done]}}/{len(jobs)}"
    columns = (TextColumn(shown), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    bar = Progress(*columns, speed_estimate_period=1800.0)
    context = multiprocessing.get_context("spawn")
    with bar, ProcessPoolExecutor(processes, context, initializer=_alone) as pool:
        work_done = bar.add_task(label, total=sum(price for _, price in jobs), done=0)
        running = {pool.submit(work, job): price for job, price in jobs}
        try:
            for number, finished in enumerate(as_completed(running), 1):
                finished.result()
                bar.update(work_done, advance=running[finished], done=number)
        except BaseException:
            # wait neither for queued nor for running jobs
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def tuned_thresholds(results: Iterable[Result], training: Training = DEFAULT) -> dict[str, float]:
    """Each method's threshold with the best mean final reward over the tuning seeds; of equals the largest.

    Empty while a run of the tuning is missing.
    """
    found = {result.cell: result for result in results}
    rewards: dict[str, dict[float, list[float]]] = {}
    for cell in tuning_cells(training):
        if METHODS[cell.method].grid:
            if cell not in found:
                return {}
            rewards.setdefault(cell.method, {}).setdefault(cell.threshold, []).append(final_reward(found[cell]))
    return {name: max(by, key=lambda t: (sum(by[t]) / len(by[t]), t)) for name, by in rewards.items()}


def full(folder: Path, seeds: Sequence[int] = SEEDS, processes: int = PROCESSES) -> None:
    """Run the tuning, then the comparison with the thresholds that it chose."""
    run_missing(folder, tuning_cells(), processes, "tuning")
    run_missing(folder, comparison_cells(tuned_thresholds(read_all(folder)), seeds), processes, "comparison")


def status(source: Path, seeds: Sequence[int] = SEEDS, processes: int = PROCESSES) -> str:
    """How many runs are done, and how long the others will take by the measured cost of a rollout batch."""
    # while the tuning is incomplete: as if no tuned threshold were a published one
    unknown = {name: math.nan for name, method in METHODS.items() if method.grid}
    tuned = tuned_thresholds(read_all(source)) or unknown
    lines = []
    for name, cells in (("tuning", tuning_cells()), ("comparison", comparison_cells(tuned, seeds))):
        left = missing(source, cells)
        hours = sum(map(cost, left)) / processes / 3600.0
        lines.append(f"{name}: {len(cells) - len(left)} of {len(cells)} runs, about {hours:.1f} h left on {processes} cores")
    return "\n".join(lines)
