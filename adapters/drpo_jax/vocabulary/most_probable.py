"""The K most probable tokens of rows of logits, over the devices that divide the vocabulary.

The order is that of the head's output z, which a soft-cap and a temperature keep: rounded logits x may be equal where z are
not. Of equal z, the lower id is first, whichever device each is on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from drpo_jax.vocabulary.row_map import Rows

__all__ = ["most_probable"]


def most_probable(z: jax.Array, rows: Rows, count: int, *, softcap: float | None = None) -> jax.Array:
    """Ids (…, K) of the most probable columns of rows z (…, V), or of a device's part of them, as int32; constants.

    Ids outside the support come after all that have a probability.
    """
    shard, width = rows.shard, z.shape[-1]
    # which of −0 and 0, or of NaN and −∞, is larger depends on the device
    z = jax.lax.stop_gradient(jnp.where(jnp.isnan(z), jnp.inf, jnp.where(z == 0.0, 0.0, z)))
    if softcap is not None:
        # to which −∞ is −cap, with a probability
        z = jnp.maximum(z, jnp.finfo(z.dtype).min)  # type: ignore[no-untyped-call]
    values, ids = jax.lax.top_k(rows.restricted(z), min(count, width))
    if shard.axis is None:
        return ids
    values, ids = shard.side_by_side(values), shard.side_by_side(ids + shard.start(width))
    _, ids = jax.lax.sort((-values, ids), num_keys=2)
    return ids[..., :count]
