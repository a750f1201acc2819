"""PyTorch adapter of drpo-core: the same losses as differentiable functions of torch tensors.

At vocabulary scale, they start from logits or from hidden states and never form a log-softmax of all tokens.
"""

from drpo_torch.batch import VocabularyLoss
from drpo_torch.divergence import (
    Divergences,
    FullDivergence,
    LinearHead,
    TopKDivergence,
    full_divergences,
    top_k_divergences,
)
from drpo_torch.linear import linear_policy_loss
from drpo_torch.loss import linear_reduction, policy_loss, token_loss
from drpo_torch.vocabulary import SelectedLogProb, logits_policy_loss, selective_log_prob

__all__ = [
    "Divergences",
    "FullDivergence",
    "LinearHead",
    "SelectedLogProb",
    "TopKDivergence",
    "VocabularyLoss",
    "full_divergences",
    "linear_policy_loss",
    "linear_reduction",
    "logits_policy_loss",
    "policy_loss",
    "selective_log_prob",
    "token_loss",
    "top_k_divergences",
]
