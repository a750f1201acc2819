"""Chunks of tokens through an LM head: log-probs of some columns with softmax statistics, and the gradients back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from drpo_core._checks import check_number
from drpo_torch._host import is_waited_for
from drpo_torch.vocabulary.engines import row_kernels
from drpo_torch.vocabulary.most_probable import most_probable
from drpo_torch.vocabulary.shards import part_pull
from drpo_torch.vocabulary.softmax import Places, Pull, Softmaxes, Statistics, rows_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from drpo_torch.vocabulary.head import Head
    from drpo_torch.vocabulary.most_probable import Candidates
    from drpo_torch.vocabulary.softmax import Tempering

__all__ = ["Chunks", "Kept", "chunk_sizes"]

# of the tokens, on a CPU
_TOKENS = 256
# rows of a chunk that are moved together
_ROWS_MOVED = 16


def chunk_sizes(
    tokens: int | None, vocabulary: int | None, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """The tokens of a chunk, and how much of the `width` of the vocabulary is computed at a time, from what was asked for."""
    if vocabulary is not None:
        width = min(int(check_number("chunk_vocabulary", vocabulary, at_least=1, whole=True)), width)
    if tokens is not None:
        return int(check_number("chunk_tokens", tokens, at_least=1, whole=True)), width
    return rows_at_once(width, dtype, device) if is_waited_for(device) else _TOKENS, width


class Kept(NamedTuple):
    """A chunk's results that its gradient needs: for each part of the vocabulary, statistics and share of the probability.

    `whole`: the statistics of all parts, on all ranks. No shares of a part that is the whole.
    """

    rows: Places
    columns: torch.Tensor
    whole: Statistics
    statistics: list[Statistics]
    shares: torch.Tensor | None

    @classmethod
    def joined(cls, chunks: Sequence[Kept]) -> Kept:
        """Several chunks, in their order, as one."""
        if len(chunks) == 1:
            return chunks[0]
        rows, columns, whole, statistics, shares = zip(*chunks, strict=True)
        parts = [Statistics.joined(part) for part in zip(*statistics, strict=True)]
        every = None if shares[0] is None else torch.cat(shares, dim=1)
        return cls(rows[0].joined(rows[1:]), torch.cat(columns), Statistics.joined(whole), parts, every)

    def at(self, rows: Places, alive: torch.Tensor | slice) -> Kept:
        """The same of some of the tokens, which are these rows, and have these numbers among those here."""
        statistics = [of_part.at(alive) for of_part in self.statistics]
        shares = None if self.shares is None else self.shares[:, alive]
        return Kept(rows, self.columns[alive], self.whole.at(alive), statistics, shares)


class Chunks:
    """The buffer that holds a chunk's logits, over the vocabulary or a part of it at a time, and what is done in it."""

    def __init__(self, head: Head, tempering: Tempering, module: ModuleType | None, *, rows: int, width: int) -> None:
        """For up to so many tokens, and so many of their logits at a time."""
        vocabulary, device = head.weight.shape[0], head.weight.device
        self.head, self.tempering, self.module = head, tempering, module
        starts = range(0, max(1, vocabulary), max(1, width))
        self.parts = [slice(start, min(start + width, vocabulary)) for start in starts]
        self._storage = torch.empty(rows * width, dtype=head.dtype, device=device)
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
    ) -> tuple[Softmaxes, Kept]:
        """The softmaxes of the rows with log-probs of the columns (rows, C), and what `backward` needs.

        `look` is shown each part's logits and their places. `keep`: softmaxes are left in the logits' place. `top_k`: as many
        most probable tokens are columns too, after those given.
        """
        head, shard, every, found = self.head, self.head.shard, rows.numbered(), []
        hidden, tempering = head.rows(rows), self.tempering.at(rows.key)
        first: Candidates | None = None
        for part in self.parts:
            z = self._view(len(rows), part)
            head.logits(hidden, part, z)
            if look is not None:
                look(z, every)
            kernels, of_part = self._kernels[z.shape[1]], tempering.part(shard.of_whole(part))
            if top_k is not None:
                these = most_probable(self.module, z, every, of_part, top_k, shard.start + part.start)
                first = these if first is None else first.beside(these, top_k)
            wanted = shard.wanted(columns, None if len(self.parts) == 1 else part)
            found.append(kernels.softmaxes(z, every, of_part, wanted, entropy=entropy, keep=z if keep else None))
        of_rank, shares = shard.joined(found, every, columns)
        whole, share = shard.merged(of_rank, every, columns)
        if share is not None:
            shares = share[None] if shares is None else shares * share
        if top_k is not None and first is not None:
            whole, columns = shard.with_most_probable(first, top_k, whole, columns, every, tempering)
        return whole, Kept(rows, columns, whole.statistics, [part.statistics for part in found], shares)

    def backward(self, kept: Kept, pull: Pull, *, recompute: bool, softmax: bool = False) -> None:
        """Add the gradients of a chunk's tokens to the head's; `pull`: of the whole rows, by the columns of `forward`.

        `recompute`: the logits are gone; `softmax`: what is there are softmaxes.
        """
        head = self.head
        # 0 in a product does not silence a NaN
        hidden, every = kept.rows.counted(head.rows(kept.rows)), kept.rows.numbered()
        tempering, alone = self.tempering.at(kept.rows.key), kept.shares is None
        pull, chunk = head.begin(hidden, pull, tempering.temperature, kept.rows)
        shares = [None] if kept.shares is None else kept.shares
        for part, share, statistics in zip(self.parts, shares, kept.statistics, strict=True):
            gradient = self._view(len(kept.rows), part)
            if recompute:
                head.logits(hidden, part, gradient)
            ids, kernels, of_part = head.shard.of_whole(part), self._kernels[gradient.shape[1]], pull
            if share is not None:
                of_part = part_pull(pull, ids, share, statistics, kept.whole.maximum).counted(kept.rows)
            of_columns = tempering.part(ids)
            # what is derived at all columns needs their log-probs
            of_rows = statistics if pull.everywhere is None else kept.whole
            kernels.gradients(gradient, every, of_columns, of_part, statistics=of_rows, out=gradient, kept=softmax)
            if not alone:
                # in a part where every logit is −inf, softmax is NaN
                gradient.masked_fill_((statistics.maximum == -torch.inf)[:, None], 0.0)
            head.add(gradient, part, chunk)
        head.end(kept.rows.key, chunk)

    def held(self, rows: int) -> tuple[torch.Tensor, Places]:
        """What the buffer holds of so many rows after `forward`: logits of the last part, or their softmaxes; their places."""
        return self._view(rows, self.parts[-1]), Places.first(rows, self._storage.device)

    def close_up(self, alive: torch.Tensor, rows: int) -> None:
        """Move the rows of logits that are alive to the first places, in this order."""
        z = self._view(rows, self.parts[0])
        # those before the first gap stay; on a device, to count them would be to wait
        stay = int((alive == torch.arange(len(alive), device=alive.device)).sum()) if alive.device.type == "cpu" else 0
        for start in range(stay, len(alive), _ROWS_MOVED):
            # a row moves to the front, over rows that have moved already: several may be read before any is written
            moved = z[alive[start : start + _ROWS_MOVED]]
            z[start : start + len(moved)] = moved

    def _view(self, rows: int, part: slice) -> torch.Tensor:
        """The first elements of the buffer, as logits of some rows over a part of the vocabulary."""
        width = part.stop - part.start
        return self._storage[: rows * width].view(rows, width)
