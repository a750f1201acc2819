"""Logits of the behaviour policy: recorded ones, or those of its LM head, recomputed for a chunk of tokens at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drpo_torch.vocabulary.graph import rows_of
from drpo_torch.vocabulary.recorded import LinearHead, head_logits, product_dtype
from drpo_torch.vocabulary.softmax import Places, working_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from drpo_torch.vocabulary.recorded import FullCentering, FullDivergence
    from drpo_torch.vocabulary.softmax import Tempering

__all__ = ["BehaviorLogits"]

# how much memory the logits of a recorded head may take at a time
_HEAD_BYTES = 64 << 20


class BehaviorLogits:
    """Rows of logits of the behaviour policy, flat and without a graph."""

    def __init__(self, recorded: FullDivergence | FullCentering, policy: Tempering) -> None:
        """Over the support and the vocabulary of the policy, all tokens of which its step is given.

        Made where autocast is as the caller has it: the products of a head are taken in its dtype.
        """
        size = policy.size
        self.tempering = recorded.tempering._replace(support=policy.support, size=size)
        self._matrix: torch.Tensor | None = None
        self._head: LinearHead | None = None
        if not isinstance(recorded.behavior, LinearHead):
            self._matrix = rows_of(recorded.behavior.detach())[:, :size]
            return
        head = recorded.behavior
        dtype = product_dtype(head.hidden, head.weight)
        hidden = head.hidden.detach().reshape(-1, head.hidden.shape[-1])
        bias = None if head.bias is None else head.bias.detach()[:size]
        self._head = LinearHead(hidden, head.weight.detach()[:size].to(dtype), bias)

    def chunks(self, rows: Places, vocabulary: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor, Places]]:
        """Parts of these rows, each with a matrix that holds their logits, and their places in it.

        `vocabulary`: the most columns that a rank holds, so that all have the same parts.
        """
        size = max(1, len(rows))
        if self._head is not None:
            size = max(1, _HEAD_BYTES // (vocabulary * dtype.itemsize))
        for start in range(0, max(1, len(rows)), size):
            part = slice(start, start + size)
            some = rows[part]
            if self._matrix is not None:
                yield part, self._matrix, some
            else:
                logits = self._of_head(some.key)
                yield part, logits, Places.first(len(some), logits.device)

    def reader(self, index: torch.Tensor) -> Callable[[slice], torch.Tensor]:
        """A function to the tempered logits of neighbours among these rows, to be read in their order."""
        first, last, logits = 0, 0, torch.empty(0)

        def read(step: slice) -> torch.Tensor:
            nonlocal first, last, logits
            if self._matrix is not None:
                return self.tempering.at(index[step])(self._matrix[index[step]])
            assert self._head is not None
            if step.start < first or step.stop > last:
                row = max(1, len(self._head.weight)) * working_dtype(self._head.weight.dtype).itemsize
                first, last = step.start, max(step.stop, min(step.start + _HEAD_BYTES // row, len(index)))
                logits = self._of_head(index[first:last])
            return self.tempering.at(index[step])(logits[step.start - first : step.stop - first])

        return read

    def _of_head(self, key: torch.Tensor | slice) -> torch.Tensor:
        head = self._head
        assert head is not None
        return head_logits(head.hidden[key].to(head.weight.dtype), head.weight, head.bias)
