"""The K most probable tokens of rows of logits: found in parts of the vocabulary, and merged.

The order is that of the head's output z, which a soft-cap and a temperature keep: rounded logits x may be equal where z are
not, and a tanh may round equal z to different x. Of equal z, the lower id is first, whichever part each is in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from drpo_torch._host import is_waited_for
from drpo_torch.vocabulary.softmax import rows_at_once, working_dtype

if TYPE_CHECKING:
    from types import ModuleType

    from drpo_torch.vocabulary.softmax import Places, Tempering

__all__ = ["Candidates", "most_probable"]


class Candidates(NamedTuple):
    """The K first of some columns of rows, or all if there are fewer: their z, in the working dtype, and ids; (rows, K).

    An id that has no probability has z = −inf, and comes after all that have one, the lower id first.
    """

    z: torch.Tensor
    ids: torch.Tensor

    def first(self, count: int) -> Candidates:
        """The first of these candidates, which may be in any order."""
        order = self.ids.argsort(-1)
        z, ids = self.z.gather(-1, order), self.ids.gather(-1, order)
        order = z.argsort(dim=-1, descending=True, stable=True)[:, :count]
        return Candidates(z.gather(-1, order), ids.gather(-1, order))

    def beside(self, others: Candidates, count: int) -> Candidates:
        """The first of both."""
        return Candidates(*(torch.cat(pair, -1) for pair in zip(self, others, strict=True))).first(count)

    def padded(self, count: int, beyond: int) -> Candidates:
        """With candidates up to this count that come after all others: ids from `beyond` on are none."""
        missing = (0, count - self.ids.shape[-1])
        pad = torch.nn.functional.pad
        return Candidates(pad(self.z, missing, value=-torch.inf), pad(self.ids, missing, value=beyond))


def most_probable(
    module: ModuleType | None, z: torch.Tensor, places: Places, tempering: Tempering, count: int, start: int
) -> Candidates:
    """The first of some columns of rows of z, from id `start` on; the tempering is that of these rows and columns."""
    count = min(count, z.shape[1])
    # only Triton has a kernel of them
    if module is not None and hasattr(module, "most_probable") and module.finds(z, count):
        return Candidates(*module.most_probable(z, places, tempering, count, start))
    size = rows_at_once(z.shape[1], z.dtype, z.device)
    found = [Candidates(z.new_empty((0, count), dtype=working_dtype(z.dtype)), places.index.new_empty(0, count))]
    for first in range(0, len(places), size):
        step = slice(first, first + size)
        found.append(_of_rows(z[places[step].key], tempering.at(step), count))
    of_z, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Candidates(of_z, ids + start)


def _of_rows(z: torch.Tensor, tempering: Tempering, count: int) -> Candidates:
    """The first of a few rows."""
    if tempering.softcap is not None:
        # to which −inf is −cap, with a probability
        z = z.clamp(min=torch.finfo(z.dtype).min)
    if tempering.support is not None:
        z = z.masked_fill(tempering.support.outside(), -torch.inf)
    # which of several equal ones topk gives is not defined; it matters if the last of them is equal to the next
    values, ids = z.topk(min(count + 1, z.shape[1]), -1)
    if values.shape[1] > count:
        cut, ids = values[:, count] == values[:, count - 1], ids[:, :count]
        if is_waited_for(z):
            ids = torch.where(cut[:, None], _lowest(z, values[:, :count], ids), ids)
        else:
            some = cut.nonzero()[:, 0]
            ids[some] = _lowest(z[some], values[some, :count], ids[some])
    # exact, and what every device can sort and join, under autocast too
    return Candidates(values[:, :count].to(working_dtype(z.dtype)), ids).first(count)


def _lowest(z: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Ids of the largest entries of rows, with the lowest of those that are equal to the last."""
    last, (count, width) = values[:, -1:], (ids.shape[1], z.shape[1])
    before = torch.arange(0, -width, -1, dtype=torch.int32, device=z.device)
    lowest = -torch.where(z == last, before, -width).topk(count, -1).values.to(ids.dtype)
    equal = values == last
    return torch.where(equal, lowest.gather(-1, (equal.cumsum(-1) - 1).clamp_(min=0)), ids)
