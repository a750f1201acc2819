"""What `jax.shard_map` and explicit mesh axes ask of a function that sorts, gathers and loops over tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_auto_mode", "is_explicitly_sharded", "varying_axes", "varying_like"]


def is_explicitly_sharded(*arrays: Any) -> bool:  # noqa: ANN401 -- pytrees
    """Whether an array is divided along a mesh axis whose type is Explicit, as those of `jax.make_mesh` are by default."""
    return any(any(jax.typeof(leaf).sharding.spec) for leaf in jax.tree.leaves(arrays))


def in_auto_mode(function: Callable[..., tuple[Any, Any]], rows: jax.Array, *arrays: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """``function(rows, *arrays)``, with XLA choosing the shardings within it where mesh axes are Explicit.

    There, JAX refuses to sort along a divided axis or to index it. The function returns a pytree of 0-d arrays, which
    are the same on all devices, and one of arrays that have the axes of `rows` but the last, divided as those are.
    """
    leaves = [leaf for leaf in jax.tree.leaves((rows, arrays)) if is_explicitly_sharded(leaf)]
    if not leaves:
        return function(rows, *arrays)
    mesh, spec = jax.typeof(leaves[0]).sharding.mesh, jax.typeof(rows).sharding.spec[:-1]
    out = (NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(*spec)))  # type: ignore[no-untyped-call]
    return jax.sharding.auto_axes(function, out_sharding=out)(rows, *arrays)  # type: ignore[no-any-return]


def varying_axes(arrays: Any) -> frozenset[str]:  # noqa: ANN401 -- a pytree
    """The mesh axes of `shard_map` along which devices have different arrays."""
    every = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(arrays))
    return frozenset().union(*every)


def varying_like(
    tokens: Any,  # noqa: ANN401 -- a pytree
    array: jax.Array,
    *,
    but: frozenset[str] = frozenset(),
) -> jax.Array:
    """Under shard_map, a replicated array as one that varies as the tokens do: its gradient is then summed over them.

    But not along these axes, over which the vocabulary is divided.
    """
    axes = varying_axes(tokens) - varying_axes(array) - but
    return jax.lax.pcast(array, tuple(axes), to="varying") if axes else array
