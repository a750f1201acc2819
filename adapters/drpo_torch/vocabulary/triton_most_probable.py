"""The K most probable tokens of rows of logits as a Triton kernel: one program a row, which reads it once.

A row that does not count is not read. Rows of float64, whose entries leave no bits for an id, and more than `MOST` tokens
are left to array operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from drpo_torch.engines.triton_loop import REGISTERS
from drpo_torch.vocabulary import triton_most_probable_kernels
from drpo_torch.vocabulary.triton_arguments import Rows, Words, block

if TYPE_CHECKING:
    from drpo_torch.vocabulary.softmax import Places, Tempering

__all__ = ["finds", "most_probable"]

BLOCK = 1024
"""Logits of a step."""

MOST = 256
"""Tokens that are kept sorted, in registers."""

WARPS = 4


def finds(z: torch.Tensor, count: int) -> bool:
    """Whether the kernel takes these rows."""
    return z.dtype != torch.float64 and 0 < count <= MOST


def most_probable(
    z: torch.Tensor, places: Places, tempering: Tempering, count: int, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest z, in float32, and their ids; (rows, count): see `drpo_torch.vocabulary.most_probable`."""
    found = torch.empty((len(places), count), dtype=torch.float32, device=z.device)
    ids = torch.empty((len(places), count), dtype=torch.int64, device=z.device)
    if len(places):
        # to a soft-cap −inf is −cap, with a probability
        lowest = None if tempering.softcap is None else torch.finfo(z.dtype).min
        rows, keys = Rows.of(z, places, tempering, torch.float32), max(2, int(triton.next_power_of_2(count)))
        with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
            triton_most_probable_kernels.most_probable[(len(places),)](
                rows,
                Words.of(tempering),
                lowest,
                places.valid,
                z.shape[1],
                found,
                ids,
                count,
                start,
                KEYS=keys,
                BLOCK=max(keys, block(z.shape[1], BLOCK)),
                num_warps=WARPS,
                **REGISTERS,
            )
    return found, ids
