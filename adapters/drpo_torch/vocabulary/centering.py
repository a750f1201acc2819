"""The score-centring term at vocabulary scale: over K recorded tokens and a tail, or over all tokens, a few rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from drpo_core.centering import outcome_terms
from drpo_core.modes.mode import Mode, is_whole_mode
from drpo_torch.engines import Batch, run_pass
from drpo_torch.engines._namespace import namespace
from drpo_torch.vocabulary.divergences import repeated
from drpo_torch.vocabulary.softmax import Statistics, Workspace, working_dtype

if TYPE_CHECKING:
    from drpo_core import Objective
    from drpo_core.loss import Engine
    from drpo_torch.vocabulary.behavior import BehaviorLogits
    from drpo_torch.vocabulary.recorded import TopKCentering
    from drpo_torch.vocabulary.shards import Shard
    from drpo_torch.vocabulary.softmax import Places, Tempering

__all__ = ["CenteredRows", "FullTerm", "Measured", "top_k_terms"]


class Measured(NamedTuple):
    """Per row, before the coefficient of the reduction: the term Σ C_v log π_v, Σ C_v, and Σ abs(C_v)."""

    value: torch.Tensor
    total: torch.Tensor
    size: torch.Tensor


def top_k_terms(
    objective: Objective,
    recorded: TopKCentering,
    key: torch.Tensor | slice,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    divergence: torch.Tensor | None,
    outside: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The term per row, and C_v (rows, K), from log π of the recorded tokens, of which some may be outside the support."""

    def of_rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().reshape(-1, tensor.shape[-1])[key]

    every = [log_prob, of_rows(recorded.behavior_log_prob)]
    if recorded.proximal_log_prob is not None:
        every.append(of_rows(recorded.proximal_log_prob))
    for without in (repeated(of_rows(recorded.ids)), outside):
        if without is not None:
            every = [log_probs.masked_fill(without, -torch.inf) for log_probs in every]
    values, coefficients = outcome_terms(
        objective,
        every[0],
        every[1],
        advantages,
        tail=True,
        mask=None,
        proximal_log_prob=every[2] if len(every) > 2 else None,
        divergence=divergence,
        xp=namespace(),
    )
    return values.sum(-1), coefficients


