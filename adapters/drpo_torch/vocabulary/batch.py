"""The tokens of a vocabulary-scale policy loss: checked, flat, and what is learnt of them chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import array_api_compat.torch as xp
import torch

from drpo_core import diagnostics, token_loss_and_gradient
from drpo_core.reduction import reduction_coefficients
from drpo_torch.vocabulary.checks import check_ids, check_shape, check_tensor, check_untransformed
from drpo_torch.vocabulary.divergences import full_divergence_rows, top_k_rows
from drpo_torch.vocabulary.recorded import (
    FullDivergence,
    LinearHead,
    TopKDivergence,
    head_logits,
    product_dtype,
    products_like,
)
from drpo_torch.vocabulary.softmax import Places, working_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.reduction import Reduction
    from drpo_torch.vocabulary.recorded import Divergence
    from drpo_torch.vocabulary.softmax import Statistics, Tempering

__all__ = ["Arguments", "TokenBatch", "VocabularyLoss"]


class VocabularyLoss(NamedTuple):
    """A scalar `loss` to call `backward` on; detached: `diagnostics`, and per token `log_prob` and `entropy` (nats).

    The per-token figures are 0 at masked tokens. `diagnostics` and `entropy` are None where they were not asked for.
    """

    loss: torch.Tensor
    diagnostics: Diagnostics | None
    log_prob: torch.Tensor
    entropy: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Arguments:
    """What the losses at vocabulary scale are told of the tokens, and what they are asked for."""

    objective: Objective
    tokens: torch.Tensor
    behavior_log_prob: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    reduction: Reduction
    normalizer: float | torch.Tensor | None
    token_weights: torch.Tensor | None
    segment_ids: torch.Tensor | None
    divergence: Divergence | None
    diagnostics: bool
    entropy: bool

    def check(self, leading: Sequence[int], vocabulary: int, beside: torch.Tensor) -> None:
        """Raise unless everything fits tokens of this shape, over this vocabulary, on the device of `beside`."""
        kinds = {"tokens": "integral", "mask": "bool", "segment_ids": "integral"}
        for name in ("tokens", "behavior_log_prob", "advantages", "mask", "token_weights", "segment_ids"):
            tensor = getattr(self, name)
            if tensor is None and name in ("token_weights", "segment_ids"):
                continue
            check_untransformed(name, check_tensor(name, tensor, kinds.get(name, "real floating"), beside=beside))
            check_shape(name, tensor, leading, "the tokens")
        check_ids("tokens", self.tokens, vocabulary, valid=self.mask)
        divergence: object = self.divergence
        if isinstance(divergence, torch.Tensor):
            check_shape("divergence", check_tensor("divergence", divergence, beside=beside), leading, "the tokens")
        elif isinstance(divergence, TopKDivergence):
            ids = check_tensor("divergence.ids", divergence.ids, "integral", beside=beside)
            check_shape("divergence.ids", ids, (*leading, *ids.shape[-1:]), "the tokens and K")
            check_ids("divergence.ids", ids, vocabulary, valid=self.mask)
        elif isinstance(divergence, FullDivergence):
            self._check_full(divergence.behavior, leading, vocabulary, beside)
        elif divergence is not None:
            kind = type(divergence).__name__
            msg = f"divergence: expected a torch.Tensor, a TopKDivergence or a FullDivergence, got {kind}"
            raise TypeError(msg)

    def matrices(self) -> dict[str, torch.Tensor]:
        """Recorded logits that row kernels are to read, by the name of their argument; of products, an empty stand-in."""
        if not isinstance(self.divergence, FullDivergence):
            return {}
        behavior = self.divergence.behavior
        if isinstance(behavior, LinearHead):
            return {"divergence.behavior": products_like(behavior.hidden, product_dtype(behavior.hidden, behavior.weight))}
        return {"divergence.behavior": behavior}

    @staticmethod
    def _check_full(
        behavior: torch.Tensor | LinearHead, leading: Sequence[int], vocabulary: int, beside: torch.Tensor
    ) -> None:
        name = "divergence.behavior"
        if isinstance(behavior, LinearHead):
            check_tensor(f"{name}.hidden", behavior.hidden, beside=beside)
            size = behavior.hidden.shape[-1]
            check_shape(f"{name}.hidden", behavior.hidden, (*leading, size), "the tokens and H")
            check_shape(f"{name}.weight", behavior.weight, (vocabulary, size), "the vocabulary and H")
            product_dtype(behavior.hidden, behavior.weight, f"{name}.")
        else:
            check_shape(name, check_tensor(name, behavior, beside=beside), (*leading, vocabulary), "the tokens and V")


class TokenBatch:
    """Flat tokens of one call. `step` takes the log-probs of a chunk and gives the final gradient in them."""

    def __init__(self, arguments: Arguments, dtype: torch.dtype) -> None:
        given, mask = arguments, arguments.mask
        self.given, self.row_dtype = given, working_dtype(dtype)
        self.dtype = working_dtype(dtype, given.behavior_log_prob.dtype, given.advantages.dtype)
        self.tokens = given.tokens.reshape(-1).to(torch.int64)
        self.behavior_log_prob = given.behavior_log_prob.detach().reshape(-1)
        self.advantages = given.advantages.detach().reshape(-1)
        coefficients = reduction_coefficients(given.reduction, mask, dtype=self.dtype, **self._options, xp=xp)
        if coefficients is None:
            msg = f"reduction: expected one of drpo_core's, whose coefficients are known beforehand, got {given.reduction!r}"
            raise TypeError(msg)
        self.coefficients = torch.broadcast_to(coefficients.detach(), mask.shape).reshape(-1)
        # here, where autocast is still as the caller has it
        self.recorded_head = self._recorded_head()
        self.valid = Places.where(mask.reshape(-1))
        self.losses, self.measured = self._zeros(self.dtype), self._zeros(self.dtype)
        self.log_prob = self._zeros(self.row_dtype)
        self.entropy = self._zeros(self.row_dtype) if given.entropy else None

    @property
    def _options(self) -> dict[str, object]:
        weights = self.given.token_weights
        return {
            "normalizer": self.given.normalizer,
            "token_weights": None if weights is None else weights.detach(),
            "segment_ids": self.given.segment_ids,
        }

    def _zeros(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(self.given.mask.numel(), dtype=dtype, device=self.given.mask.device)

    def columns(self, rows: Places) -> torch.Tensor:
        """Ids whose log-prob `step` needs: the sampled token, then the recorded top K; (rows, 1 or 1 + K)."""
        key, divergence = rows.key, self.given.divergence
        sampled = self.tokens[key, None]
        if not isinstance(divergence, TopKDivergence):
            return sampled
        ids = divergence.ids.reshape(-1, divergence.ids.shape[-1])[key]
        return torch.cat((sampled, ids.to(torch.int64)), dim=-1)

    def _recorded_head(self) -> LinearHead | None:
        """The behaviour policy's head in the dtype of its products, if logits are to be taken from one."""
        divergence = self.given.divergence
        if not isinstance(divergence, FullDivergence) or not isinstance(divergence.behavior, LinearHead):
            return None
        head = divergence.behavior
        dtype = product_dtype(head.hidden, head.weight)
        hidden = head.hidden.detach().reshape(-1, head.hidden.shape[-1])
        return LinearHead(hidden, head.weight.detach().to(dtype), None if head.bias is None else head.bias.detach())

    def full_divergence(
        self, module: ModuleType | None, rows: Places, logits: torch.Tensor, places: Places, tempering: Tempering
    ) -> torch.Tensor | None:
        """The full-vocabulary divergence of rows, whose logits are at these places; None if there is none to measure."""
        divergence = self.given.divergence
        if not isinstance(divergence, FullDivergence):
            return None
        head = self.recorded_head
        if head is None:
            recorded: torch.Tensor = divergence.behavior.detach().reshape(-1, logits.shape[-1])  # type: ignore[union-attr]
            at = rows
        else:
            recorded = head_logits(head.hidden[rows.key].to(head.weight.dtype), head.weight, head.bias)
            at = Places.first(len(rows), recorded.device)
        found = full_divergence_rows(module, logits, places, tempering, recorded, at, divergence.tempering)
        result: torch.Tensor = getattr(found, divergence.kind)
        return result

    def step(
        self, rows: Places, columns: torch.Tensor, log_prob: torch.Tensor, statistics: Statistics, full: torch.Tensor | None
    ) -> torch.Tensor:
        """∂(reduced loss)/∂log π of these tokens, from the log-probs of `columns`; keeps what `result` needs."""
        key, divergence = rows.key, self.given.divergence
        sampled, behavior = log_prob[:, 0], self.behavior_log_prob[key]
        measured = full
        if isinstance(divergence, torch.Tensor):
            measured = divergence.detach().reshape(-1)[key]
        elif isinstance(divergence, TopKDivergence):
            top_k = divergence.behavior_log_prob.detach()
            found = top_k_rows(columns, log_prob, behavior, top_k.reshape(-1, top_k.shape[-1])[key])
            measured = getattr(found, divergence.kind)
        result = token_loss_and_gradient(
            self.given.objective, sampled.to(self.dtype), behavior, self.advantages[key], divergence=measured, xp=xp
        )
        self.losses[key], self.log_prob[key] = result.loss, sampled
        if measured is not None:
            self.measured[key] = measured.to(self.dtype)
        if self.entropy is not None and statistics.entropy is not None:
            self.entropy[key] = statistics.entropy
        gradient: torch.Tensor = result.gradient
        # by selection: a weight of 0 stops the gradient whatever its coefficient is
        return torch.where(gradient == 0.0, 0.0, gradient * self.coefficients[key]).to(self.row_dtype)

    def loss(self) -> torch.Tensor:
        """The reduced loss of what has been stepped through, without a backward pass."""
        given = self.given
        loss: torch.Tensor = given.reduction(self.losses.reshape(given.mask.shape), given.mask, **self._options, xp=xp)  # type: ignore[arg-type]
        return loss

    def result(self) -> VocabularyLoss:
        """All that has been learnt, without a backward pass."""
        shape = self.given.mask.shape
        log_prob = self.log_prob.reshape(shape)
        statistics = diagnostics(
            self.given.objective,
            log_prob,
            self.behavior_log_prob.reshape(shape),
            self.advantages.reshape(shape),
            mask=self.given.mask,
            divergence=None if self.given.divergence is None else self.measured.reshape(shape),
            xp=xp,
        )
        entropy = None if self.entropy is None else self.entropy.reshape(shape)
        return VocabularyLoss(self.loss(), statistics if self.given.diagnostics else None, log_prob, entropy)
