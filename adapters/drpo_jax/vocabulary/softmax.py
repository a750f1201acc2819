"""Rows of logits as softmaxes, and their entries at ids, of which some are outside the vocabulary or do not count."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from drpo_jax.vocabulary.shards import WHOLE, Shard

__all__ = [
    "Normalized",
    "at_entries",
    "entries",
    "inside_vocabulary",
    "masked",
    "one_hot",
    "outside_vocabulary",
    "poisoned",
]


class Normalized(NamedTuple):
    """Rows z as a softmax: `shifted` = z − m by the largest entry m, `top` = m, and `log_total` = log Σ e^(z − m).

    log Σ e^z = m + `log_total`, but log π = `shifted` − `log_total`: for logits of some hundreds, z − log Σ e^z would
    have lost its last digits.
    """

    shifted: jax.Array
    top: jax.Array
    log_total: jax.Array
    probability: jax.Array
    shard: Shard

    @classmethod
    def of(cls, z: jax.Array, shard: Shard = WHOLE) -> Normalized:
        """Of rows (…, V), or of a device's part of them."""
        # the maximum of a row of −inf would make NaN of every entry; what is subtracted has no derivative of its own
        top = shard.largest(jnp.max(z, axis=-1, keepdims=True))
        top = jnp.where(top == -jnp.inf, 0.0, top)
        shifted = z - top
        e = jnp.exp(shifted)
        total = shard.total(jnp.sum(e, axis=-1, keepdims=True))
        return cls(shifted, top[..., 0], jnp.log(total)[..., 0], e / total, shard)

    @property
    def entropy(self) -> jax.Array:
        """−Σ π log π, where an entry of probability 0 counts nothing."""
        # selected before multiplying: 0 · −inf is a NaN, which jax_debug_nans would raise for
        expected = jnp.sum(self.probability * jnp.where(self.probability > 0.0, self.shifted, 0.0), axis=-1)
        return self.log_total - self.shard.total(expected)

    @property
    def weighted_log_prob(self) -> jax.Array:
        """π log π of the rows, 0 where π is."""
        # selected before multiplying, as in the entropy
        log_prob = jnp.where(self.probability > 0.0, self.shifted - self.log_total[..., None], 0.0)
        return self.probability * log_prob

    def log_prob(self, chosen: jax.Array) -> jax.Array:
        """log π of entries z (…, C) of the rows."""  # noqa: D403 -- a formula
        return (chosen - self.top[..., None]) - self.log_total[..., None]


def outside_vocabulary(ids: jax.Array, vocabulary: int) -> jax.Array:
    """True where an id is not in [0, vocabulary), whatever its integer type can hold."""
    limits = jnp.iinfo(ids.dtype)  # type: ignore[no-untyped-call]
    outside = jnp.zeros_like(ids, dtype=bool)
    if limits.min < 0:
        outside = ids < 0
    return outside | (ids >= vocabulary) if vocabulary <= limits.max else outside


def inside_vocabulary(ids: jax.Array, vocabulary: int) -> jax.Array:
    """Ids as int32, with 0 for those outside [0, vocabulary): an index, and what the entries of a row are compared with."""
    return jnp.where(outside_vocabulary(ids, vocabulary), 0, ids.astype(jnp.int32))


def entries(rows: jax.Array, ids: jax.Array, mask: jax.Array | None = None, shard: Shard = WHOLE) -> jax.Array:
    """The entries (…, K) of rows (…, V) at ids (…, K): 0 in rows that the mask leaves out, and anything for other ids."""
    width = rows.shape[-1]
    inside = shard.local(inside_vocabulary(ids, shard.vocabulary(width)), width)
    if mask is None and shard.axis is None:
        return jnp.take_along_axis(rows, inside, axis=-1, mode="promise_in_bounds")
    # by an index beyond the row: of rows that are replaced beforehand, a gather would have all written to memory
    here = (inside >= 0) if mask is None else (inside >= 0) & mask[..., None]
    found = jnp.take_along_axis(rows, jnp.where(here, inside, width), axis=-1, mode="fill", fill_value=0.0)
    return shard.total(found)


def one_hot(ids: jax.Array, like: jax.Array) -> jax.Array:
    """True at each row's id, by a comparison: unlike a scatter, it fuses with what follows."""
    return ids[..., None] == jax.lax.broadcasted_iota(ids.dtype, like.shape, like.ndim - 1)


def at_entries(values: jax.Array, ids: jax.Array, like: jax.Array, shard: Shard = WHOLE) -> jax.Array:
    """Rows (…, V) of zeros with the values (…, K) added at ids (…, K), what `entries` is transposed."""
    width = like.shape[-1]
    inside = shard.local(inside_vocabulary(ids, shard.vocabulary(width)), width)
    if ids.shape[-1] == 1:
        return jnp.where(one_hot(inside[..., 0], like), values, 0.0)
    if shard.axis is not None:
        here = (inside >= 0) & (inside < width)
        inside, values = jnp.where(here, inside, 0), jnp.where(here, values, 0.0)
    (rows,) = jax.linear_transpose(lambda rows: entries(rows, inside), like)(values)
    return rows  # type: ignore[no-any-return]


@jax.custom_vjp
def poisoned(x: jax.Array, broken: jax.Array) -> jax.Array:
    """x, with NaN where it is broken: in value, and in the derivative if a cotangent reaches it."""
    return jnp.where(broken, jnp.nan, x)


def _poisoned_forward(x: jax.Array, broken: jax.Array) -> tuple[jax.Array, jax.Array]:
    return poisoned(x, broken), broken


def _poisoned_backward(broken: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
    # not a product with NaN, which would turn a cotangent of 0 into NaN
    return jnp.where(broken & (cotangent != 0.0), jnp.nan, cotangent), None


poisoned.defvjp(_poisoned_forward, _poisoned_backward)


def masked(rows: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Rows with 0 in those that the mask leaves out, so that nothing they hold enters any arithmetic."""
    return rows if mask is None else jnp.where(mask[..., None], rows, jnp.zeros((), rows.dtype))
