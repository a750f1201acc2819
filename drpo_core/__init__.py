"""Policy-loss math for off-policy reinforcement learning of language models.

Ratio clipping (PPO, GRPO, CISPO, SPO), divergence masks (DPPO) and the divergence regulariser DRPO
(arXiv:2606.09821), each with its loss, gradient weight and gradient, on any Array-API namespace.
"""

from drpo_core.advantages import expand_advantages, group_advantages
from drpo_core.cispo import cispo_loss, cispo_weight
from drpo_core.diagnostics import (
    EffectiveSampleSize,
    Maximum,
    Mean,
    Minimum,
    diagnostics,
    merge_diagnostics,
    summarize,
)
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
from drpo_core.dppo import dppo_loss, dppo_weight
from drpo_core.drpo import drpo_loss, drpo_weight, mask_drpo_loss, mask_drpo_weight
from drpo_core.gradient import TokenLoss, token_loss_and_gradient
from drpo_core.objectives import CISPO, DPPO, DRPO, SPO, MaskDRPO, Objective, PolicyGradient, PPOClip
from drpo_core.policy_gradient import policy_gradient_loss, policy_gradient_weight
from drpo_core.policy_loss import PolicyLoss, policy_loss_and_gradient
from drpo_core.ppo import ppo_clip_loss, ppo_clip_weight
from drpo_core.ratio import Tokens, importance_ratio, log_ratio, probability_shift
from drpo_core.reduction import (
    MaskedSum,
    masked_sum,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
)
from drpo_core.spo import spo_loss, spo_weight
from drpo_core.thresholds import VacuousTrustRegionWarning
from drpo_core.validation import BehaviorPolicyWarning, validate

__version__ = "0.1.0"

__all__ = [
    "CISPO",
    "DPPO",
    "DRPO",
    "SPO",
    "BehaviorPolicyWarning",
    "EffectiveSampleSize",
    "MaskDRPO",
    "MaskedSum",
    "Maximum",
    "Mean",
    "Minimum",
    "Objective",
    "PPOClip",
    "PolicyGradient",
    "PolicyLoss",
    "TokenLoss",
    "Tokens",
    "VacuousTrustRegionWarning",
    "__version__",
    "binary_kl",
    "binary_tv",
    "cispo_loss",
    "cispo_weight",
    "diagnostics",
    "dppo_loss",
    "dppo_weight",
    "drpo_loss",
    "drpo_weight",
    "expand_advantages",
    "full_kl",
    "full_tv",
    "group_advantages",
    "importance_ratio",
    "k1",
    "k2",
    "k3",
    "log_ratio",
    "mask_drpo_loss",
    "mask_drpo_weight",
    "masked_sum",
    "merge_diagnostics",
    "policy_gradient_loss",
    "policy_gradient_weight",
    "policy_loss_and_gradient",
    "ppo_clip_loss",
    "ppo_clip_weight",
    "probability_shift",
    "sampled_in_top_k",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "spo_loss",
    "spo_weight",
    "summarize",
    "token_loss_and_gradient",
    "token_mean",
    "top_k_kl",
    "top_k_tv",
    "validate",
]
