"""Chunks of tokens through an LM head: log-probs of some columns with softmax statistics, and the gradients back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from drpo_torch.vocabulary.engines import row_kernels
from drpo_torch.vocabulary.most_probable import most_probable
from drpo_torch.vocabulary.shards import merged, part_pull, within
from drpo_torch.vocabulary.softmax import Places, Pull, Statistics

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from drpo_torch.vocabulary.head import Head
    from drpo_torch.vocabulary.most_probable import Candidates
    from drpo_torch.vocabulary.softmax import Tempering

__all__ = ["Chunks", "Kept"]

# rows of a chunk that are moved together
_ROWS_MOVED = 16


class Kept(NamedTuple):
    """A chunk's results that its gradient needs: for each part of the vocabulary, statistics and share of the probability.

    `whole`: the statistics of all parts, on all ranks.
    """

    rows: Places
    columns: torch.Tensor
    whole: Statistics
    statistics: list[Statistics]
    shares: torch.Tensor

    def at(self, rows: Places, alive: torch.Tensor | slice) -> Kept:
        """The same of some of the tokens, which are these rows, and have these numbers among those here."""
        statistics = [of_part.at(alive) for of_part in self.statistics]
        return Kept(rows, self.columns[alive], self.whole.at(alive), statistics, self.shares[:, alive])


class Chunks:
    """The buffer that holds a chunk's logits, over the vocabulary or a part of it at a time, and what is done in it."""

    def __init__(self, head: Head, tempering: Tempering, module: ModuleType | None, *, rows: int, width: int) -> None:
        """For up to so many tokens, and so many of their logits at a time."""
        vocabulary, device = head.weight.shape[0], head.weight.device
        self.head, self.tempering, self.module = head, tempering, module
        starts = range(0, max(1, vocabulary), max(1, width))
        self.parts = [slice(start, min(start + width, vocabulary)) for start in starts]
        self._storage = torch.empty(rows * width, dtype=head.dtype, device=device)
        self._every = Places.first(rows, device)
        widths = {part.stop - part.start for part in self.parts}
        self._kernels = {size: row_kernels(module, size, head.dtype, device) for size in widths}

    @property
    def keeps(self) -> bool:
        """Whether softmaxes can wait in the logits' place for their coefficient: no rounding or derivative forbids it."""
        exact = self.head.dtype == self.head.row_dtype and self.tempering.softcap is None
        return exact and len(self.parts) == 1 and all(kernels.keeps for kernels in self._kernels.values())

    def forward(
        self,
        rows: Places,
        columns: torch.Tensor,
        *,
        entropy: bool,
        keep: bool = False,
        top_k: int | None = None,
        look: Callable[[torch.Tensor, Places], None] | None = None,
    ) -> tuple[torch.Tensor, Statistics, Kept]:
        """Log-probs of the columns (rows, C), the statistics of the rows, and what `backward` needs.

        `look` is shown each part's logits and their places. `keep`: softmaxes are left in the logits' place. `top_k`: as many
        most probable tokens are columns too, after those given.
        """
        head, shard, every, statistics = self.head, self.head.shard, self._every[: len(rows)], []
        hidden, tempering = head.rows(rows), self.tempering.at(rows.key)
        picked = torch.zeros(columns.shape, dtype=head.row_dtype, device=hidden.device)
        first: Candidates | None = None
        for part in self.parts:
            z = self._view(len(rows), part)
            head.logits(hidden, part, z)
            index, inside = within(columns - shard.start, part)
            if z.shape[1]:
                picked = torch.where(inside, tempering.of_columns(z.gather(-1, index), columns), picked)
            if look is not None:
                look(z, every)
            kernels, of_part = self._kernels[z.shape[1]], tempering.part(shard.of_whole(part))
            if top_k is not None:
                found = most_probable(self.module, z, every, of_part, top_k, shard.start + part.start)
                first = found if first is None else first.beside(found, top_k)
            statistics.append(kernels.statistics(z, every, of_part, entropy=entropy, keep=z if keep else None))
        of_rank, shares = merged(statistics)
        whole, share, picked = shard.merged(of_rank, picked, columns)
        if top_k is not None and first is not None:
            columns, picked = shard.with_most_probable(first, top_k, columns, picked, tempering)
        return whole.log_prob(picked), whole, Kept(rows, columns, whole, statistics, shares * share)

    def backward(self, kept: Kept, pull: Pull, *, recompute: bool, softmax: bool = False) -> None:
        """Add the gradients of a chunk's tokens to the head's; `pull`: of the whole rows, by the columns of `forward`.

        `recompute`: the logits are gone; `softmax`: what is there are softmaxes.
        """
        head = self.head
        # 0 in a product does not silence a NaN
        hidden, every = kept.rows.counted(head.rows(kept.rows)), self._every[: len(kept.rows)]
        tempering = self.tempering.at(kept.rows.key)
        pull, chunk = head.begin(hidden, pull, tempering.temperature)
        pull = pull._replace(columns=pull.columns - head.shard.start)
        for part, share, statistics in zip(self.parts, kept.shares, kept.statistics, strict=True):
            gradient = self._view(len(kept.rows), part)
            if recompute:
                head.logits(hidden, part, gradient)
            of_part = part_pull(pull, part, share, statistics, kept.whole.maximum).counted(kept.rows)
            kernels = self._kernels[gradient.shape[1]]
            of_columns = tempering.part(head.shard.of_whole(part))
            # what is derived at all columns needs their log-probs
            of_rows = statistics if pull.everywhere is None else kept.whole
            kernels.gradients(gradient, every, of_columns, of_part, statistics=of_rows, out=gradient, kept=softmax)
            if recompute or head.shard.group is not None:
                # in a part where every logit is −inf, softmax is NaN
                gradient.masked_fill_((statistics.maximum == -torch.inf)[:, None], 0.0)
            head.add(gradient, part, chunk)
        head.end(kept.rows.key, chunk)

    def held(self, rows: int) -> tuple[torch.Tensor, Places]:
        """What the buffer holds of so many rows after `forward`: logits of the last part, or their softmaxes; their places."""
        return self._view(rows, self.parts[-1]), self._every[:rows]

    def close_up(self, alive: torch.Tensor, rows: int) -> None:
        """Move the rows of logits that are alive to the first places, in this order."""
        z = self._view(rows, self.parts[0])
        # those before the first gap stay; on a device, to count them would be to wait
        stay = int((alive == self._every.index[: len(alive)]).sum()) if alive.device.type == "cpu" else 0
        for start in range(stay, len(alive), _ROWS_MOVED):
            # a row moves to the front, over rows that have moved already: several may be read before any is written
            moved = z[alive[start : start + _ROWS_MOVED]]
            z[start : start + len(moved)] = moved

    def _view(self, rows: int, part: slice) -> torch.Tensor:
        """The first elements of the buffer, as logits of some rows over a part of the vocabulary."""
        width = part.stop - part.start
        return self._storage[: rows * width].view(rows, width)
