"""A vocabulary that `jax.shard_map` divides over devices: each has as many columns, in the order of the mesh axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from drpo_jax._sharding import varying_axes

__all__ = ["WHOLE", "Shard"]

if TYPE_CHECKING:
    from typing import TypeAlias

    Axis: TypeAlias = str | tuple[str, ...]


@jax.tree_util.register_static
@dataclass(frozen=True, slots=True)
class Shard:
    """A device's part of the vocabulary along mesh axes; all of it where there are none. Ids count from 0 in the whole."""

    axis: Axis | None = None

    @classmethod
    def of(cls, axis: object, divided: dict[str, Any], replicated: dict[str, Any]) -> Shard:
        """Raise unless the divided arrays differ along the axis, and those that devices have in common don't."""
        if axis is None:
            return WHOLE
        axes = axis if isinstance(axis, tuple) else (axis,)
        if not axes or not all(isinstance(name, str) for name in axes):
            msg = f"vocabulary_axis: expected the name of a mesh axis, a tuple of names or None, got {axis!r}"
            raise TypeError(msg)
        for name, array in divided.items():
            if array is not None and not set(axes) <= varying_axes(array):
                msg = (
                    f"{name}: expected a part of the vocabulary on each device of vocabulary_axis={axis!r}, inside a "
                    f"jax.shard_map with check_vma=True, got an array that varies along {sorted(varying_axes(array))}"
                )
                raise ValueError(msg)
        for name, arrays in replicated.items():
            if set(axes) & varying_axes(arrays):
                msg = (
                    f"{name}: expected the same on each device of vocabulary_axis={axis!r}, got an array that varies along it"
                )
                raise ValueError(msg)
        return cls(axis)  # type: ignore[arg-type]

    @property
    def axes(self) -> frozenset[str]:
        """Names of its mesh axes."""
        return frozenset() if self.axis is None else frozenset(self.axis if isinstance(self.axis, tuple) else (self.axis,))

    def vocabulary(self, width: int) -> int:
        """The size of the whole vocabulary, from that of this device's part."""
        return width if self.axis is None else width * jax.lax.axis_size(self.axis)

    def start(self, width: int) -> jax.Array | int:
        """The id of this device's first column."""
        return 0 if self.axis is None else jax.lax.axis_index(self.axis) * width

    def part(self, rows: jax.Array, width: int) -> jax.Array:
        """The device's columns of rows of the whole vocabulary."""
        return rows if self.axis is None else jax.lax.dynamic_slice_in_dim(rows, self.start(width), width, axis=rows.ndim - 1)

    def local(self, ids: jax.Array, width: int) -> jax.Array:
        """Ids counted from this device's first column: outside [0, width) where another has them."""
        return ids if self.axis is None else ids - self.start(width)

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over devices."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)  # type: ignore[no-untyped-call]

    def side_by_side(self, x: jax.Array) -> jax.Array:
        """What the devices have, (…, k), one after the other on each of them, (…, devices · k)."""
        if self.axis is None:
            return x
        k = x.shape[-1]
        room = jnp.zeros_like(x, shape=(*x.shape[:-1], k * jax.lax.axis_size(self.axis)))
        # a sum, because what is gathered would not count as the same on all devices
        return self.total(jax.lax.dynamic_update_slice_in_dim(room, x, jax.lax.axis_index(self.axis) * k, x.ndim - 1))

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest over devices; a constant."""
        x = jax.lax.stop_gradient(x)
        return x if self.axis is None else jax.lax.pmax(x, self.axis)  # type: ignore[no-untyped-call]

    def log_softmax(self, x: jax.Array) -> jax.Array:
        """Log-probs of rows (…, V)."""
        if self.axis is None:
            return jax.nn.log_softmax(x)
        shifted = x - self.largest(jnp.max(x, axis=-1, keepdims=True))
        return shifted - jnp.log(self.total(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)))


WHOLE = Shard()
