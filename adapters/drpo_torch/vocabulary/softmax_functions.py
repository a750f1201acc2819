"""Softmaxes as functions of logits, or of hidden states and a head, each with its backward pass."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from drpo_core._checks import check_number
from drpo_torch._checks import check_ids, check_shape, check_tensor, check_top_k_ids, check_untransformed
from drpo_torch._host import is_waited_for, without_autocast
from drpo_torch.autograd import refuse_second_derivative
from drpo_torch.vocabulary.chunks import Chunks, Kept, chunk_sizes
from drpo_torch.vocabulary.engines import loops, row_kernels
from drpo_torch.vocabulary.graph import gradient_like, may_be_overwritten, refuse_transformed_cotangents, rows_of
from drpo_torch.vocabulary.head import Head, HeadInputs
from drpo_torch.vocabulary.most_probable import most_probable
from drpo_torch.vocabulary.recorded import product_dtype, products_like
from drpo_torch.vocabulary.row_map import row_map
from drpo_torch.vocabulary.shards import Shard, shard_of_head, shard_of_logits
from drpo_torch.vocabulary.softmax import Places, Pull, Softmaxes, Statistics

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    import torch.distributed as dist

    from drpo_core.loss import Engine
    from drpo_torch.vocabulary.softmax import Tempering
    from drpo_torch.vocabulary.support import Support

__all__ = ["HeadSteps", "OfHead", "OfLogits", "Wish", "arguments_of_head", "arguments_of_logits", "check_wish"]


class Wish(NamedTuple):
    """What is asked of the softmaxes, as the caller gave it: see `drpo_torch.token_log_prob`."""

    tokens: torch.Tensor
    mask: torch.Tensor | None
    top_k_ids: torch.Tensor | None
    top_k: int | None
    temperature: float | torch.Tensor
    support: Support | None
    vocabulary_size: int | None
    entropy: bool
    engine: Engine


class HeadSteps(NamedTuple):
    """How logits come from a head, as the caller gave it: see `drpo_torch.linear_log_prob`. Without a dtype, that of now."""

    softcap: float | None
    chunk_tokens: int | None
    chunk_vocabulary: int | None
    dtype: torch.dtype | None = None


def arguments_of_logits(
    logits: torch.Tensor, wish: Wish, group: dist.ProcessGroup | None = None, *, overwrite: bool = False
) -> tuple[Any, ...]:
    """Those of `OfLogits`, checked."""
    logits, shard = shard_of_logits(logits, group, wish.vocabulary_size, wish.tokens, wish.mask)
    check_untransformed("logits", logits)
    leading = logits.shape[:-1]
    columns, rows = _checked(wish, leading, shard.vocabulary, logits)
    top_k = _checked_top_k(wish.top_k, wish.top_k_ids, shard.vocabulary)
    known: dict[str, Any] = {"size": shard.vocabulary, "leading": leading, "beside": logits, "columns": shard.all_columns}
    tempering = shard.narrowed(row_map(wish.temperature, wish.support, wish.tokens, wish.mask, **known))
    flat = rows_of(logits)
    may_overwrite = overwrite and may_be_overwritten(flat)
    module = loops(wish.engine, logits=flat)
    return flat, columns, top_k, rows, tempering, wish.entropy, may_overwrite, module, shard


def arguments_of_head(
    inputs: HeadInputs, wish: Wish, steps: HeadSteps, group: dist.ProcessGroup | None = None
) -> tuple[Any, ...]:
    """Those of `OfHead`, checked."""
    inputs, shard = shard_of_head(*inputs, group, wish.vocabulary_size, wish.tokens, wish.mask)
    for name, tensor in inputs.named():
        check_untransformed(name, tensor)
    hidden, leading = inputs.hidden, inputs.hidden.shape[:-1]
    columns, rows = _checked(wish, leading, shard.vocabulary, hidden)
    top_k = _checked_top_k(wish.top_k, wish.top_k_ids, shard.vocabulary)
    cap = None if steps.softcap is None else check_number("logit_softcap", steps.softcap, above=0.0)
    known: dict[str, Any] = {"leading": leading, "beside": hidden, "columns": shard.all_columns, "softcap": cap}
    map_of_rows = row_map(wish.temperature, wish.support, wish.tokens, wish.mask, size=shard.vocabulary, **known)
    dtype = product_dtype(hidden, inputs.weight) if steps.dtype is None else steps.dtype
    chunk = chunk_sizes(steps.chunk_tokens, steps.chunk_vocabulary, shard.width, dtype, hidden.device)
    module = loops(wish.engine, products=products_like(hidden, dtype))
    options: dict[str, Any] = {"entropy": wish.entropy, "top_k": top_k}
    return *inputs, _Sweep(rows, columns, shard.narrowed(map_of_rows), module, dtype, chunk, shard, **options)


def check_wish(wish: Wish, leading: Sequence[int], beside: torch.Tensor) -> None:
    """Raise unless shapes and dtypes fit tokens of this shape."""
    kinds = {"tokens": "integral", "mask": "bool", "top_k_ids": "integral"}
    for name, kind in kinds.items():
        tensor = getattr(wish, name)
        if tensor is not None or name == "tokens":
            check_untransformed(name, check_tensor(name, tensor, kind, beside=beside))
    check_shape("tokens", wish.tokens, leading, "the tokens")
    if wish.mask is not None:
        check_shape("mask", wish.mask, leading, "the tokens")
    if wish.top_k_ids is not None:
        check_top_k_ids("top_k_ids", wish.top_k_ids, leading)


def _checked(wish: Wish, leading: Sequence[int], vocabulary: int, beside: torch.Tensor) -> tuple[torch.Tensor, Places]:
    """Ids whose log-probs are wanted, that of the sampled token first, (rows, 1 or 1 + K), and the tokens that count."""
    check_wish(wish, leading, beside)
    tokens, mask, top_k_ids = wish.tokens, wish.mask, wish.top_k_ids
    check_ids("tokens", tokens, vocabulary, valid=mask)
    columns = tokens.reshape(-1, 1)
    if top_k_ids is not None:
        check_ids("top_k_ids", top_k_ids, vocabulary, valid=mask)
        more = top_k_ids.reshape(len(columns), top_k_ids.shape[-1])
        columns = torch.cat((columns.to(torch.int64), more.to(torch.int64)), dim=-1)
    rows = Places.first(len(columns), columns.device) if mask is None else Places.where(mask.reshape(-1))
    # where the mask is False they may be anything, such as −100
    return columns.to(torch.int64), rows


def _checked_top_k(top_k: object, top_k_ids: torch.Tensor | None, vocabulary: int) -> int | None:
    """The number of most probable tokens that are wanted."""
    if top_k is None:
        return None
    if top_k_ids is not None:
        msg = f"top_k: expected None beside top_k_ids, got {top_k!r}; give the ids, or how many are to be found"
        raise ValueError(msg)
    return int(check_number("top_k", top_k, at_least=1, at_most=vocabulary, whole=True))


_Cotangents: TypeAlias = "tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]"
"""Those of the log-probs (N, C), of the entropies and of the log-normalisers; None for 0."""


def _picked(cotangents: _Cotangents, rows: Places) -> _Cotangents:
    return tuple(None if cotangent is None else cotangent[rows.key] for cotangent in cotangents)  # type: ignore[return-value]


def _reached(rows: Places, cotangents: _Cotangents) -> tuple[Places, torch.Tensor | slice]:
    """Those of the rows that a cotangent reaches, and their numbers among these."""
    reached = [c != 0.0 for c in _picked(cotangents, rows) if c is not None]
    of_rows = [some.reshape(-1) if some.numel() == len(some) else some.any(-1) for some in reached]
    return rows.where_also(reduce(torch.logical_or, of_rows))


def _pull(columns: torch.Tensor, rows: Places, statistics: Statistics, tempering: Tempering, cotangents: _Cotangents) -> Pull:
    """∂log π(c)/∂x = 1[c] − π, ∂log Z/∂x = π, ∂H/∂x = −π (log π + H), times cotangents."""
    of_log_probs, of_entropy, of_normalizer = cotangents
    if of_log_probs is None:
        of_log_probs = torch.zeros(columns.shape, dtype=statistics.log_sum.dtype, device=columns.device)
    elif tempering.support is not None:
        # an id outside the support has a constant log π
        of_log_probs = of_log_probs.masked_fill(~tempering.support.holds(rows.counted(columns, 0)), 0.0)
    pull = Pull(columns, of_log_probs)
    if of_normalizer is not None:
        pull = pull._replace(scale=of_normalizer + pull.of_softmax)
    if of_entropy is None or statistics.entropy is None:
        return pull
    return pull.with_entropy(of_entropy, statistics.log_sum, statistics.entropy)


def _made(
    ctx: Any,  # noqa: ANN401
    found: Softmaxes,
    ids: torch.Tensor,
    rows: Places,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The outputs, of `count` tokens: log-probs, entropies, log-normalisers and the columns, which have no gradient."""
    # a result only if there are several
    entropy, columns = found.statistics.entropy, rows.spread(ids if ids.shape[1] == 1 else rows.counted(ids, 0), count)
    ctx.mark_non_differentiable(columns)
    # what is not reached has no cotangent, rather than one of zeros
    ctx.set_materialize_grads(False)
    # kept for the backward pass too, it must not be changed in place
    entropies = None if entropy is None else rows.spread(entropy, count).clone()
    return rows.spread(found.log_prob, count), entropies, rows.spread(found.log_normalizer, count), columns


