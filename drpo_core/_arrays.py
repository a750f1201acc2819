"""Array types: a signature states its shapes, which are checked at run time in this project's tests only.

`Array` is whatever the caller's namespace calls an array. jaxtyping is used at run time only if something
imported it first (the tests do), so `drpo_core` itself depends on it for type checking alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

__all__ = ["Array", "Bool", "Float", "Int", "Namespace", "Spread", "in_one_piece", "taken_along_rows"]

Array: TypeAlias = Any
Namespace: TypeAlias = Any
Spread: TypeAlias = Callable[[Callable[[int, int], None], int, int], None]
"""``spread(run, count, threads)`` calls ``run(first, last)`` for shares that cover ``range(count)``, on several threads."""

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int
else:

    class _Unchecked:
        def __class_getitem__(cls, item: object) -> object:
            return Any

    Bool = Float = Int = _Unchecked


def in_one_piece(array: Array, *, xp: Namespace) -> Array:
    """The array with all its elements on every device, side by side, to be sorted or indexed.

    JAX refuses both along an axis that is divided over an Explicit mesh axis, the default of `jax.make_mesh`; torch warns
    of copies where strides are not those of a contiguous tensor. Any other array is returned as it is.
    """
    if hasattr(array, "contiguous"):
        return array.contiguous()
    sharding: Any = getattr(getattr(array, "aval", None), "sharding", None)
    spec: Any = getattr(sharding, "spec", None)
    if spec is None or not any(spec):
        return array
    return xp.asarray(array, device=type(sharding)(sharding.mesh, type(spec)()))


def taken_along_rows(array: Array, indices: Array, *, xp: Namespace) -> Array:
    """The elements at some indices along the last axis; the other axes are the same.

    Torch's own `take_along_dim`, which array-api-compat calls, makes `torch.compile` trace anew for each number of indices.
    """
    if hasattr(array, "gather"):
        return array.gather(-1, indices.long())
    return xp.take_along_axis(array, indices, axis=-1)
