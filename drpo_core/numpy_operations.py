"""NumPy's operations for `drpo_core.replay`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import array_api_compat.numpy
import numpy as np

from drpo_core.replay import ARITHMETIC, COMPARISONS, Library

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

__all__ = ["LIBRARY", "PIECE"]

PIECE = 1 << 16
"""Tokens at a time: their intermediate results, some eight arrays, stay in a core's cache, and calling NumPy is worth it."""


def _compare(comparison: Callable[..., Any]) -> Callable[..., None]:
    """Into bool first: NumPy has no loop from floats to integers."""

    def compare(x: NDArray[Any], y: NDArray[Any], *, out: NDArray[Any]) -> None:
        out[...] = comparison(x, y)

    return compare


def _convert(x: NDArray[Any], *, out: NDArray[Any]) -> None:
    out[...] = x


def _at_most(x: NDArray[Any], bound: float, *, out: NDArray[Any]) -> None:
    # `minimum` of an array and one number takes five times as long, as does a clip on one side
    x.clip(-np.inf, bound, out=out)


def _at_least(x: NDArray[Any], bound: float, *, out: NDArray[Any]) -> None:
    x.clip(bound, np.inf, out=out)


def _sign(a: NDArray[Any], *, out: NDArray[Any]) -> None:
    """A third of the time of `np.sign`. The least subnormal number exceeds 1 by these factors."""
    factor = 2.0**80 if a.dtype == np.float32 else 2.0**600
    np.multiply(a, factor, out=out)
    np.multiply(out, factor, out=out)
    out.clip(-1.0, 1.0, out=out)


def _flip_sign(x: NDArray[Any], condition: NDArray[Any], *, out: NDArray[Any]) -> None:
    np.bitwise_xor(x, condition << (8 * x.itemsize - 1), out=out)


def _sum(x: NDArray[Any]) -> Any:
    # one long axis: for two, NumPy starts a sum for every row
    return x.reshape(-1).sum()


def _total(figures: Sequence[Any], width: int, sums: int, dtype: Any) -> Sequence[Any]:
    rows = np.array(figures, np.float64).reshape(-1, width)
    return [*np.concatenate((rows[:, :sums].sum(0), rows[:, sums:].max(0))).astype(dtype)]


LIBRARY = Library(
    xp=array_api_compat.numpy,
    arithmetic={"sign": _sign, **{name: getattr(np, name) for name in ARITHMETIC}},
    comparisons={name: _compare(getattr(np, name)) for name in COMPARISONS},
    connectives={"logical_and": np.bitwise_and, "logical_or": np.bitwise_or, "differ": np.bitwise_xor},
    clamps={"at_most": _at_most, "at_least": _at_least},
    convert=_convert,
    flip_sign=_flip_sign,
    reductions={"sum": _sum, "max": np.max},
    total=_total,
)
