"""Checks of tensors that can be made without reading a value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["check_float", "check_integral", "check_mask", "check_same_shape", "check_tensors"]


def check_tensors(**tensors: object) -> None:
    """Raise for what is neither a tensor nor None; the keywords name them in errors."""
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(_not_a_tensor(name, tensor))


def check_float(**tensors: object) -> None:
    """Raise unless each is a floating-point tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(_not_a_tensor(name, tensor))
        if not tensor.is_floating_point():
            msg = f"{name}: expected a real floating dtype, got {tensor.dtype}"
            raise TypeError(msg)


def check_integral(**tensors: object) -> None:
    """Raise unless each is a tensor of integers."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(_not_a_tensor(name, tensor))
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            msg = f"{name}: expected an integral dtype, got {tensor.dtype}"
            raise TypeError(msg)


def check_mask(mask: object, reference_name: str, reference: Sequence[int] | torch.Tensor) -> None:
    """Raise unless the mask is boolean and has exactly this shape."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(_not_a_tensor("mask", mask))
    if mask.dtype != torch.bool:
        msg = f"mask: expected a bool dtype, got {mask.dtype}; pass `mask != 0` (per-token weights belong in token_weights)"
        raise TypeError(msg)
    check_same_shape("mask", mask, reference_name, reference)


def check_same_shape(name: str, tensor: torch.Tensor, reference_name: str, reference: Sequence[int] | torch.Tensor) -> None:
    """Raise unless the tensor has exactly this shape: nothing is broadcast."""
    expected = tuple(reference.shape if isinstance(reference, torch.Tensor) else reference)
    if tuple(tensor.shape) != expected:
        msg = f"{name}: expected the shape of {reference_name}, {expected}, got {tuple(tensor.shape)}"
        raise ValueError(msg)


def _not_a_tensor(name: str, value: object) -> str:
    return f"{name}: expected a torch.Tensor, got {type(value).__name__}"