class OfLogits(torch.autograd.Function):
    """From logits (N, V): log-probs of the columns (N, C), entropies and log-normalisers (N,), and the columns.

    With `top_k`, columns of the most probable tokens follow those given.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        logits: torch.Tensor,
        columns: torch.Tensor,
        top_k: int | None,
        rows: Places,
        tempering: Tempering,
        entropy: bool,  # noqa: FBT001 -- Function.apply takes no keywords
        overwrite: bool,  # noqa: FBT001
        module: ModuleType | None,
        shard: Shard,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The outputs."""
        of_rows, z, ids = tempering.at(rows.key), logits[:, : tempering.size], columns[rows.key]
        kernels = row_kernels(module, z.shape[-1], z.dtype, z.device)
        mine = kernels.softmaxes(z, rows, of_rows, shard.wanted(ids), entropy=entropy)
        found, share = shard.merged(mine, rows, ids)
        if top_k is not None:
            first = most_probable(module, z, rows, of_rows, top_k, shard.start)
            found, ids = shard.with_most_probable(first, top_k, found, ids, rows, of_rows)
        outputs = _made(ctx, found, ids, rows, len(logits))
        fields = [field for each in (found, mine) for field in each.statistics if field is not None]
        ctx.save_for_backward(logits, outputs[-1], share, *fields)
        ctx.given = rows, tempering, entropy, overwrite, module, shard
        return outputs

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        of_log_probs: torch.Tensor | None,
        of_entropy: torch.Tensor | None,
        of_normalizer: torch.Tensor | None,
        _: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """The gradients in the tensors."""
        cotangents = of_log_probs, of_entropy, of_normalizer
        refuse_second_derivative()
        refuse_transformed_cotangents(*cotangents)
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        logits, columns, share, *fields = ctx.saved_tensors
        rows, tempering, entropy, overwrite, module, shard = ctx.given
        # a device's kernels see for themselves which rows nothing reaches
        rows, alive = (rows, slice(None)) if is_waited_for(logits) else _reached(rows, cotangents)
        half, size = len(fields) // 2, tempering.size
        whole, mine = (Statistics.of(some, entropy=entropy).at(alive) for some in (fields[:half], fields[half:]))
        tempering = tempering.at(rows.key)
        every = _pull(columns[rows.key], rows, whole, tempering, _picked(cotangents, rows))
        pull = shard.pull(every, mine, whole, None if share is None else share[alive])
        gradient = logits.detach() if overwrite else gradient_like(logits)
        z = logits[:, :size]
        kernels = row_kernels(module, z.shape[-1], z.dtype, z.device)
        kernels.gradients(z, rows, tempering, pull, statistics=mine, out=gradient[:, :size])
        gradient[:, size:].zero_()
        shard.clear_(gradient, rows, every, mine)
        return gradient, None, None, None, None, None, None, None, None


