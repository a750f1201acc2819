"""JAX adapter of drpo-core: the same losses as differentiable functions of JAX arrays.

At vocabulary scale, they start from logits or from hidden states and never keep a log-softmax of all tokens.
"""

from drpo_jax._reduction import linear_reduction
from drpo_jax.centering import score_centering
from drpo_jax.loss import policy_loss, token_loss
from drpo_jax.vocabulary import (
    Divergences,
    FullCentering,
    FullDivergence,
    LinearHead,
    Support,
    TokenLogProb,
    TopKCentering,
    TopKDivergence,
    VocabularyLoss,
    full_divergences,
    linear_log_prob,
    linear_policy_loss,
    logits_policy_loss,
    token_log_prob,
    top_k_divergences,
)

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
    "linear_reduction",
    "logits_policy_loss",
    "policy_loss",
    "score_centering",
    "token_log_prob",
    "token_loss",
    "top_k_divergences",
]
