"""Checks of tensors: each error names the argument, what was given and what was expected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from drpo_torch._host import is_waited_for
from drpo_torch.autograd import is_transformed

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "check_ids",
    "check_logits",
    "check_shape",
    "check_tensor",
    "check_tensors",
    "check_top_k_ids",
    "check_untransformed",
    "looks_at_values",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(**tensors: object) -> None:
    """Raise for what is neither a tensor nor None; the keywords name them in errors."""
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(_not_a_tensor(name, tensor, "a torch.Tensor"))


def check_tensor(name: str, value: object, kind: str = "real floating", *, beside: torch.Tensor | None = None) -> torch.Tensor:
    """The value, if it is a dense tensor of one kind of dtype ("real floating", "integral", "bool"), on `beside`'s device."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(_not_a_tensor(name, value, f"a torch.Tensor of {kind} dtype"))
    if not _is_of_kind(value.dtype, kind):
        hint = "; pass `mask != 0` (per-token weights belong in token_weights)" if kind == "bool" else ""
        msg = f"{name}: expected {'an' if kind == 'integral' else 'a'} {kind} dtype, got {value.dtype}{hint}"
        raise TypeError(msg)
    if hasattr(value, "full_tensor"):
        msg = f"{name}: expected a plain tensor, got a {type(value).__name__}; gather it with {name}.full_tensor()"
        raise TypeError(msg)
    if value.layout != torch.strided:
        msg = f"{name}: expected a dense tensor, got layout {value.layout}"
        raise TypeError(msg)
    if beside is not None and value.device != beside.device:
        msg = f"{name}: expected a tensor on {beside.device}, where the others are, got one on {value.device}"
        raise ValueError(msg)
    return value


def check_logits(logits: object, *, may_be_empty: bool = False) -> torch.Tensor:
    """The logits, if they are a floating-point tensor (…, V) with V of 1 or more, or of 0 where other ranks hold the rest."""
    logits = check_tensor("logits", logits)
    if logits.ndim == 0 or (logits.shape[-1] == 0 and not may_be_empty):
        msg = f"logits: expected shape (…, V) with V of 1 or more, got {tuple(logits.shape)}"
        raise ValueError(msg)
    return logits


def check_shape(name: str, tensor: torch.Tensor, shape: Sequence[int], of: str) -> None:
    """Raise unless the tensor has exactly this shape, which is that of `of`: nothing is broadcast."""
    if tuple(tensor.shape) != tuple(shape):
        hint = ""
        if name == "advantages" and tensor.ndim == 1:
            hint = "; per-sequence advantages are expanded with expand_advantages(advantages, mask)"
        msg = f"{name}: expected the shape of {of}, {tuple(shape)}, got {tuple(tensor.shape)}{hint}"
        raise ValueError(msg)


def check_top_k_ids(name: str, ids: torch.Tensor, leading: Sequence[int]) -> None:
    """Raise unless there are K ids at each token."""
    if ids.ndim == 0:
        msg = f"{name}: expected shape (…, K), got ()"
        raise ValueError(msg)
    check_shape(name, ids, (*leading, ids.shape[-1]), "the tokens and one more axis, K")


def check_ids(name: str, ids: torch.Tensor, vocabulary: int, *, valid: torch.Tensor | None = None) -> None:
    """Raise for ids outside [0, vocabulary) at valid positions, naming the first.

    Only on the CPU: elsewhere this would wait for the device, whose `gather` asserts the same.
    """
    if not looks_at_values(ids) or ids.numel() == 0:
        return
    low, high = ids.to(torch.int64).aminmax()
    if low >= 0 and high < vocabulary:
        return
    wrong = (ids < 0) | (ids >= vocabulary)
    if valid is not None:
        wrong &= valid if wrong.ndim == valid.ndim else valid[..., None]
    if not wrong.any():
        return
    where = tuple(wrong.nonzero()[0].tolist())
    hint = ""
    if valid is None and name == "tokens":
        hint = "; where there is no token, give any id of the vocabulary (tokens.clamp(min=0)) and mask the result"
    msg = (
        f"{name}: expected ids in [0, {vocabulary}){'' if valid is None else ' at valid positions'}, "
        f"got {int(ids[where])} at index {where} ({int(wrong.sum())} such){hint}"
    )
    raise ValueError(msg)


def looks_at_values(tensor: torch.Tensor) -> bool:
    """Whether a check may read values: only on the CPU, of plain tensors, because elsewhere it would wait for the device."""
    if torch.compiler.is_compiling() or is_waited_for(tensor):
        return False
    return type(tensor) is torch.Tensor and not is_transformed(tensor)


def check_untransformed(name: str, tensor: torch.Tensor) -> None:
    """Raise for a tensor that a transform of torch.func or forward-mode differentiation looks through."""
    if torch.compiler.is_compiling():
        return
    if is_transformed(tensor):
        msg = (
            f"{name}: expected a plain tensor, got one inside torch.func.vmap, grad, jvp or another transform, which can't "
            "look into this function; differentiate it by backward or torch.autograd.grad, and loop instead of vmap"
        )
        raise RuntimeError(msg)
    # there is no public test
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call] # noqa: SLF001
        msg = f"{name}: expected a tensor without a tangent: forward-mode differentiation is not implemented"
        raise RuntimeError(msg)


def _is_of_kind(dtype: torch.dtype, kind: str) -> bool:
    if kind == "real floating":
        return dtype in _FLOATS
    if kind == "bool":
        return dtype == torch.bool
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _not_a_tensor(name: str, value: object, expected: str) -> str:
    kind = type(value)
    got = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{name}: expected {expected}, got {got}"
