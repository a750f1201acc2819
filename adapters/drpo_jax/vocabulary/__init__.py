"""Losses, log-probs and divergences from logits (…, V) or from the LM head, which never form a log-softmax of all tokens."""

from drpo_jax.vocabulary.centering import FullCentering, TopKCentering
from drpo_jax.vocabulary.divergences import (
    Divergences,
    FullDivergence,
    LinearHead,
    TopKDivergence,
    full_divergences,
    top_k_divergences,
)
from drpo_jax.vocabulary.linear import linear_policy_loss
from drpo_jax.vocabulary.log_prob import TokenLogProb, linear_log_prob, token_log_prob
from drpo_jax.vocabulary.logits import VocabularyLoss, logits_policy_loss
from drpo_jax.vocabulary.support import Support

__all__ = [
    "Divergences",
    "FullCentering",
    "FullDivergence",
    "LinearHead",
    "Support",
    "TokenLogProb",
    "TopKCentering",
    "TopKDivergence",
    "VocabularyLoss",
    "full_divergences",
    "linear_log_prob",
    "linear_policy_loss",
    "logits_policy_loss",
    "token_log_prob",
    "top_k_divergences",
]
