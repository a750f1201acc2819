"""Checks of arrays and numbers that JAX can make while it traces, and the dtype of the arithmetic."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from drpo_core._checks import check_dtype, compute_dtype

__all__ = ["check_float", "check_integers", "check_jax_arrays", "check_positive", "check_shape", "working_dtype"]


def check_jax_arrays(**arrays: object) -> None:
    """Raise for what is neither a JAX array nor None; the core names a None that it can't do without."""
    for name, array in arrays.items():
        if array is not None and not isinstance(array, jax.Array):
            msg = f"{name}: expected a jax.Array, got {type(array).__name__}"
            raise TypeError(msg)


def check_float(**arrays: object) -> None:
    """Raise for what is not a JAX array of real floating-point numbers."""
    _check_kind("real floating", arrays)


def check_integers(**arrays: object) -> None:
    """Raise for what is not a JAX array of integers."""
    _check_kind("integral", arrays)


def check_shape(name: str, array: jax.Array, expected: tuple[int, ...]) -> None:
    """Raise unless the array has exactly this shape: nothing is broadcast."""
    if array.shape != expected:
        msg = f"{name}: expected shape {expected}, got {array.shape}"
        raise ValueError(msg)


def check_positive(**numbers: float | None) -> None:
    """Raise for a number that is not finite and positive."""
    for name, number in numbers.items():
        if number is not None and not 0.0 < number < math.inf:
            msg = f"{name}: expected a finite number greater than 0, got {number!r}"
            raise ValueError(msg)


def working_dtype(*arrays: jax.Array) -> type[Any]:
    """Dtype of the arithmetic: the arrays' own, but float32 at least."""
    return compute_dtype(*arrays, xp=jnp)  # type: ignore[return-value]


def _check_kind(kind: str, arrays: dict[str, object]) -> None:
    check_jax_arrays(**arrays)
    for name, array in arrays.items():
        check_dtype(name, array, kind, xp=jnp)
