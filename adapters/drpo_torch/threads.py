"""Python functions that release the GIL, run by the threads that torch's own operations run on.

After an operation those threads wait busily for the next one, for tens of milliseconds: threads beside them would share
their cores, which takes twice as long. So torch's OpenMP library is asked to run the work, where it is GNU's.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_threads"]

_Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def in_threads(run: Callable[[int, int], None], count: int, threads: int) -> None:
    """Cover range(count) by `run(first, last)`, in as many equal shares as threads, one of them in this thread."""
    bounds = [count * i // threads for i in range(threads + 1)]
    shares = iter(list(pairwise(bounds)))
    errors: list[BaseException] = []

    def work(_: object = None) -> None:
        # from one iterator, until none is left: fewer threads may come than were asked for
        try:
            for first, last in shares:
                run(first, last)
        except BaseException as error:  # noqa: BLE001 -- C has no exceptions; raised below
            errors.append(error)

    library = None if threads == 1 else _openmp()
    if threads == 1:
        work()
    elif library is not None:
        library.GOMP_parallel(_Task(work), None, threads, 0)
    else:
        others = [_pool(threads - 1).submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()
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


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="drpo_torch")


# the threads of a pool don't survive a fork
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
