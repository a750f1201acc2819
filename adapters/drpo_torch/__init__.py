"""PyTorch adapter of drpo-core: the same losses as differentiable functions of torch tensors."""

from drpo_torch.loss import policy_loss, token_loss

__all__ = ["policy_loss", "token_loss"]
