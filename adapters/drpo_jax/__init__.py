"""JAX adapter of drpo-core: the same losses as differentiable functions of JAX arrays.

At vocabulary scale, they start from logits or from hidden states and never keep a log-softmax of all tokens.
"""

from drpo_jax.divergence import (
    Divergences,
    FullDivergence,
    LinearHead,
    TopKDivergence,
    full_divergences,
    top_k_divergences,
)
from drpo_jax.linear import linear_policy_loss
from drpo_jax.loss import policy_loss, token_loss
from drpo_jax.vocabulary import SelectedLogProb, VocabularyLoss, logits_policy_loss, selective_log_prob

__all__ = [
    "Divergences",
    "FullDivergence",
    "LinearHead",
    "SelectedLogProb",
    "TopKDivergence",
    "VocabularyLoss",
    "full_divergences",
    "linear_policy_loss",
    "logits_policy_loss",
    "policy_loss",
    "selective_log_prob",
    "token_loss",
    "top_k_divergences",
]
