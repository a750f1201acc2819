"""Interleaved timing and peak memory.

pyperf, asv and pytest-benchmark finish one function before they start the next, so a machine whose speed drifts (shared
cores, turbo, heat) changes their ratios. Here a round calls every function once, in a new order, and a ratio is taken
within its round; what is reported is the median of the ratios and its quartiles.
"""

from __future__ import annotations

import os
import platform
import random
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGES = ("torch", "jax", "numpy", "numba", "verl", "trl", "liger-kernel")


class Case(NamedTuple):
    """Functions that do the same work, by label; the first is the baseline. `units` of work are done by a call."""

    name: str
    about: str
    units: int
    functions: dict[str, Callable[[], object]]
    seconds: float = 10.0
    """What its rounds may take altogether."""


def elapsed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleave(
    case: Case,
    *,
    share: float = 1.0,
    least: int = 3,
    most: int = 41,
    clock: Callable[[Callable[[], object]], float] = elapsed,
) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one call to warm up (and compile); at least `least` rounds."""
    for function in case.functions.values():
        function()
    seconds: dict[str, list[float]] = {label: [] for label in case.functions}
    order = list(case.functions)
    shuffle = random.Random(0).shuffle  # noqa: S311 -- an order, not a secret
    started = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - started > share * case.seconds:
            break
        shuffle(order)
        for label in order:
            seconds[label].append(clock(case.functions[label]))
    return seconds


@contextmanager
def others() -> Iterator[list[float]]:
    """How many cores other processes kept busy meanwhile, appended on leaving: ratios are poor where it isn't near 0."""
    found: list[float] = []
    started, busy, own = time.perf_counter(), _busy(), time.process_time()
    yield found
    passed = time.perf_counter() - started
    found.append(max(0.0, (_busy() - busy - (time.process_time() - own)) / passed))


def _busy() -> float:
    """Seconds that the machine's cores have worked, or been taken by a hypervisor, since it started."""
    ticks = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    return float(sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def extra_memory(function: Callable[[], object]) -> int:
    """Bytes by which the resident set of this process peaks above what it is now, during the call. Linux only."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "malloc": os.environ.get("GLIBC_TUNABLES", "default"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in info if line.startswith("flags")), [])
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{model} ({', '.join(wide)})"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
