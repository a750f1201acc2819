"""Chunks of tokens through an LM head: log-probs of some columns with softmax statistics, and the gradients back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from drpo_torch.vocabulary.engines import row_kernels
from drpo_torch.vocabulary.softmax import Places, Pull, Statistics

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from drpo_torch.vocabulary.head import Head
    from drpo_torch.vocabulary.softmax import Tempering

__all__ = ["Chunks", "Kept"]

# rows of a chunk that are moved together
_ROWS_MOVED = 16


class Kept(NamedTuple):
    """A chunk's results that its gradient needs: for each part of the vocabulary, statistics and share of the probability."""

    rows: Places
    columns: torch.Tensor
    maximum: torch.Tensor
    statistics: list[Statistics]
    shares: torch.Tensor

    def at(self, alive: torch.Tensor) -> Kept:
        """The same of some of the tokens."""
        statistics = [of_part.at(alive) for of_part in self.statistics]
        rows = Places(self.rows.index[alive])
        return Kept(rows, self.columns[alive], self.maximum[alive], statistics, self.shares[:, alive])


class Chunks:
    """The buffer that holds a chunk's logits, over the vocabulary or a part of it at a time, and what is done in it."""

    def __init__(self, head: Head, tempering: Tempering, module: ModuleType | None, *, rows: int, width: int) -> None:
        """For up to so many tokens, and so many of their logits at a time."""
        vocabulary, device = head.weight.shape[0], head.weight.device
        self.head, self.tempering, self.module = head, tempering, module
        self.parts = [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
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
        look: Callable[[torch.Tensor, Places], None] | None = None,
    ) -> tuple[torch.Tensor, Statistics, Kept]:
        """Log-probs of the columns (rows, C), the statistics of the rows, and what `backward` needs.

        `look` is shown each part's logits and their places. `keep`: softmaxes are left in the logits' place.
        """
        head, every, statistics = self.head, self._every[: len(rows)], []
        hidden, tempering = head.rows(rows), self.tempering.at(rows.key)
        picked = torch.zeros(columns.shape, dtype=head.row_dtype, device=hidden.device)
        for part in self.parts:
            z = self._view(len(rows), part)
            head.logits(hidden, part, z)
            index, inside = _within(columns, part)
            picked = torch.where(inside, tempering.of_columns(z.gather(-1, index), columns), picked)
            if look is not None:
                look(z, every)
            kernels = self._kernels[z.shape[1]]
            statistics.append(kernels.statistics(z, every, tempering.part(part), entropy=entropy, keep=z if keep else None))
        whole, shares = merged(statistics)
        return whole.log_prob(picked), whole, Kept(rows, columns, whole.maximum, statistics, shares)

    def backward(self, kept: Kept, pull: Pull, *, recompute: bool, softmax: bool = False) -> None:
        """Add the gradients of a chunk's tokens to the head's; `pull`: of the whole rows, by the columns of `forward`.

        `recompute`: the logits are gone; `softmax`: what is there are softmaxes.
        """
        head = self.head
        hidden, every = head.rows(kept.rows), self._every[: len(kept.rows)]
        tempering = self.tempering.at(kept.rows.key)
        pull, chunk = head.begin(hidden, pull, tempering.temperature)
        for part, share, statistics in zip(self.parts, kept.shares, kept.statistics, strict=True):
            gradient = self._view(len(kept.rows), part)
            if recompute:
                head.logits(hidden, part, gradient)
            index, inside = _within(pull.columns, part)
            scale, slope = pull.scale, pull.slope
            if slope is not None:
                # a part's logits are counted from its own maximum
                scale, slope = scale - slope * (statistics.maximum - kept.maximum).nan_to_num(), slope * share
            of_part = Pull(index, torch.where(inside, pull.at, 0.0), scale * share, slope, pull.everywhere)
            kernels = self._kernels[gradient.shape[1]]
            of_columns = tempering.part(part)
            kernels.gradients(gradient, every, of_columns, of_part, statistics=statistics, out=gradient, kept=softmax)
            if recompute:
                # in a part where every logit is −inf, softmax is NaN
                gradient.masked_fill_((statistics.maximum == -torch.inf)[:, None], 0.0)
            head.add(gradient, part, chunk)
        head.end(kept.rows.key, chunk)

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


def merged(parts: list[Statistics]) -> tuple[Statistics, torch.Tensor]:
    """The statistics of rows from those of parts of them, and each part's share of the probability, (parts, rows)."""
    if len(parts) == 1:
        return parts[0], torch.ones_like(parts[0].maximum)[None]
    maxima = torch.stack([part.maximum for part in parts])
    nothing = maxima == -torch.inf
    log_sums = torch.stack([part.log_sum for part in parts]).masked_fill_(nothing, 0.0)
    maximum = maxima.amax(0)
    log_sum = torch.logsumexp(maxima - maximum + log_sums, 0)
    log_shares = maxima - maximum + log_sums - log_sum
    shares = log_shares.exp()
    entropy = None
    if parts[0].entropy is not None:
        # chain rule: of the part, then within it
        entropies = torch.stack([part.entropy for part in parts])  # type: ignore[misc]
        entropy = (entropies - log_shares).mul_(shares).masked_fill_(nothing, 0.0).sum(0)
    return Statistics(maximum, log_sum, entropy, torch.ones_like(maximum)), shares


def _within(columns: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids counted from the start of a part of the vocabulary, clamped to it, and whether they are in it."""
    size = part.stop - part.start
    index = columns - part.start
    return index.clamp(0, size - 1), (index >= 0) & (index < size)
