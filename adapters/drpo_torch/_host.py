"""Where it costs nothing that the host looks at values; elsewhere it would wait for a device."""

from __future__ import annotations

import torch

__all__ = ["is_waited_for"]

HOST_DEVICES = {"cpu"}


def is_waited_for(place: torch.Tensor | torch.device) -> bool:
    """Whether the host would wait for a device to learn a value of this tensor, or on this device."""
    device = place.device if isinstance(place, torch.Tensor) else place
    return device.type not in HOST_DEVICES
