"""What `jax.shard_map` and explicit mesh axes ask of a function that sorts, gathers and loops over tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_auto_mode", "is_explicitly_sharded", "varying_like"]


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


def varying_like(tokens: jax.Array, array: jax.Array) -> jax.Array:
    """Under shard_map, a replicated array as one that varies as the tokens do: its gradient is then summed over them."""
    axes = jax.typeof(tokens).manual_axis_type.varying - jax.typeof(array).manual_axis_type.varying
    return jax.lax.pcast(array, tuple(axes), to="varying") if axes else array
