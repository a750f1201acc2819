"""Anchors that are not the behaviour policy's own log-probs."""

from __future__ import annotations

import torch

__all__ = ["sequence_anchor"]


def sequence_anchor(log_prob: torch.Tensor, behavior_log_prob: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log π − mean ℓ: the anchor to which every token has the mean log-ratio of its sequence, the last axis.

    With `drpo_core.PPOClip` this is GSPO (arXiv:2507.18071, eq. 14).
    """
    log_ratio = torch.where(mask, log_prob - behavior_log_prob, 0.0)
    mean = log_ratio.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return (log_prob - mean).detach()
