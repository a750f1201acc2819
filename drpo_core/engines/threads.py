"""Shares of a loop that releases the GIL, on a pool of threads of this library."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_threads", "shares"]


def in_threads(run: Callable[[int, int], None], count: int, threads: int) -> None:
    """Cover range(count) by `run(first, last)`, in as many equal shares as threads, the first of them in this thread."""
    own, *rest = shares(count, threads)
    others = [_pool(threads - 1).submit(run, *share) for share in rest]
    run(*own)
    for other in others:
        other.result()


def shares(count: int, threads: int) -> list[tuple[int, int]]:
    """Equal parts of range(count), as (first, last)."""
    return list(pairwise(count * i // threads for i in range(threads + 1)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="drpo_core")


if hasattr(os, "register_at_fork"):
    # the threads of a pool don't survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)
