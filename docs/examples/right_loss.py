"""DPPO Binary-TV: `wrong_loss.py` without its three mistakes. Everything that applies passes `drpo check`."""

import torch

DELTA = 0.25


def policy_loss(
    logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    num_items_in_batch: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over tokens of −A·r where the token is in the trust region, and metrics."""
    # masked inputs are replaced before anything is computed from them: their gradient is exactly 0 then
    logprobs, rollout_logprobs, advantages = (
        torch.where(response_mask, tensor, 0.0) for tensor in (logprobs, rollout_logprobs, advantages)
    )
    log_ratio = (logprobs - rollout_logprobs).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()

    with torch.no_grad():
        shift = logprobs.exp() - rollout_logprobs.exp()
        # a token exactly on the boundary is kept
        inside = shift.abs() <= DELTA
        keep = response_mask & (inside | (advantages * shift <= 0))

    per_token = torch.where(keep, -advantages * ratio, 0.0)
    # the trainer's count for the whole batch if it gives one, else this batch's own, which may be 0
    count = response_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return per_token.sum() / count, {"kept": keep.sum()}
