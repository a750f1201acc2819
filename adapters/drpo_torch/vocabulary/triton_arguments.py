"""What Triton kernels over rows of logits are told of their rows: tuples that a kernel takes as one argument.

What there is not, such as a soft-cap, is None, which is known when the kernel is compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import triton

if TYPE_CHECKING:
    from drpo_torch.vocabulary.softmax import Places, Tempering

__all__ = ["Rows", "Words", "block"]


class Rows(NamedTuple):
    """Rows of a matrix of logits z, and the step from them to x, but for the support.

    They are neighbours from the `first` on, or these `places`. In float64 a number comes as its bits, because a float may
    arrive as float32.
    """

    z: torch.Tensor
    row_stride: int
    column_stride: int
    first: int
    places: torch.Tensor | None
    temperature: torch.Tensor | None
    temperature_of_all: float
    cap: float | None

    @classmethod
    def of(cls, z: torch.Tensor, places: Places, tempering: Tempering, dtype: torch.dtype) -> Rows:
        """Those at some places; `dtype` is that of the arithmetic."""
        temperature, cap = tempering.temperature, tempering.softcap
        per_row = temperature.to(dtype).contiguous() if isinstance(temperature, torch.Tensor) else None
        of_all = 1.0 if isinstance(temperature, torch.Tensor) else float(temperature)
        capped = None if cap is None else _exact(cap, dtype)
        key = places.key
        first, index = (key.start, None) if isinstance(key, slice) else (0, key)
        return cls(z, z.stride(0), z.stride(1), first, index, per_row, _exact(of_all, dtype), capped)


class Words(NamedTuple):
    """The supports of rows as bits: see `drpo_torch.vocabulary.support.SupportRows`."""

    words: torch.Tensor
    stride: int
    rows: torch.Tensor
    whole: torch.Tensor
    start: int

    @classmethod
    def of(cls, tempering: Tempering) -> Words | None:
        """Those of the rows of a step, if they have any."""
        support = tempering.support
        if support is None:
            return None
        assert support.words is not None
        words = support.words if support.words.stride(1) == 1 else support.words.contiguous()
        return cls(words, words.stride(0), support.rows, support.whole, support.columns.start)


def block(width: int, most: int) -> int:
    """Columns of a step: a power of two."""
    return min(most, int(triton.next_power_of_2(max(16, width))))


def _exact(value: float, dtype: torch.dtype) -> float:
    return int(np.float64(value).view(np.int64)) if dtype == torch.float64 else value
