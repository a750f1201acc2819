"""The last step of a backward pass whose gradient was formed in the forward pass."""

from __future__ import annotations

import torch

__all__ = ["scaled_by_cotangent"]


def scaled_by_cotangent(gradient: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    """Gradient times a 0-d cotangent, without a second array of its size if this is its last use."""
    if torch._C._autograd._get_current_graph_task_keep_graph():  # noqa: SLF001 -- the only way to know
        return gradient * cotangent.to(gradient.dtype)
    # reading a number synchronises a device, but costs nothing on the CPU (a fake tensor has none)
    if type(cotangent) is torch.Tensor and cotangent.device.type == "cpu" and cotangent.item() == 1.0:
        return gradient
    return gradient.mul_(cotangent)
