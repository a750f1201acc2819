"""Python functions that release the GIL, run by the threads that torch's own operations run on.

After an operation those threads wait busily for the next one, for tens of milliseconds: threads beside them would share
their cores, which takes twice as long. So torch's OpenMP library is asked to run the work, where it is GNU's.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from drpo_core.engines import threads as pool

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_threads"]

_Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def in_threads(run: Callable[[int, int], None], count: int, threads: int) -> None:
    """`drpo_core.engines.threads.in_threads`, on torch's threads where that is possible."""
    library = None if threads == 1 else _openmp()
    if library is None:
        pool.in_threads(run, count, threads)
        return
    shares = iter(pool.shares(count, threads))
    errors: list[BaseException] = []

    def work(_: object) -> None:
        # from one iterator, until none is left: fewer threads may come than were asked for
        try:
            for first, last in shares:
                run(first, last)
        except BaseException as error:  # noqa: BLE001 -- C has no exceptions; raised below
            errors.append(error)

    library.GOMP_parallel(_Task(work), None, threads, 0)
    if errors:
        raise errors[0]


@cache
def _openmp() -> Any:  # noqa: ANN401
    """GNU's OpenMP library as torch has loaded it, or None."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        try:
            return ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
        except OSError:
            continue
    return None
