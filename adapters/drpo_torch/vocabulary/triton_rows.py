"""`drpo_torch.vocabulary.softmax.RowKernels` as Triton kernels over the memory of a GPU: one program a row.

Softmaxes are taken in one pass over a row, gradients in another, which may overwrite it. Rows are read where they lie, in
their own dtype, with any strides; their arithmetic is in float32, or float64 for float64. A row without a gradient is not
read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch.autograd.graph import increment_version

from drpo_torch.engines.triton_loop import REGISTERS
from drpo_torch.vocabulary import triton_kernels
from drpo_torch.vocabulary.softmax import ArrayRows, Softmaxes, Statistics, working_dtype
from drpo_torch.vocabulary.triton_arguments import Rows, Words, block
from drpo_torch.vocabulary.triton_divergences import divergence_gradients, divergence_sums
from drpo_torch.vocabulary.triton_most_probable import finds, most_probable

if TYPE_CHECKING:
    from drpo_torch.vocabulary.softmax import Places, Pull, Tempering, Wanted

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
        count = len(places)
        found = torch.empty((5 if entropy else 4, count), dtype=self.dtype, device=z.device)
        log_prob = torch.empty(wanted.ids.shape, dtype=self.dtype, device=z.device)
        if count:
            columns = _columns(wanted.ids, wanted.start)
            with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
                triton_kernels.softmaxes[(count,)](
                    *self._rows(z, places, tempering),
                    *columns,
                    wanted.elsewhere,
                    log_prob,
                    found,
                    count,
                    entropy,
                    **self._options(z),
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
        scale, slope = (None if field is None else field.to(self.dtype).contiguous() for field in (pull.scale, pull.slope))
        of_rows = (field.to(self.dtype).contiguous() for field in (statistics.maximum, statistics.log_sum))
        at, columns = pull.at.to(self.dtype), _columns(pull.columns)
        with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
            triton_kernels.gradients[(len(places),)](
                *self._rows(z, places, tempering),
                out,
                *out.stride(),
                *of_rows,
                scale,
                slope,
                at,
                *at.stride(),
                *columns,
                **self._options(z),
            )
        # autograd must learn of what no operation of torch's has written
        if not out.is_inference():
            increment_version(out)

    def _rows(self, z: torch.Tensor, places: Places, tempering: Tempering) -> tuple[Any, ...]:
        """Which rows there are, their supports, which of them count, and their width."""
        return Rows.of(z, places, tempering, self.dtype), Words.of(tempering), places.valid, z.shape[1]

    def _options(self, z: torch.Tensor) -> dict[str, Any]:
        return {"BLOCK": block(z.shape[1], BLOCK), "num_warps": WARPS, **self._registers}


def _columns(ids: torch.Tensor, start: int = 0) -> tuple[Any, ...]:
    """Columns of rows, (rows, C), by their ids: where they lie, the id of the first column, and C, also as a power of two."""
    count = ids.shape[1]
    return ids, *ids.stride(), start, count, triton.next_power_of_2(max(1, count))


ROWS = TritonRows
"""What `drpo_torch.vocabulary.engines` takes of this module."""
