"""Runs cells that have no result file yet, two at a time, with a bar and the time left."""

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
from study.results import RESULTS, STARTS, Result, compact, path_of, read, write
from study.task import Task
from study.train import run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from study.cells import Cell

PROCESSES = 2
# seconds a rollout batch on one of two busy cores, and of a pre-fit: what the estimate starts from
COST = {"dense": 0.125, "moe": 0.17}
PREFIT_COST = {"dense": 15.0, "moe": 20.0}


def start_path(architecture: str, seed: int, folder: Path) -> Path:
    """Where the start of a seed is kept."""
    task = Task()
    return folder / f"{architecture}.{seed}.{task.exponent:g}.{task.wrong:g}.pt"


def start_of(architecture: str, seed: int, folder: Path = STARTS) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Pre-fitted parameters and what the pre-fit says of itself, from the folder or made now."""
    path = start_path(architecture, seed, folder)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        torch.save(prefit(architecture, seed, Task()), unfinished)
        unfinished.replace(path)
    parameters, about = torch.load(path)
    return parameters, about


def run_cell(folder: Path, cell: Cell, starts: Path = STARTS) -> None:
    """Run a cell and write its file."""
    parameters, about = start_of(SETTINGS[cell.setting].architecture, cell.seed, starts)
    found = run(cell, parameters, Task())
    write(folder, Result(cell, about, compact(found["curves"]), found["weights"]))
    # apart from the results, which are the same whenever they are computed
    with (folder / "seconds.txt").open("a") as file:
        file.write(f"{found['seconds']:.1f} {cell.name}\n")


def _alone() -> None:
    # one thread a process: reductions then have one order, and two processes fill two cores
    torch.set_num_threads(1)
    # an interrupt is the parent's to handle, and no run outlives it, however it ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _prefit(starts: Path, start: tuple[str, int]) -> None:
    start_of(*start, starts)


def missing(folder: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Cells without a result, each once."""
    return [cell for cell in dict.fromkeys(cells) if not path_of(folder, cell).exists()]


def cost(cell: Cell) -> float:
    """Estimated seconds on one core."""
    return COST[SETTINGS[cell.setting].architecture] * cell.training.rollouts


def run_missing(
    folder: Path, cells: Sequence[Cell], processes: int = PROCESSES, label: str = "runs", starts: Path = STARTS
) -> None:
    """Run what has no result yet; what has one is not touched, so an interruption costs the unfinished runs only."""
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
            # neither what is queued nor what is running is waited for
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def tuned_thresholds(folder: Path, training: Training = DEFAULT) -> dict[str, float]:
    """The threshold of each method with the best mean final reward over the tuning seeds; of equals the largest."""
    rewards: dict[str, dict[float, list[float]]] = {}
    for cell in tuning_cells(training):
        if METHODS[cell.method].grid:
            rewards.setdefault(cell.method, {}).setdefault(cell.threshold, []).append(
                final_reward(read(path_of(folder, cell)))
            )
    return {name: max(by, key=lambda t: (sum(by[t]) / len(by[t]), t)) for name, by in rewards.items()}


def full(folder: Path = RESULTS / "full", seeds: Sequence[int] = SEEDS, processes: int = PROCESSES) -> None:
    """Tuning, then the comparison with what it chose."""
    run_missing(folder, tuning_cells(), processes, "tuning")
    run_missing(folder, comparison_cells(tuned_thresholds(folder), seeds), processes, "comparison")


def status(folder: Path = RESULTS / "full", seeds: Sequence[int] = SEEDS, processes: int = PROCESSES) -> str:
    """How many runs are done and how long the others will take, by the measured cost of a rollout batch."""
    try:
        tuned = tuned_thresholds(folder)
    except FileNotFoundError:
        # not known yet: as if no tuned threshold were a published one
        tuned = {name: math.nan for name, method in METHODS.items() if method.grid}
    lines = []
    for name, cells in (("tuning", tuning_cells()), ("comparison", comparison_cells(tuned, seeds))):
        left = missing(folder, cells)
        hours = sum(map(cost, left)) / processes / 3600.0
        lines.append(f"{name}: {len(cells) - len(left)} of {len(cells)} runs, about {hours:.1f} h left on {processes} cores")
    return "\n".join(lines)