class FullTerm:
    """The term of all rows over the whole vocabulary."""

    def __init__(
        self,
        objective: Objective,
        behavior: BehaviorLogits,
        advantages: torch.Tensor,
        engine: Engine,
        dtype: torch.dtype,
        shard: Shard,
    ) -> None:
        self.objective, self.behavior, self.advantages = objective, behavior, advantages
        self.engine, self.dtype, self.shard = engine, dtype, shard
        # of μ at each token, where this rank doesn't see all of its logits
        self._normalizers: Statistics | None = None
        if shard.group is not None:
            nothing = torch.zeros(advantages.shape, dtype=dtype, device=advantages.device)
            self._normalizers = Statistics(nothing, nothing.clone(), None, nothing)

    def measure(
        self,
        rows: Places,
        logits: torch.Tensor,
        places: Places,
        tempering: Tempering,
        whole: Statistics,
        divergence: torch.Tensor | None,
    ) -> Measured:
        """What is known of rows whose logits are at these places, and whose statistics over all ranks are `whole`."""
        work = Workspace(logits.shape[-1], self.dtype, logits.device)
        measured = torch.empty((3, len(rows)), dtype=self.dtype, device=logits.device)
        self._normalize_behavior(rows)
        of_rows = CenteredRows(self, rows.index, divergence, torch.ones_like(measured[0]), measured[2])
        for step, buffer, _ in work.steps(len(rows)):
            x = tempering.at(step)(work.take(logits, places[step].key), buffer)
            log_prob = whole.at(step).log_prob(x)
            coefficients = of_rows.of(step, log_prob)
            measured[1, step], measured[2, step] = coefficients.sum(-1), coefficients.abs().sum(-1)
            measured[0, step] = coefficients.mul_(log_prob.masked_fill_(log_prob == -torch.inf, 0.0)).sum(-1)
        return Measured(*self.shard.total(measured))

    def behavior_log_prob(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Log μ of a few tokens from their logits."""
        logits = logits.to(self.dtype)
        return log_softmax(logits) if self._normalizers is None else self._normalizers.at(index).log_prob(logits)

    def _normalize_behavior(self, rows: Places) -> None:
        """Learn the normalisers of μ from all ranks, unless this rank sees all of its logits."""
        if self._normalizers is None:
            return
        for part, recorded, at in self.behavior.chunks(rows, self.shard.widest, self.dtype):
            tempering_of_part = self.behavior.tempering.at(rows[part].key)
            found = self.shard.normalizers(None, recorded, at, tempering_of_part, working_dtype(recorded.dtype))
            self._normalizers.maximum[rows[part].index] = found.maximum.to(self.dtype)
            self._normalizers.log_sum[rows[part].index] = found.log_sum.to(self.dtype)

    def coefficients(
        self, log_prob: torch.Tensor, behavior: torch.Tensor, advantages: torch.Tensor, divergence: torch.Tensor | None
    ) -> torch.Tensor:
        """C_v of a few rows, (rows, V)."""
        if is_whole_mode(self.objective):
            every = (log_prob, behavior, advantages)
            options: dict[str, Any] = {"mask": None, "proximal_log_prob": None, "divergence": divergence}
            found: torch.Tensor = outcome_terms(self.objective, *every, tail=False, **options, xp=namespace())[1]
            return found

        def spread(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:, None].expand_as(log_prob)

        objective = self.objective.objective if isinstance(self.objective, Mode) else self.objective
        everything, factors = torch.ones_like(log_prob, dtype=torch.bool), behavior.exp().neg_()
        measured = None if divergence is None else spread(divergence)
        batch = Batch(log_prob, behavior, spread(advantages), everything, factors, measured)
        dtypes = {"dtype": self.dtype, "gradient_dtype": self.dtype}
        gradient: torch.Tensor = run_pass(objective, batch, self.engine, **dtypes, diagnostics=False).gradient
        return gradient


class CenteredRows:
    """Coefficients C_v of some rows, times a factor a row: `drpo_torch.vocabulary.softmax.Everywhere`."""

    def __init__(
        self,
        term: FullTerm,
        index: torch.Tensor,
        divergence: torch.Tensor | None,
        factor: torch.Tensor,
        size: torch.Tensor,
    ) -> None:
        self._term, self._index, self._divergence = term, index, divergence
        self._factor, self._size = factor, size
        self._behavior = term.behavior.reader(index)

    @property
    def moves(self) -> torch.Tensor:
        """The rows whose factor is not 0."""
        return self._factor != 0.0

    @property
    def size(self) -> torch.Tensor:
        """Σ abs(C_v) times the factor, a row."""
        return self._size * self._factor.abs()

    def of(self, step: slice, log_prob: torch.Tensor) -> torch.Tensor:
        """Factor times C_v."""
        term, index = self._term, self._index[step]
        behavior = term.behavior_log_prob(self._behavior(step), index)
        divergence = None if self._divergence is None else self._divergence[step]
        found = term.coefficients(log_prob, behavior, term.advantages[index], divergence)
        return found.mul_(self._factor[step, None])

    def at_rows(self, rows: torch.Tensor | slice) -> CenteredRows:
        """The same of some of the rows."""
        divergence = None if self._divergence is None else self._divergence[rows]
        return CenteredRows(self._term, self._index[rows], divergence, self._factor[rows], self._size[rows])

    def scaled(self, factor: torch.Tensor) -> CenteredRows:
        """The same, times another factor a row."""
        return CenteredRows(self._term, self._index, self._divergence, self._factor * factor, self._size)


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    """Log-probs x − log Σ e^x of rows, not rounded to the size of the logits."""
    # torch's own adds up the exponentials one after the other, in float32 to five digits
    shifted = x - x.amax(-1, keepdim=True)
    return shifted.sub_(shifted.exp().sum(-1, keepdim=True).log_())
