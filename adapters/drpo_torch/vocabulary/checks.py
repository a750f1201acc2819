"""Checks of the arguments at vocabulary scale: each error names the argument, what was given and what was expected."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from drpo_torch.namespace import is_transformed

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "check_choice",
    "check_count",
    "check_ids",
    "check_logits",
    "check_number",
    "check_shape",
    "check_tensor",
    "check_untransformed",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object, kind: str = "real floating", *, beside: torch.Tensor | None = None) -> torch.Tensor:
    """The value, if it is a dense tensor of one kind of dtype ("real floating", "integral", "bool"), on `beside`'s device."""
    if not isinstance(value, torch.Tensor):
        msg = f"{name}: expected a torch.Tensor of {kind} dtype, got {_type_of(value)}"
        raise TypeError(msg)
    if not _is_of_kind(value.dtype, kind):
        hint = "; pass `mask != 0` (per-token weights belong in token_weights)" if kind == "bool" else ""
        msg = f"{name}: expected {_article(kind)} {kind} dtype, got {value.dtype}{hint}"
        raise TypeError(msg)
    if hasattr(value, "full_tensor"):
        msg = f"{name}: expected a plain tensor, got a {type(value).__name__}; gather it with {name}.full_tensor()"
        raise TypeError(msg)
    if value.layout != torch.strided:
        msg = f"{name}: expected a dense tensor, got layout {value.layout}"
        raise TypeError(msg)
    if beside is not None and value.device != beside.device:
        msg = f"{name}: expected a tensor on {beside.device}, as the others are, got one on {value.device}"
        raise ValueError(msg)
    return value


def check_logits(logits: object) -> torch.Tensor:
    """The logits, if they are a floating-point tensor (…, V) with V of 1 or more."""
    logits = check_tensor("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        msg = f"logits: expected shape (…, V) with V of 1 or more, got {tuple(logits.shape)}"
        raise ValueError(msg)
    return logits


def check_untransformed(name: str, tensor: torch.Tensor) -> None:
    """Raise for a tensor that a transform of torch.func or forward-mode differentiation looks through."""
    if is_transformed(tensor):
        msg = (
            f"{name}: expected a plain tensor, got one inside torch.func.vmap, grad, jvp or another transform, which can't "
            "look into this function; differentiate it by backward or torch.autograd.grad, and loop instead of vmap"
        )
        raise RuntimeError(msg)
    # (it makes a view: not for nothing)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:  # noqa: SLF001 -- no public test
        msg = f"{name}: expected a tensor without a tangent: forward-mode differentiation is not implemented"
        raise RuntimeError(msg)


def check_shape(name: str, tensor: torch.Tensor, shape: Sequence[int], of: str) -> None:
    """Raise unless the tensor has exactly this shape, which is that of `of`."""
    if tuple(tensor.shape) != tuple(shape):
        hint = ""
        if name == "advantages" and tensor.ndim == 1:
            hint = "; per-sequence advantages are expanded with expand_advantages(advantages, mask)"
        msg = f"{name}: expected the shape of {of}, {tuple(shape)}, got {tuple(tensor.shape)}{hint}"
        raise ValueError(msg)


def check_ids(name: str, ids: torch.Tensor, vocabulary: int, *, valid: torch.Tensor | None = None) -> None:
    """Raise for ids outside [0, vocabulary) at valid positions, naming the first.

    Only on the CPU: elsewhere this would wait for the device, whose `gather` asserts the same.
    """
    if type(ids) is not torch.Tensor or ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (ids < 0) | (ids >= vocabulary)
    if valid is not None:
        wrong &= valid if wrong.ndim == valid.ndim else valid[..., None]
    if not wrong.any():
        return
    where = tuple(wrong.nonzero()[0].tolist())
    where_valid = "" if valid is None else " at valid positions"
    hint = ""
    if valid is None and name == "tokens":
        hint = "; where there is no token, give any id of the vocabulary (tokens.clamp(min=0)) and mask the result"
    msg = (
        f"{name}: expected ids in [0, {vocabulary}){where_valid}, got {int(ids[where])} at index {where} "
        f"({int(wrong.sum())} such){hint}"
    )
    raise ValueError(msg)


def check_number(name: str, value: object, *, above: float) -> float:
    """The number as a float; raises unless it is finite and above a bound."""
    # a bool is an int
    if isinstance(value, (int, float)) and not isinstance(value, bool) and above < value < math.inf:
        return float(value)
    msg = f"{name}: expected a finite number greater than {above:g}, got {value!r}"
    raise (ValueError if isinstance(value, (int, float)) else TypeError)(msg)


def check_count(name: str, value: object) -> int:
    """The number as an int; raises unless it is a whole number of 1 or more."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    msg = f"{name}: expected a whole number, 1 or more, got {value!r}"
    raise (ValueError if isinstance(value, (int, float)) else TypeError)(msg)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless the value is one of these words."""
    if value not in choices:
        msg = f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}"
        raise ValueError(msg)


def _is_of_kind(dtype: torch.dtype, kind: str) -> bool:
    if kind == "real floating":
        return dtype in _FLOATS
    if kind == "bool":
        return dtype == torch.bool
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _type_of(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
