"""The denominator of a batch that is spread over processes and micro-batches, and its diagnostics.

DDP and FSDP average gradients over ranks. A loss divided by the denominator of the whole batch is to be summed over them
instead, so multiply it by the number of ranks of that average before `backward`, where it can be seen:

    normalizer = global_normalizer(token_mean, micro_batch_masks)
    loss, _ = policy_loss(objective, ..., mask=mask, reduction=token_mean, normalizer=normalizer)
    (loss * torch.distributed.get_world_size()).backward()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import array_api_compat.torch as xp
import torch
import torch.distributed as dist

from drpo_core.diagnostics import combine_diagnostics, map_diagnostics
from drpo_core.reduction import reduction_coefficients, reduction_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drpo_core._sequences import Across
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.reduction import Reduction

__all__ = ["across", "all_reduce_diagnostics", "global_coefficients", "global_normalizer"]


def global_normalizer(
    reduction: Reduction,
    masks: torch.Tensor | Sequence[torch.Tensor],
    *,
    segment_ids: torch.Tensor | Sequence[torch.Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    shard_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Denominator of the whole batch: valid tokens, or sequences that have one, over micro-batches and ranks.

    Parameters
    ----------
    reduction
        `drpo_core.token_mean`, `drpo_core.sequence_mean_token_mean` or `drpo_core.sequence_mean_token_sum`.
    masks
        The mask of this rank's tokens, or those of its micro-batches, as many as there are, none included; True at tokens
        that count.
    segment_ids
        Of packed tokens: which sequence each belongs to; one for each mask.
    group
        Ranks among which the batch is divided, those of `shard_group` included; default: all.
    shard_group
        Ranks among which the tokens of each sequence are divided (sequence or context parallelism), equally and in the
        order of their ranks. All ranks then need the same number of micro-batches.

    Returns
    -------
    torch.Tensor
        0-d float64, to be passed as `normalizer`, or to `global_coefficients`.

    Raises
    ------
    TypeError
        If nothing is known of the reduction, or a dtype is wrong.
    ValueError
        If the shapes differ.
    """
    masks = [masks] if isinstance(masks, torch.Tensor) else masks
    ids = [segment_ids] if isinstance(segment_ids, torch.Tensor) else segment_ids
    if ids is not None and len(ids) != len(masks):
        msg = f"segment_ids: expected one for each of {len(masks)} masks, got {len(ids)}"
        raise ValueError(msg)
    counts = [
        reduction_count(
            reduction,
            _whole(mask, shard_group),
            dtype=torch.float64,
            segment_ids=None if ids is None else _whole(ids[i], shard_group),
            xp=xp,
        )
        for i, mask in enumerate(masks)
    ]
    if not counts:
        # the other ranks wait for this one's
        none = torch.zeros(0, dtype=torch.bool)
        counts = [reduction_count(reduction, none, dtype=torch.float64, xp=xp).to(_device(group))]
    total = torch.stack(counts).sum()
    dist.all_reduce(total, group=group)
    # ranks that hold parts of the same sequences have counted the same ones
    return total if shard_group is None else total / dist.get_world_size(shard_group)


