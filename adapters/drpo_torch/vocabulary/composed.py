"""A policy loss under `torch.compile`, in one graph: log-probs by an operator, and the loss of them, which is traced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drpo_core.loss import reduction_of
from drpo_core.reduction import reduction_coefficients
from drpo_torch.engines._namespace import namespace
from drpo_torch.loss import policy_loss
from drpo_torch.vocabulary.batch import VocabularyLoss
from drpo_torch.vocabulary.divergences import TopK, full_divergences, top_k_rows
from drpo_torch.vocabulary.recorded import FullDivergence, TopKDivergence

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_torch.vocabulary.batch import Arguments
    from drpo_torch.vocabulary.log_prob import TokenLogProb

__all__ = ["composed", "is_composable"]


def is_composable(given: Arguments, group: object, logits: torch.Tensor | None = None) -> bool:
    """Whether the loss is a function of log-probs, that is traced now."""
    if not torch.compiler.is_compiling() or group is not None or given.centering is not None:
        return False
    record = given.divergence
    return (
        record is None
        or isinstance(record, torch.Tensor)
        or (isinstance(record, FullDivergence) and isinstance(record.behavior, torch.Tensor) and logits is not None)
        # ids outside a support are found by looking
        or (isinstance(record, TopKDivergence) and given.support is None)
    )


def composed(given: Arguments, log_probs: Callable[..., TokenLogProb], logits: torch.Tensor | None = None) -> VocabularyLoss:
    """The loss of the log-probs that a function of `top_k_ids` and `entropy` gives; logits are for a `FullDivergence`."""
    record = given.divergence
    top_k_ids = record.ids if isinstance(record, TopKDivergence) else None
    found = log_probs(top_k_ids=top_k_ids, entropy=given.entropy or given.entropy_coefficient != 0.0)
    log_prob, divergence = found.log_prob, record if isinstance(record, torch.Tensor) else None
    if isinstance(record, TopKDivergence) and found.top_k_log_prob is not None:
        policy = TopK(log_prob.detach(), found.top_k_log_prob.detach())
        behavior = TopK(given.behavior_log_prob.detach(), record.behavior_log_prob.detach())
        divergence = getattr(top_k_rows(given.tokens, record.ids, policy, behavior), record.kind)
    if isinstance(record, FullDivergence) and isinstance(record.behavior, torch.Tensor) and logits is not None:
        step = {"support": given.support, "vocabulary_size": given.vocabulary_size, "engine": given.engine}
        pair: dict[str, Any] = {"logits": logits.detach(), "behavior_logits": record.behavior, **step}
        both = full_divergences(**pair, temperature=given.temperature, behavior_temperature=record.temperature)
        divergence = getattr(both, record.kind)
    options: dict[str, Any] = {
        "normalizer": given.normalizer,
        "token_weights": given.token_weights,
        "segment_ids": given.segment_ids,
    }
    loss, diagnostics = policy_loss(
        given.objective,
        log_prob=log_prob,
        behavior_log_prob=given.behavior_log_prob,
        advantages=given.advantages,
        mask=given.mask,
        proximal_log_prob=given.proximal_log_prob,
        reference_log_prob=given.reference_log_prob,
        reduction=given.reduction,
        divergence=divergence,
        diagnostics=given.diagnostics,
        engine=given.engine,
        **options,
    )
    if given.entropy_coefficient and found.entropy is not None:
        reduction, dtype = reduction_of(given.objective, given.reduction), found.entropy.dtype
        coefficients = reduction_coefficients(reduction, given.mask, dtype=dtype, **options, xp=namespace())
        bonus = torch.where(given.mask, coefficients * found.entropy, 0.0).sum()
        loss = loss - given.entropy_coefficient * bonus
    entropy = found.entropy.detach() if given.entropy and found.entropy is not None else None
    return VocabularyLoss(loss, diagnostics, log_prob.detach(), entropy)
