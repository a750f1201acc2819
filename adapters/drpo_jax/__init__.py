"""JAX adapter of drpo-core: the same losses as differentiable functions of JAX arrays."""

from drpo_jax.loss import policy_loss, token_loss

__all__ = ["policy_loss", "token_loss"]