class _Sweep:
    """All tokens through the head, chunk by chunk, in one pass or the other."""

    def __init__(
        self,
        rows: Places,
        columns: torch.Tensor,
        tempering: Tempering,
        module: ModuleType | None,
        dtype: torch.dtype,
        chunk: tuple[int, int],
        shard: Shard,
        *,
        entropy: bool,
        top_k: int | None,
    ) -> None:
        self.rows, self.columns, self.entropy, self._top_k, self._shard = rows, columns, entropy, top_k, shard
        self.tempering, self._module, self._dtype, (self._size, self._width) = tempering, module, dtype, chunk

    def chunks(self, head: Head, rows: Places) -> Chunks:
        return Chunks(head, self.tempering, self._module, rows=min(self._size, len(rows)), width=self._width)

    def head(self, inputs: HeadInputs, rows: Places, *, needed: bool) -> Head:
        with without_autocast(inputs.hidden.device):
            return Head(inputs, self._dtype, self._shard, needed=needed, several=len(rows) > self._size)

    def forward(self, inputs: HeadInputs) -> tuple[Softmaxes, list[Statistics], torch.Tensor | None, torch.Tensor]:
        """Softmaxes over all of the vocabulary, statistics of its parts and their shares, and the ids of the log-probs."""
        head = self.head(inputs, self.rows, needed=False)
        chunks = self.chunks(head, self.rows)
        found = [
            chunks.forward(rows, self.columns[rows.key], entropy=self.entropy, top_k=self._top_k)
            for rows in (self.rows.chunks(self._size) if len(self.rows) else (self.rows,))
        ]
        softmaxes, kept = zip(*found, strict=True)
        whole = Kept.joined(kept)
        return Softmaxes.joined(softmaxes), whole.statistics, whole.shares, whole.columns

    def backward(self, head: Head, kept: Kept, pull: Pull) -> None:
        """Add up the head's gradients; everything is of the same rows."""
        chunks = self.chunks(head, kept.rows)
        for start in range(0, len(kept.rows), self._size):
            some = slice(start, start + self._size)
            chunks.backward(kept.at(kept.rows[some], some), pull.at_rows(some), recompute=True)
        head.finish()


