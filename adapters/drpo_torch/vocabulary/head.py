"""The products of the LM head: logits of a chunk of tokens, and the gradients that add up from theirs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from drpo_torch._host import is_waited_for
from drpo_torch.vocabulary.recorded import head_logits
from drpo_torch.vocabulary.softmax import power_of_two_below, rows_at_once, working_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drpo_torch.vocabulary.shards import Shard
    from drpo_torch.vocabulary.softmax import Places, Pull

__all__ = ["Chunk", "Head", "HeadInputs"]

# of ∂weight at a time on the CPU, where it is rounded to the dtype it is accumulated in, or its other factor transposed
_WEIGHT_ROWS = 4096
# float16 products stay below 2 to this power
_FLOAT16_BITS = 15


class HeadInputs(NamedTuple):
    """Hidden states (…, H), weight (V, H) and bias (V,) or None; or the gradients in them, None for those not needed."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that are not None, with their names."""
        return ((name, tensor) for name, tensor in zip(self._fields, self, strict=True) if tensor is not None)


@dataclass
class Chunk:
    """The tokens of a chunk that have a gradient: its parts over the vocabulary add up in `total`, ∂hidden.

    Of float16, ∂logits of each row are larger by the inverse of `unit`, a power of two, and `hidden` stands in the product
    with them smaller by as much, so that ∂weight is larger by the inverse of `weight_unit`. None elsewhere.
    """

    hidden: torch.Tensor
    unit: torch.Tensor | None = None
    weight_unit: torch.Tensor | None = None
    total: torch.Tensor | None = None


