"""Softmaxes as operators that `torch.compile` keeps in one graph: `OfLogits` and `OfHead`, registered with torch.

Under `torch.compile` values are not known, so that only shapes and dtypes are checked before; an operator itself runs as
without it, by the same loops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drpo_torch._checks import check_logits
from drpo_torch.vocabulary.graph import Context
from drpo_torch.vocabulary.head import HeadInputs
from drpo_torch.vocabulary.recorded import check_head, product_dtype
from drpo_torch.vocabulary.row_map import check_vocabulary_size
from drpo_torch.vocabulary.softmax import Places, working_dtype
from drpo_torch.vocabulary.softmax_functions import (
    HeadSteps,
    OfHead,
    OfLogits,
    Wish,
    arguments_of_head,
    arguments_of_logits,
    check_wish,
)
from drpo_torch.vocabulary.support import Support

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["of_head", "of_logits"]

_WISH = (
    "Tensor tokens, Tensor? mask, Tensor? top_k_ids, int? top_k, float temperature, Tensor? temperatures, "
    "Tensor? support_ids, Tensor? support_offsets, Tensor? support_bits, int? vocabulary_size, bool entropy, str engine"
)
_STEPS = "float? softcap, int? chunk_tokens, int? chunk_vocabulary, ScalarType dtype"
_ARGUMENTS = f"Tensor[] source, {_WISH}, {_STEPS}"


def of_logits(logits: torch.Tensor, wish: Wish) -> tuple[torch.Tensor | None, ...]:
    """The outputs of `OfLogits`."""
    check_logits(logits)
    check_wish(wish, logits.shape[:-1], logits)
    check_vocabulary_size(wish.vocabulary_size, logits.shape[-1])
    return _called([logits], wish, HeadSteps(None, None, None, logits.dtype))


def of_head(inputs: HeadInputs, wish: Wish, steps: HeadSteps) -> tuple[torch.Tensor | None, ...]:
    """The outputs of `OfHead`."""
    check_head(*inputs, may_be_empty=False)
    check_wish(wish, inputs.hidden.shape[:-1], inputs.hidden)
    check_vocabulary_size(wish.vocabulary_size, len(inputs.weight))
    # here, where autocast is still as the caller has it
    dtype = product_dtype(inputs.hidden, inputs.weight)
    return _called([tensor for tensor in inputs if tensor is not None], wish, steps._replace(dtype=dtype))


def _called(source: list[torch.Tensor], wish: Wish, steps: HeadSteps) -> tuple[torch.Tensor | None, ...]:
    tokens, mask, top_k_ids, top_k, temperature, support, *rest = wish
    per_row = temperature.detach() if isinstance(temperature, torch.Tensor) else None
    of_all = 1.0 if isinstance(temperature, torch.Tensor) else float(temperature)
    supports = (None, None, None) if support is None else (support.ids, support.offsets, support.bits)
    found = _log_probs(source, tokens, mask, top_k_ids, top_k, of_all, per_row, *supports, *rest, *steps)
    log_prob, entropy, log_normalizer, columns, _, _ = found
    return log_prob, entropy if wish.entropy else None, log_normalizer, columns


def _given(arguments: Sequence[Any]) -> tuple[list[torch.Tensor], Wish, HeadSteps]:
    """The arguments of the operators, put together again."""
    source, tokens, mask, top_k_ids, top_k, of_all, per_row, ids, offsets, bits, size, entropy, engine, *steps = arguments
    support = None if ids is None and bits is None else Support(ids, offsets, bits=bits)
    temperature = of_all if per_row is None else per_row
    wish = Wish(tokens, mask, top_k_ids, top_k, temperature, support, size, entropy=entropy, engine=engine)
    return source, wish, HeadSteps(*steps)


class _Call:
    """One of the two functions with its arguments, to be run without autograd."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        source, self.wish, steps = _given(arguments)
        self.function: type[OfLogits | OfHead]
        if len(source) == 1:
            self.function, self.given = OfLogits, arguments_of_logits(source[0], self.wish)
        else:
            inputs = HeadInputs(source[0], source[1], source[2] if len(source) > 2 else None)
            self.function, self.given = OfHead, arguments_of_head(inputs, self.wish, steps)
        self.source, of_rows = self.given[: 1 if len(source) == 1 else 3], self.given[3]
        self.rows: Places = of_rows if isinstance(of_rows, Places) else of_rows.rows

    def forward(self) -> list[torch.Tensor]:
        context, count = Context(), self.wish.tokens.numel()
        log_prob, entropy, log_normalizer, columns = self.function.forward(context, *self.given)
        _, shares, *fields = context.saved_tensors[len(self.source) :]
        statistics = torch.stack([self.rows.spread(field, count) for field in fields if field is not None])
        shares = log_prob.new_empty(0) if shares is None else self.rows.spread(shares.mT, count).mT.contiguous()
        entropy = log_prob.new_empty(0) if entropy is None else entropy
        # an operator may not return what it was given
        return [log_prob, entropy, log_normalizer, columns.clone(), statistics, shares]

    def backward(self, cotangents: Sequence[torch.Tensor | None], kept: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        columns, statistics, shares = kept
        key = self.rows.key
        of_rows = None if not shares.numel() else shares[:, key]
        context = Context(needs_input_grad=self.given, given=self.given[3:])
        context.save_for_backward(*self.source, columns, of_rows, *statistics[:, key].unbind())
        of_log_prob, of_entropy, of_normalizer = cotangents
        return [*self.function.backward(context, of_log_prob, of_entropy, of_normalizer, None)[: len(self.source)]]


@torch.library.custom_op("drpo_torch::log_probs", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor[]")
def _log_probs(*arguments: Any) -> list[torch.Tensor]:  # noqa: ANN401
    """The outputs of flat tokens; then, for the backward pass, statistics of all and of parts, and the parts' shares."""
    return _Call(arguments).forward()


@_log_probs.register_fake
def _(*arguments: Any) -> list[torch.Tensor]:  # noqa: ANN401
    source, wish, steps = _given(arguments)
    assert steps.dtype is not None
    like, count = source[0].new_empty(0, dtype=working_dtype(steps.dtype)), wish.tokens.numel()
    more = wish.top_k or (0 if wish.top_k_ids is None else wish.top_k_ids.shape[-1])
    parts = 1
    if len(source) > 1 and steps.chunk_vocabulary is not None:
        parts = -(-(wish.vocabulary_size or len(source[1])) // steps.chunk_vocabulary)
    return [
        like.new_empty(count, 1 + more),
        like.new_empty(count if wish.entropy else 0),
        like.new_empty(count),
        like.new_empty((count, 1 + more), dtype=torch.int64),
        like.new_empty((1 + parts) * (3 + wish.entropy), count),
        like.new_empty(parts, count) if parts > 1 else like.new_empty(0),
    ]


_COTANGENTS = "Tensor? of_log_prob, Tensor? of_entropy, Tensor? of_normalizer"
_KEPT = "Tensor columns, Tensor statistics, Tensor shares"


@torch.library.custom_op(
    "drpo_torch::log_probs_backward",
    mutates_args=(),
    schema=f"({_COTANGENTS}, {_KEPT}, bool[] needed, {_ARGUMENTS}) -> Tensor[]",
)
def _log_probs_backward(*arguments: Any) -> list[torch.Tensor]:  # noqa: ANN401
    """The gradient in each tensor of the source; an empty one for those not needed."""
    cotangents, kept, needed, (source, *rest) = arguments[:3], arguments[3:6], arguments[6], arguments[7:]
    leaves = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(source, needed, strict=True)]
    # a head without a bias has no leaf for it
    found = _Call([leaves, *rest]).backward(cotangents, kept)[: len(leaves)]
    return [
        leaf.new_empty(0) if gradient is None or not wanted else gradient.reshape(leaf.shape)
        for gradient, leaf, wanted in zip(found, leaves, needed, strict=True)
    ]


@_log_probs_backward.register_fake
def _(*arguments: Any) -> list[torch.Tensor]:  # noqa: ANN401
    needed, source = arguments[6:8]
    return [torch.empty_like(t) if wanted else t.new_empty(0) for t, wanted in zip(source, needed, strict=True)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:  # noqa: ANN401
    source, *rest = inputs
    ctx.set_materialize_grads(False)
    tensors = [argument for argument in rest if isinstance(argument, torch.Tensor)]
    ctx.save_for_backward(*source, *output[3:], *tensors)
    ctx.rest = [None if isinstance(argument, torch.Tensor) else argument for argument in rest]
    ctx.is_tensor = [isinstance(argument, torch.Tensor) for argument in rest]
    ctx.sources, ctx.entropy = len(source), output[1].numel() > 0


def _pulled(ctx: Any, cotangents: list[torch.Tensor | None]) -> tuple[Any, ...]:  # noqa: ANN401
    saved = iter(ctx.saved_tensors)
    source, kept = ([next(saved) for _ in range(count)] for count in (ctx.sources, 3))
    rest = [next(saved) if is_tensor else value for value, is_tensor in zip(ctx.rest, ctx.is_tensor, strict=True)]
    of_log_prob, of_entropy, of_normalizer = cotangents[:3]
    needed = [*ctx.needs_input_grad[0]]
    given = (of_log_prob, of_entropy if ctx.entropy else None, of_normalizer, *kept, needed)
    found = _log_probs_backward(*given, source, *rest)
    return [gradient if wanted else None for gradient, wanted in zip(found, needed, strict=True)], *(None for _ in rest)


_log_probs.register_autograd(_pulled, setup_context=_keep)
