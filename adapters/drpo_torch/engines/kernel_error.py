"""What is said of a Triton kernel that does not hold where it is tried."""

from __future__ import annotations

import warnings
from importlib.metadata import version

import torch

from drpo_core import SlowEngineWarning, UntraceableError

__all__ = ["NOT_TRIED", "KernelError", "is_captured", "warn_of"]

NOT_TRIED = "has not been tried yet, and can't be while a CUDA graph is captured"


class KernelError(UntraceableError):
    """A kernel that fails here, or gives other numbers than the array expression."""

    def __init__(self, finding: str) -> None:
        """What was found."""
        super().__init__("a Triton kernel", finding)


def is_captured(device: torch.device) -> bool:
    """Whether the work of the device is being recorded, so that nothing may wait for it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def warn_of(kernel: str, device: torch.device, dtype: torch.dtype, finding: str) -> None:
    """Say once what was found, and how to report it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    msg = (
        f"{kernel} for {dtype} on {name} {finding}; array operations run instead. Please report this line, of torch "
        f"{torch.__version__} and Triton {version('triton')} (DRPO_COMPILED=0 turns all compiled engines off)"
    )
    warnings.warn(msg, SlowEngineWarning, stacklevel=2)
