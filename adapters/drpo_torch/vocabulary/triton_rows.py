"""`drpo_torch.vocabulary.softmax.RowKernels` as Triton kernels over the memory of a GPU: one program a row.

Softmaxes are taken in one pass over a row, gradients in another, which may overwrite it. Rows are read where they lie, in
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
from drpo_torch.vocabulary.softmax import ArrayRows, Softmaxes, Statistics, working_dtype

if TYPE_CHECKING:
    from drpo_torch.vocabulary.softmax import Places, Pull, Tempering, Wanted

__all__ = ["TritonRows"]

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

    def softmaxes(
        self,
        z: torch.Tensor,
        places: Places,
        tempering: Tempering,
        wanted: Wanted,
        *,
        entropy: bool = False,
        keep: torch.Tensor | None = None,  # noqa: ARG002 -- a softmax taken again costs no more than one that is read
    ) -> Softmaxes:
        """See `RowKernels`."""
        fields = 5 if entropy else 4
        found = torch.empty((fields, len(places)), dtype=self.dtype, device=z.device)
        log_prob = torch.empty(wanted.ids.shape, dtype=self.dtype, device=z.device)
        if len(places):
            with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
                triton_kernels.softmaxes[(len(places),)](
                    *_rows(z, places),
                    *self._step(tempering),
                    *_columns(wanted.ids, wanted.start),
                    wanted.elsewhere,
                    log_prob,
                    found,
                    len(places),
                    entropy,
                    BLOCK=_block(z),
                    num_warps=WARPS,
                    **self._registers,
                )
        maximum, log_sum, total, log_normalizer, *entropies = found.unbind()
        return Softmaxes(Statistics(maximum, log_sum, entropies[0] if entropy else None, total), log_normalizer, log_prob)

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
        scale, slope = (0 if number is None else number.to(self.dtype).contiguous() for number in (pull.scale, pull.slope))
        at = pull.at.to(self.dtype)
        with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
            triton_kernels.gradients[(len(places),)](
                *_rows(z, places),
                out,
                *out.stride(),
                *self._step(tempering),
                *(number.to(self.dtype).contiguous() for number in (statistics.maximum, statistics.log_sum)),
                scale,
                slope,
                at,
                *at.stride(),
                *_columns(pull.columns),
                pull.scale is not None,
                pull.slope is not None,
                BLOCK=_block(z),
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
    """A matrix with its strides and its width; which rows of it, as the first of neighbours or by index; and which count."""
    key = places.key
    among = (key.start, 0, False) if isinstance(key, slice) else (0, key, True)
    mask = 0 if places.valid is None else places.valid.contiguous().view(torch.uint8)
    return z, *z.stride(), z.shape[1], *among, mask, places.valid is not None


def _columns(ids: torch.Tensor, start: int = 0) -> tuple[Any, ...]:
    """Columns of rows, (rows, C), by their ids: where they lie, the id of the first column, and C, also as a power of two."""
    count = ids.shape[1]
    return ids, *ids.stride(), start, count, triton.next_power_of_2(max(1, count))


def _block(z: torch.Tensor) -> int:
    return min(BLOCK, int(triton.next_power_of_2(max(16, z.shape[1]))))


ROWS = TritonRows
"""What `drpo_torch.vocabulary.engines` takes of this module."""
