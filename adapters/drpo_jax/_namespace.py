"""The namespaces of the formulas: jax.numpy, with functions of which XLA makes faster code on a CPU, or elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from drpo_core import _series

if TYPE_CHECKING:
    from drpo_core._arrays import Namespace

__all__ = ["unreduced", "xp"]

_BYTES = 64
"""How many conditions are added up in a byte: fewer than 128, so that the sum can't overflow."""


class _Namespace:
    """jax.numpy but for `expm1` and `count_nonzero`."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 -- whatever jax.numpy has
        return getattr(jnp, name)

    @staticmethod
    def expm1(x: jax.Array) -> jax.Array:
        """e^x − 1. XLA's own, tanh(x/2)(e^x + 1), takes twice the time and is no more accurate."""
        result: jax.Array = _series.expm1(x, double=x.dtype.itemsize == 8, xp=jnp)
        return result

    @staticmethod
    def count_nonzero(condition: jax.Array) -> jax.Array:
        """Number of True elements. They are first added up as bytes, because XLA writes what it widens to memory."""
        ones = condition.astype(jnp.int8)
        if condition.shape and condition.shape[-1] % _BYTES == 0:
            # rows of bytes: columns add up a bare mask in half the time, but slow the loop of a computed condition down
            ones = ones.reshape(*condition.shape[:-1], condition.shape[-1] // _BYTES, _BYTES).sum(axis=-1, dtype=jnp.int8)
        return jnp.sum(ones, dtype=jnp.int32)


class _Unreduced:
    """jax.numpy, where what would be summed, counted or compared over all tokens stays the figure of each."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 -- whatever jax.numpy has
        return getattr(jnp, name)

    @staticmethod
    def sum(x: jax.Array) -> jax.Array:
        """The terms of the sum."""
        return x

    @staticmethod
    def max(x: jax.Array) -> jax.Array:
        """The candidates."""
        return x

    @staticmethod
    def count_nonzero(condition: jax.Array) -> jax.Array:
        """The conditions."""
        return condition


xp: Namespace = _Namespace()
unreduced: Namespace = _Unreduced()
