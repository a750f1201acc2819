"""Full divergences of two policies, and their gradient, as Triton kernels: one program a row, which reads both logits once.

Rows are read where they lie, in their own dtypes, with any strides. A row that does not count, or that no cotangent
reaches, is not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drpo_torch.engines.triton_loop import REGISTERS
from drpo_torch.vocabulary import triton_divergence_kernels
from drpo_torch.vocabulary.triton_arguments import Rows, Words, block

if TYPE_CHECKING:
    from drpo_torch.vocabulary.divergences import Side

__all__ = ["divergence_gradients", "divergence_sums"]

BLOCK = 2048
"""Logits of a step, of each policy."""

WARPS = 8


def divergence_sums(policy: Side, behavior: Side) -> torch.Tensor:
    """TV, KL and Σ π sign(π − μ), each a sum over these columns; (3, rows)."""
    like, count = policy.whole.maximum, len(policy.places)
    sums = torch.empty((3, count), dtype=like.dtype, device=like.device)
    if count:
        with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
            triton_divergence_kernels.divergences[(count,)](
                *_pair(policy, behavior), policy.places.valid, policy.logits.shape[1], sums, count, **_options(policy)
            )
    return sums


def divergence_gradients(
    policy: Side, behavior: Side, signed: torch.Tensor, of_tv: torch.Tensor, of_kl: torch.Tensor, out: torch.Tensor
) -> None:
    """The gradient in the policy's z, to the rows of `out`; `signed` is Σ π sign(π − μ) over all ranks."""
    like, count = policy.whole.maximum, len(policy.places)
    if not count:
        return
    numbers = (number.to(like.dtype).contiguous() for number in (signed, of_tv, of_kl))
    with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
        triton_divergence_kernels.divergence_gradients[(count,)](
            *_pair(policy, behavior), *numbers, policy.logits.shape[1], out, *out.stride(), **_options(policy)
        )


def _pair(policy: Side, behavior: Side) -> tuple[Any, ...]:
    """Both policies with their statistics, and the support that they have in common."""
    dtype = policy.whole.maximum.dtype
    sides = (
        (
            Rows.of(side.logits, side.places, side.tempering, dtype),
            side.whole.maximum.contiguous(),
            side.whole.log_sum.contiguous(),
        )
        for side in (policy, behavior)
    )
    mine, recorded = sides
    return *mine, *recorded, Words.of(policy.tempering)


def _options(policy: Side) -> dict[str, Any]:
    registers = REGISTERS if policy.whole.maximum.dtype == torch.float64 else {}
    return {"BLOCK": block(policy.logits.shape[1], BLOCK), "num_warps": WARPS, **registers}
