"""DPPO Binary-TV as it is often written, with three deliberate mistakes for `drpo check` to find.

The same loss without them is `right_loss.py`. What the command says of both is in `docs/verify.md`.
"""

import torch

DELTA = 0.25


def policy_loss(
    logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    num_items_in_batch: float | None = None,  # noqa: ARG001 -- mistake 3
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over tokens of −A·r where the token is in the trust region, and metrics."""
    log_ratio = (logprobs - rollout_logprobs).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()

    with torch.no_grad():
        shift = logprobs.exp() - rollout_logprobs.exp()
        # mistake 1: strict; a token exactly on the boundary is dropped
        inside = shift.abs() < DELTA
        keep = inside | (advantages * shift <= 0)

    # mistake 2: the mask is multiplied in; 0 · NaN is NaN
    per_token = -advantages * ratio * keep * response_mask
    # mistake 3: the denominator is this micro-batch's; num_items_in_batch is accepted and not used
    loss = per_token.sum() / response_mask.sum().clamp(min=1)
    return loss, {"kept": (keep * response_mask).sum()}
