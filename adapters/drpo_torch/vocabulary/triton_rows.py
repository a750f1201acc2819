"""`drpo_torch.vocabulary.softmax.RowKernels` as Triton kernels over the memory of a GPU: one program a row.

Statistics are taken in one pass over a row, gradients in another, which may overwrite it. Rows are read where they lie, in
their own dtype, with any strides; their arithmetic is in float32, or float64 for float64. A row without a gradient is not
read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
from torch.autograd.graph import increment_version

from drpo_torch.engines.triton_loop import REGISTERS
from drpo_torch.vocabulary import triton_kernels
from drpo_torch.vocabulary.softmax import ArrayRows, Statistics, working_dtype
from drpo_torch.vocabulary.triton_divergences import divergence_gradients, divergence_sums
from drpo_torch.vocabulary.triton_most_probable import finds, most_probable

if TYPE_CHECKING:
    from drpo_torch.vocabulary.softmax import Places, Pull, Tempering

__all__ = ["TritonRows", "divergence_gradients", "divergence_sums", "finds", "most_probable"]

BLOCK = 2048
"""Logits of a step."""

WARPS = 8


class TritonRows:
    """Kernels over rows of logits on a GPU."""

    keeps = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = working_dtype(dtype)
        # of float32 they take few enough
        self._registers = REGISTERS if self.dtype == torch.float64 else {}

    def statistics(
        self,
        z: torch.Tensor,
        places: Places,
        tempering: Tempering,
        *,
        entropy: bool = False,
        keep: torch.Tensor | None = None,  # noqa: ARG002 -- a softmax taken again costs no more than one that is read
    ) -> Statistics:
        """See `RowKernels`."""
        found = torch.empty((4, len(places)), dtype=self.dtype, device=z.device)
        if not len(places):
            return self._made(found, entropy=entropy)
        with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
            triton_kernels.statistics[(len(places),)](
                *_rows(z, places),
                *self._step(tempering),
                found,
                len(places),
                entropy,
                BLOCK=_block(z),
                num_warps=WARPS,
                **self._registers,
            )
        return self._made(found, entropy=entropy)

    @staticmethod
    def _made(found: torch.Tensor, *, entropy: bool) -> Statistics:
        maximum, log_sum, total, entropies = found.unbind()
        return Statistics(maximum, log_sum, entropies if entropy else None, total)

    def gradients(
        self,
        z: torch.Tensor,
        places: Places,
        tempering: Tempering,
        pull: Pull,
        *,
        statistics: Statistics,
        out: torch.Tensor,
        kept: bool = False,  # noqa: ARG002
    ) -> None:
        """See `RowKernels`; where `pull` is 0 so is the result, whatever the row holds."""
        if pull.everywhere is not None:
            others = ArrayRows(z.shape[-1], z.dtype, z.device)
            others.gradients(z, places, tempering, pull, statistics=statistics, out=out)
            return
        if not len(places):
            return
        numbers = (statistics.maximum, statistics.log_sum, pull.scale, pull.scale if pull.slope is None else pull.slope)
        columns = pull.columns.shape[1]
        with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
            triton_kernels.gradients[(len(places),)](
                *_rows(z, places),
                out,
                *out.stride(),
                *self._step(tempering),
                *(number.to(self.dtype).contiguous() for number in numbers),
                pull.columns.contiguous(),
                pull.at.to(self.dtype).contiguous(),
                columns,
                pull.slope is not None,
                BLOCK=_block(z),
                COLUMNS=triton.next_power_of_2(max(1, columns)),
                num_warps=WARPS,
                **self._registers,
            )
        # autograd must learn of what no operation of torch's has written
        if not out.is_inference():
            increment_version(out)

    def _step(self, tempering: Tempering) -> tuple[Any, ...]:
        """Temperature, soft-cap and support, as the kernels take them: what there is not, as 0."""
        support, temperature = tempering.support, tempering.temperature
        per_row = isinstance(temperature, torch.Tensor)
        of_rows = temperature.to(self.dtype).contiguous() if isinstance(temperature, torch.Tensor) else 0
        words: tuple[Any, ...] = (0, 0, 0, 0, 0)
        if support is not None and support.words is not None:
            words = (support.words, support.words.stride(0), support.rows, support.whole, support.columns.start)
        return (
            of_rows,
            self._exact(1.0 if per_row else float(temperature)),
            self._exact(float(tempering.softcap or 0.0)),
            per_row,
            tempering.softcap is not None,
            support is not None,
            *words,
        )

    def _exact(self, value: float) -> float | int:
        """The number, or its bits, as the kernels take it."""
        return int(np.float64(value).view(np.int64)) if self.dtype == torch.float64 else value


def _rows(z: torch.Tensor, places: Places) -> tuple[Any, ...]:
    """A matrix with its strides and its width, and which rows of it."""
    return z, *z.stride(), z.shape[1], places.index


def _block(z: torch.Tensor) -> int:
    return min(BLOCK, int(triton.next_power_of_2(max(16, z.shape[1]))))


ROWS = TritonRows
"""What `drpo_torch.vocabulary.engines` takes of this module."""
