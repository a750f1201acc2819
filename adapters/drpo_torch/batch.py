"""The tokens of a vocabulary-scale policy loss: checked, flat, and what is learnt of them chunk by chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import array_api_compat.torch as xp
import torch

from drpo_core import sampled_in_top_k, token_diagnostics, token_loss_and_gradient, top_k_kl, top_k_tv
from drpo_core.reduction import reduction_coefficients
from drpo_torch.divergence import (
    FullDivergence,
    LinearHead,
    TopKDivergence,
    check_float,
    check_same_shape,
    full_divergence_rows,
)
from drpo_torch.softmax import Normalizer, Tempering, working_dtype

if TYPE_CHECKING:
    from typing import TypeAlias

    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.reduction import Reduction

    Divergence: TypeAlias = torch.Tensor | TopKDivergence | FullDivergence

__all__ = ["TokenBatch", "VocabularyLoss", "head_logits"]


class VocabularyLoss(NamedTuple):
    """A scalar `loss` to call `backward` on; detached: `diagnostics`, and per token `log_prob` and `entropy` (nats).

    The per-token figures are 0 at masked tokens; `entropy` is None unless it was asked for.
    """

    loss: torch.Tensor
    diagnostics: Diagnostics
    log_prob: torch.Tensor
    entropy: torch.Tensor | None


class TokenBatch:
    """Flat tokens of one call; `step` takes the log-probs of some of them and gives the final gradient in these."""

    def __init__(
        self,
        objective: Objective,
        *,
        leading: torch.Size,
        vocabulary: int,
        dtype: torch.dtype,
        tokens: torch.Tensor,
        behavior_log_prob: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        reduction: Reduction,
        normalizer: float | torch.Tensor | None,
        token_weights: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        divergence: Divergence | None,
        entropy: bool,
        jit: bool,
    ) -> None:
        check_float(behavior_log_prob=behavior_log_prob, advantages=advantages)
        per_token = {"tokens": tokens, "behavior_log_prob": behavior_log_prob, "advantages": advantages, "mask": mask}
        for name, tensor in per_token.items():
            check_same_shape(name, tensor, "the tokens", leading)
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            msg = f"tokens: expected an integral dtype, got {tokens.dtype}"
            raise TypeError(msg)
        options = {"normalizer": normalizer, "token_weights": token_weights, "segment_ids": segment_ids}
        dtype = working_dtype(dtype)
        coefficients = reduction_coefficients(reduction, mask, dtype=dtype, **options, xp=xp)
        if coefficients is None:
            msg = f"reduction: expected one of drpo_core's, whose coefficients are known beforehand, got {reduction!r}"
            raise TypeError(msg)
        self.objective, self.mask, self.reduction, self.options = objective, mask, reduction, options
        self.tokens = tokens.reshape(-1).to(torch.int64)
        self.behavior_log_prob, self.advantages = behavior_log_prob.detach().reshape(-1), advantages.detach().reshape(-1)
        self.coefficients = torch.broadcast_to(coefficients.detach(), mask.shape).reshape(-1)
        self.valid = mask.reshape(-1).nonzero()[:, 0]
        self._check_ids(vocabulary)
        self.losses, self.log_prob = torch.zeros((2, mask.numel()), dtype=dtype, device=mask.device)
        self.entropy = torch.zeros_like(self.losses) if entropy else None
        self.divergence, self.jit = divergence, jit
        self.measured = None if divergence is None else torch.zeros_like(self.losses)
        self._check_divergence(leading, vocabulary)

    def chunks(self, size: int) -> tuple[torch.Tensor, ...]:
        """Increasing indices of the valid tokens, `size` at a time."""
        return torch.split(self.valid, size) if len(self.valid) else ()

    def columns(self, rows: torch.Tensor) -> torch.Tensor:
        """Ids whose log-prob `step` needs: the sampled token, then the recorded top K; (rows, 1 or 1 + K)."""
        sampled = self.tokens[rows, None]
        if not isinstance(self.divergence, TopKDivergence):
            return sampled
        ids = self.divergence.ids
        return torch.cat((sampled, ids.reshape(-1, ids.shape[-1])[rows]), dim=-1)

    def full_divergence(self, rows: torch.Tensor, logits: torch.Tensor, tempering: Tempering) -> torch.Tensor | None:
        """The full-vocabulary divergence of rows with these logits, or None if the objective has another."""
        if not isinstance(self.divergence, FullDivergence):
            return None
        behavior, recorded = Tempering(self.divergence.temperature), self.divergence.behavior
        if isinstance(recorded, LinearHead):
            hidden = recorded.hidden.reshape(-1, recorded.hidden.shape[-1])[rows]
            behavior = behavior._replace(softcap=recorded.logit_softcap)
            behavior_logits = head_logits(hidden.detach(), recorded.weight.detach(), recorded.bias)
        else:
            behavior_logits = recorded.detach().reshape(-1, logits.shape[-1])[rows]
        result: torch.Tensor = getattr(
            full_divergence_rows(logits, behavior_logits, tempering, behavior, jit=self.jit), self.divergence.kind
        )
        return result

    def step(
        self, rows: torch.Tensor, log_prob: torch.Tensor, normalizer: Normalizer, full_divergence: torch.Tensor | None
    ) -> torch.Tensor:
        """∂(reduced loss)/∂log π of these tokens, from the log-probs of `columns`; keeps what `result` needs."""
        sampled, behavior = log_prob[:, 0], self.behavior_log_prob[rows]
        measured = full_divergence
        if isinstance(self.divergence, torch.Tensor):
            measured = self.divergence.detach().reshape(-1)[rows]
        elif isinstance(self.divergence, TopKDivergence):
            ids, top_k = self.divergence.ids, self.divergence.behavior_log_prob.detach()
            measured = (top_k_tv if self.divergence.kind == "tv" else top_k_kl)(
                sampled,
                behavior,
                top_k_log_prob=log_prob[:, 1:],
                top_k_behavior_log_prob=top_k.reshape(-1, top_k.shape[-1])[rows],
                sampled_in_top_k=sampled_in_top_k(self.tokens[rows], ids.reshape(-1, ids.shape[-1])[rows], xp=xp),
                xp=xp,
            )
        result = token_loss_and_gradient(self.objective, sampled, behavior, self.advantages[rows], divergence=measured, xp=xp)
        self.losses[rows], self.log_prob[rows] = result.loss, sampled
        if self.measured is not None and measured is not None:
            self.measured[rows] = measured.to(self.measured.dtype)
        if self.entropy is not None and normalizer.entropy is not None:
            self.entropy[rows] = normalizer.entropy
        gradient: torch.Tensor = result.gradient
        # by selection: a weight of 0 stops the gradient whatever its coefficient is
        return torch.where(gradient == 0.0, 0.0, gradient * self.coefficients[rows])

    def loss(self) -> torch.Tensor:
        """The reduced loss of what has been stepped through, without a backward pass."""
        loss: torch.Tensor = self.reduction(self.losses.reshape(self.mask.shape), self.mask, **self.options, xp=xp)
        return loss

    def result(self) -> VocabularyLoss:
        """All that has been learnt, without a backward pass."""
        shape = self.mask.shape
        log_prob = self.log_prob.reshape(shape)
        statistics = token_diagnostics(
            self.objective,
            log_prob,
            self.behavior_log_prob.reshape(shape),
            self.advantages.reshape(shape),
            mask=self.mask,
            divergence=None if self.measured is None else self.measured.reshape(shape),
            xp=xp,
        )
        return VocabularyLoss(self.loss(), statistics, log_prob, None if self.entropy is None else self.entropy.reshape(shape))

    def _check_ids(self, vocabulary: int) -> None:
        ids = self.tokens[self.valid]
        wrong = ((ids < 0) | (ids >= vocabulary)).nonzero()[:, 0]
        if len(wrong):
            msg = f"tokens: expected ids in [0, {vocabulary}) at valid positions, got {int(ids[wrong[0]])} ({len(wrong)} such)"
            raise ValueError(msg)

    def _check_divergence(self, leading: torch.Size, vocabulary: int) -> None:
        divergence: object = self.divergence
        if isinstance(divergence, torch.Tensor):
            check_float(divergence=divergence)
            check_same_shape("divergence", divergence, "the tokens", leading)
        elif isinstance(divergence, TopKDivergence):
            check_same_shape("divergence.ids", divergence.ids, "the tokens and K", (*leading, *divergence.ids.shape[-1:]))
        elif isinstance(divergence, FullDivergence):
            behavior = divergence.behavior
            if isinstance(behavior, LinearHead):
                size = behavior.hidden.shape[-1]
                check_same_shape("divergence.behavior.hidden", behavior.hidden, "the tokens and H", (*leading, size))
                check_same_shape("divergence.behavior.weight", behavior.weight, "(V, H)", (vocabulary, size))
            else:
                check_same_shape("divergence.behavior", behavior, "the tokens and V", (*leading, vocabulary))
        elif divergence is not None:
            msg = f"divergence: expected a torch.Tensor, a TopKDivergence or a FullDivergence, got {type(divergence).__name__}"
            raise TypeError(msg)


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Hidden (rows, H) times weight (V, H) transposed, plus bias, in `out` (rows, V) if given."""
    logits = torch.mm(hidden, weight.mT, out=out)
    return logits if bias is None else logits.add_(bias.detach())