def global_coefficients(
    reduction: Reduction,
    mask: torch.Tensor,
    *,
    normalizer: torch.Tensor | float,
    shard_group: dist.ProcessGroup,
    segment_ids: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """What each token's loss is multiplied with in the reduction of the whole batch, where sequences lie across ranks.

    A rank that holds a part of each sequence can't count the tokens of a sequence. With these coefficients c the whole
    reduction is Σ m c L over all ranks: pass them as `token_weights`, with ``reduction=token_mean, normalizer=1``, or
    beside a mode whose reduction is ``"token_sum"``.

    Parameters
    ----------
    reduction
        `drpo_core.token_mean`, `drpo_core.sequence_mean_token_mean` or `drpo_core.sequence_mean_token_sum`.
    mask
        (…, tokens) or packed (tokens,): this rank's shard; True at tokens that count.
    normalizer
        A result of `global_normalizer` with the same `shard_group`.
    shard_group
        Ranks among which the tokens of each sequence are divided, equally and in the order of their ranks.
    segment_ids
        Of packed tokens: which sequence each belongs to, by numbers that mean the same on all these ranks.
    dtype
        Of the result.

    Returns
    -------
    torch.Tensor
        Of the mask's shape; anything at masked tokens.

    Raises
    ------
    TypeError
        If nothing is known of the reduction, or a dtype is wrong.
    ValueError
        If the shapes differ.
    """
    whole = _whole(mask, shard_group)
    segments = None if segment_ids is None else _whole(segment_ids, shard_group)
    coefficients = reduction_coefficients(reduction, whole, dtype=dtype, normalizer=normalizer, segment_ids=segments, xp=xp)
    start = dist.get_rank(shard_group) * mask.shape[-1]
    shard: torch.Tensor = coefficients.expand(whole.shape).narrow(-1, start, mask.shape[-1])
    return shard.contiguous()


def across(group: dist.ProcessGroup | None = None) -> Across:
    """How ranks that hold parts of the same padded rows combine what each has found of them (context parallelism).

    Pass it as `across` to `drpo_torch.policy_loss` or `token_loss`, with a mode that looks at sequences: every rank then
    takes part in an all-reduce of one number a row for each sum. A mean over
    sequences, which no rank can count, is refused: take ``dataclasses.replace(mode, reduction="token_sum")``, with
    `global_coefficients` as `token_weights`, and add up the losses of all ranks.

    Parameters
    ----------
    group
        Ranks among which the tokens of each row are divided; default: all.

    Returns
    -------
    callable
        ``across(tensor, "sum" | "max")``: the tensor of all ranks, reduced.
    """
    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

    def reduced(tensor: torch.Tensor, operation: str, /) -> torch.Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor, operations[operation], group=group)
        return tensor

    return reduced


def all_reduce_diagnostics(diagnostics: Diagnostics | None, *, group: dist.ProcessGroup | None = None) -> Diagnostics | None:
    """Diagnostics of all ranks, as if they had been one: the same on each of them, with one small collective.

    Merge those of a rank's micro-batches first, with `drpo_core.merge_diagnostics`. A rank that has none takes those of
    `policy_loss` of tensors without elements, or of an objective
    ``drpo_core.token_diagnostics(objective, empty, empty, empty)``.

    Parameters
    ----------
    diagnostics
        This rank's; the same names on all, in any order. None where they were not asked for.
    group
        The ranks; default: all.

    Returns
    -------
    dict or None
        Statistics by name, in this rank's order. `drpo_core.summarize` makes numbers of them. Without any, what was given;
        then there is no collective.
    """
    if not diagnostics:
        return diagnostics
    # by name, because the ranks may have put them in different orders
    in_order = {name: diagnostics[name] for name in sorted(diagnostics)}
    mine = torch.stack([field for statistic in in_order.values() for field in statistic])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    of_field = iter(torch.stack(everyone, dim=1))
    merged = combine_diagnostics(map_diagnostics(lambda _: next(of_field), in_order), xp=xp)
    return {name: merged[name] for name in diagnostics}


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where this group's collectives take tensors from."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or "gloo" in dist.get_backend(group):
        return torch.device("cpu")
    return accelerator


def _whole(shard: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The array of which the group's ranks hold equal parts along the last axis; without a group, the array itself."""
    if group is None:
        return shard
    if not shard.ndim:
        msg = "mask: expected (…, tokens), a shard of each sequence, got a 0-d tensor"
        raise ValueError(msg)
    # gloo knows no bool
    mine = shard.to(torch.uint8).contiguous() if shard.dtype == torch.bool else shard.contiguous()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts, dim=-1).to(shard.dtype)