class OfHead(torch.autograd.Function):
    """From hidden states, weight and bias, the outputs of `OfLogits`."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sweep: _Sweep,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The outputs."""
        with without_autocast(hidden.device):
            found, parts, shares, ids = sweep.forward(HeadInputs(hidden, weight, bias))
        outputs = _made(ctx, found, ids, sweep.rows, len(sweep.columns))
        fields = [field for part in (*parts, found.statistics) for field in part if field is not None]
        ctx.save_for_backward(hidden, weight, bias, outputs[-1], shares, *fields)
        ctx.given = (sweep,)
        return outputs

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        of_log_probs: torch.Tensor | None,
        of_entropy: torch.Tensor | None,
        of_normalizer: torch.Tensor | None,
        _: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """The gradients in the tensors."""
        cotangents = of_log_probs, of_entropy, of_normalizer
        refuse_second_derivative()
        refuse_transformed_cotangents(*cotangents)
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        hidden, weight, bias, columns, shares, *fields = ctx.saved_tensors
        (sweep,) = ctx.given
        size = 4 if sweep.entropy else 3
        every = [Statistics.of(fields[i : i + size], entropy=sweep.entropy) for i in range(0, len(fields), size)]
        rows, alive = _reached(sweep.rows, cotangents)
        *parts, whole = (statistics.at(alive) for statistics in every)
        columns = columns[rows.key]
        kept = Kept(rows, columns, whole, parts, None if shares is None else shares[:, alive])
        pull = _pull(columns, rows, whole, sweep.tempering.at(rows.key), _picked(cotangents, rows))
        with without_autocast(hidden.device):
            head = sweep.head(HeadInputs(hidden, weight, bias), rows, needed=True)
            sweep.backward(head, kept, pull)
        gradients = zip(head.gradients, (hidden, weight, bias), strict=True)
        return *(None if g is None else g.to(tensor.dtype) for g, tensor in gradients), None
