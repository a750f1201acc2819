"""What depends on the device that a tensor is on: whether the host may look at values without waiting; autocast."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ["is_waited_for", "without_autocast"]

HOST_DEVICES = {"cpu"}


def is_waited_for(place: torch.Tensor | torch.device) -> bool:
    """Whether the host would wait for a device to learn a value of this tensor, or on this device."""
    device = place.device if isinstance(place, torch.Tensor) else place
    return device.type not in HOST_DEVICES


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which operations keep the dtypes that they are given."""
    # some devices, such as that of tensors without values, have no autocast
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