class Head:
    """An LM head in the dtype of its products, and the gradients that accumulate for it."""

    def __init__(self, inputs: HeadInputs, dtype: torch.dtype, shard: Shard, *, needed: bool, several: bool = False) -> None:
        """Of the ids of a rank's part of the vocabulary; rows of the weight after them are padding.

        ∂weight adds up in float32 at least if it is of `several` chunks: bfloat16 would round every sum.
        """
        hidden, weight, bias = (None if tensor is None else tensor.detach() for tensor in inputs)
        assert hidden is not None
        assert weight is not None
        self.dtype, self.row_dtype, self.shard = dtype, working_dtype(dtype), shard
        self.hidden, self.weight = hidden.reshape(-1, hidden.shape[-1]), weight[: shard.width].to(dtype)
        self.bias = None if bias is None else bias[: shard.width]
        self.needed, self.shape, self.size = needed, hidden.shape, shard.width
        wanted = [needed and tensor is not None and tensor.requires_grad for tensor in inputs]
        self._wanted, self._hidden_dtype = wanted, _kept(hidden.dtype)
        self._of_hidden: torch.Tensor | None = None
        self._weight_dtype = _kept(weight.dtype)
        adding = working_dtype(weight.dtype) if several else self._weight_dtype
        self.of_weight = torch.empty_like(weight, dtype=adding) if wanted[1] else None
        self.of_bias = torch.zeros_like(bias, dtype=self.row_dtype) if wanted[2] and bias is not None else None
        self.started: set[int] = set()

    @property
    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """∂loss/∂ hidden, weight and bias, None where not needed; those of float16 in float32."""
        of_hidden = self._hidden_gradient().reshape(self.shape) if self._wanted[0] else None
        return of_hidden, self.of_weight, self.of_bias

    def rows(self, rows: Places) -> torch.Tensor:
        """Hidden states of some tokens, in the dtype of the products."""
        return self.hidden[rows.key].to(self.dtype)

    def logits(self, hidden: torch.Tensor, part: slice, out: torch.Tensor) -> None:
        """Logits of hidden states over a part of the vocabulary."""
        head_logits(hidden, self.weight[part], None if self.bias is None else self.bias[part], out=out)

    def begin(self, hidden: torch.Tensor, pull: Pull, temperature: float | torch.Tensor, rows: Places) -> tuple[Pull, Chunk]:
        """The pull of the tokens of a chunk as ∂logits are to be formed from it, and their part in the products."""
        if self.dtype != torch.float16:
            return pull, Chunk(hidden)
        pull = pull.counted(rows)
        # ∂logits of a row are at most this large, and add up to at most twice as much
        size = pull.size(self.shard.vocabulary) / temperature
        shift = power_of_two_below(_FLOAT16_BITS, size * self._reach)
        weight_shift = power_of_two_below(_FLOAT16_BITS, size.sum() * hidden.abs().amax().to(size.dtype))
        factor = (hidden * (weight_shift / shift)[:, None]).to(self.dtype)
        return pull.scaled(shift), Chunk(factor, 1.0 / shift, 1.0 / weight_shift)

    def add(self, gradient: torch.Tensor, part: slice, chunk: Chunk) -> None:
        """Add to the gradients, from a chunk's ∂logits over a part of the vocabulary."""
        if self._wanted[0]:
            product = torch.mm(gradient, self.weight[part])
            product = product if chunk.unit is None else product * chunk.unit[:, None]
            if chunk.total is not None:
                chunk.total.add_(product)
            else:
                # what nothing is added to need not be wider
                alone = self.shard.group is None and part == slice(0, self.size)
                chunk.total = product if alone else product.to(self.row_dtype)
        if self.of_weight is not None:
            self._add_weight(self.of_weight[part], gradient, chunk, again=part.start in self.started)
        if self.of_bias is not None:
            rows = self._rows_at_once(1)
            blocks = torch.split(self.of_bias[part], rows), torch.split(gradient, rows, dim=1)
            for block, share in zip(*blocks, strict=True):
                exact = share if chunk.unit is None else share * chunk.unit[:, None]
                block.add_(exact.sum(0, dtype=block.dtype))
        self.started.add(part.start)

    def end(self, key: slice | torch.Tensor, chunk: Chunk) -> None:
        """Keep ∂hidden of a chunk's tokens, which have these places: of all ranks, before it is rounded to its dtype."""
        if chunk.total is None:
            return
        total = self.shard.reduced_(chunk.total).to(self._hidden_dtype)
        if len(total) == len(self.hidden):
            self._of_hidden = total
        else:
            self._hidden_gradient()[key] = total

    def finish(self) -> None:
        """Fill in what no token has reached, and padding; and round once what has added up."""
        if self.of_weight is not None:
            self.of_weight[self.size if self.started else 0 :].zero_()
            self.of_weight = self.of_weight.to(self._weight_dtype)

    def _hidden_gradient(self) -> torch.Tensor:
        if self._of_hidden is None:
            self._of_hidden = torch.zeros_like(self.hidden, dtype=self._hidden_dtype)
        return self._of_hidden

    def _rows_at_once(self, columns: int) -> int:
        """How many rows of ∂weight, or of so many columns, are worked on at a time."""
        device = self.weight.device
        return rows_at_once(columns, self.row_dtype, device) if is_waited_for(device) else _WEIGHT_ROWS

    def _add_weight(self, total: torch.Tensor, gradient: torch.Tensor, chunk: Chunk, *, again: bool) -> None:
        rounded = total.dtype != gradient.dtype
        # of bfloat16 the CPU's product of a transposed matrix takes twice as long as transposing it and their product
        transposes = gradient.dtype == torch.bfloat16 and not is_waited_for(gradient)
        rows = self._rows_at_once(total.shape[1]) if rounded or transposes else max(1, len(total))
        for block, share in zip(torch.split(total, rows), torch.split(gradient, rows, dim=1), strict=True):
            transposed = share.mT.contiguous() if transposes else share.mT
            if not rounded:
                # β = 0 overwrites what uninitialised memory holds, NaN included
                block.addmm_(transposed, chunk.hidden, beta=float(again))
                continue
            product = torch.mm(transposed, chunk.hidden)
            if chunk.weight_unit is not None:
                product = product * chunk.weight_unit.reshape(1, 1)
            _ = block.add_(product) if again else block.copy_(product)

    @cached_property
    def _reach(self) -> torch.Tensor:
        """The larger of 1 and twice the largest weight: a bound of ∂hidden, and of ∂logits, of which each row adds up to 2."""
        if not len(self.weight):
            return torch.ones((), dtype=self.row_dtype, device=self.weight.device)
        low, high = self.weight.aminmax()
        return (2.0 * torch.maximum(high, -low).to(self.row_dtype)).clamp(min=1.0)


def _kept(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient waits for its cotangent: float16's would underflow before a loss scaler's factor."""
    return torch.float32 if dtype == torch.float16 else dtype
