"""Floats as integers in their order, in which NaN is the largest of all: so a maximum passes a NaN on, on any engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["flipped", "integer", "lowest"]


def integer(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The integers of a float's width, in which maxima are taken."""
    return np.dtype(f"i{dtype.itemsize}")


def lowest(dtype: np.dtype[Any]) -> int:
    """−inf among those integers."""
    return int(flipped(np.asarray(-np.inf, dtype).view(integer(dtype))))


def flipped(bits: NDArray[Any]) -> NDArray[Any]:
    """From the bits of floats to integers in the order of the floats, or back."""
    return np.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)
