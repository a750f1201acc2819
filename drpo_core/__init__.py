"""Policy-loss math for off-policy reinforcement learning of language models.

Ratio clipping (PPO, GRPO, CISPO, SPO), divergence masks (DPPO) and the divergence regulariser DRPO
(arXiv:2606.09821), each with its loss, gradient weight and gradient, on any Array-API namespace.
"""

from drpo_core.advantages import expand_advantages, group_advantages
from drpo_core.diagnostics import merge_diagnostics, summarize, token_diagnostics
from drpo_core.divergence import (
    binary_kl,
    binary_tv,
    full_kl,
    full_tv,
    k1,
    k2,
    k3,
    sampled_in_top_k,
    top_k_kl,
    top_k_tv,
)
from drpo_core.engines import UntraceableError
from drpo_core.loss import PolicyLoss, SlowEngineWarning, TokenLoss, policy_loss_and_gradient, token_loss_and_gradient
from drpo_core.objectives import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    Objective,
    PolicyGradient,
    PPOClip,
    VacuousTrustRegionWarning,
)
from drpo_core.reduction import sequence_mean_token_mean, sequence_mean_token_sum, token_mean
from drpo_core.tokens import Tokens, importance_ratio, log_ratio, probability_shift
from drpo_core.validation import BehaviorPolicyWarning, validate

__version__ = "0.1.0"

__all__ = [
    "CISPO",
    "DPPO",
    "DRPO",
    "SPO",
    "BehaviorPolicyWarning",
    "MaskDRPO",
    "Objective",
    "PPOClip",
    "PolicyGradient",
    "PolicyLoss",
    "SlowEngineWarning",
    "TokenLoss",
    "Tokens",
    "UntraceableError",
    "VacuousTrustRegionWarning",
    "__version__",
    "binary_kl",
    "binary_tv",
    "expand_advantages",
    "full_kl",
    "full_tv",
    "group_advantages",
    "importance_ratio",
    "k1",
    "k2",
    "k3",
    "log_ratio",
    "merge_diagnostics",
    "policy_loss_and_gradient",
    "probability_shift",
    "sampled_in_top_k",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "summarize",
    "token_diagnostics",
    "token_loss_and_gradient",
    "token_mean",
    "top_k_kl",
    "top_k_tv",
    "validate",
]
