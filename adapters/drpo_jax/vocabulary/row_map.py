"""From the head's output z to the policy's logits x: x = z/T in the support and the vocabulary, −∞ elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from drpo_core._checks import check_number
from drpo_jax._checks import check_float, check_shape
from drpo_jax.vocabulary.shards import WHOLE, Shard
from drpo_jax.vocabulary.softmax import inside_vocabulary, outside_vocabulary
from drpo_jax.vocabulary.support import Support, check_support, is_member, members, membership, some_bit

__all__ = ["RowMap", "Rows", "check_temperatures", "usable"]

_PER_TOKEN = ("temperatures", "first", "end", "bits")


def check_temperatures(name: str, temperature: jax.Array, leading: tuple[int, ...], of: str) -> None:
    """Raise unless an array of temperatures is one per token."""
    check_float(**{name: temperature})
    check_shape(name, temperature, leading, f"{of}, or a number")


def usable(temperature: jax.Array) -> jax.Array:
    """Temperatures as constants, NaN where they are not finite and positive; 0 is left for tokens that do not count."""
    given = jax.lax.stop_gradient(temperature)
    return jnp.where((given > 0.0) & (given < jnp.inf), given, jnp.nan)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[*_PER_TOKEN, "ids"],
    meta_fields=["temperature", "vocabulary", "width", "shard"],
)
@dataclass(frozen=True, slots=True, eq=False)
class RowMap:
    """The row map of tokens (…), in arrays of one row a token, and the ids of all supports.

    `temperature` is a number; or 1, and `temperatures` (…) are one per token: NaN where the given one is not valid, 0 where
    the token does not count. Of a `width` of logits, the first `vocabulary` are not padding. A token's support is
    ``ids[first:end]``, or its row of bits; an empty one is the whole vocabulary.
    """

    temperature: float
    vocabulary: int
    width: int
    temperatures: jax.Array | None = None
    first: jax.Array | None = None
    end: jax.Array | None = None
    bits: jax.Array | None = None
    ids: jax.Array | None = None
    shard: Shard = WHOLE

    @classmethod
    def of(
        cls,
        temperature: float | jax.Array,
        support: Support | None,
        vocabulary_size: int | None,
        *,
        leading: tuple[int, ...],
        of: str,
        width: int,
        shard: Shard = WHOLE,
    ) -> RowMap:
        """Of arguments, which are checked; `width` is that of a device's part. The arrays are constants."""
        size = width = shard.vocabulary(width)
        if vocabulary_size is not None:
            size = int(check_number("vocabulary_size", vocabulary_size, at_least=1, at_most=width, whole=True))
        arrays: dict[str, Any] = {}
        number = 1.0
        if isinstance(temperature, jax.Array):
            check_temperatures("temperature", temperature, leading, of)
            arrays["temperatures"] = usable(temperature)
        else:
            number = check_number("temperature", temperature, above=0.0)
        if support is not None:
            check_support(support, leading, of, (width, size))
            arrays |= {"bits": support.bits, "ids": support.ids}
            if support.offsets is not None:
                offsets = support.offsets.astype(jnp.int64 if support.offsets.dtype.itemsize > 4 else jnp.int32)
                arrays |= {"first": offsets[:-1].reshape(leading), "end": offsets[1:].reshape(leading)}
        return cls(number, size, width, **arrays, shard=shard)

    def kept(self, mask: jax.Array | None) -> RowMap:
        """With 0 at masked tokens, whatever was there: no support, and a temperature of 1."""
        if mask is None:
            return self

        def kept(array: jax.Array) -> jax.Array:
            return jnp.where(mask.reshape(*mask.shape, *(1,) * (array.ndim - mask.ndim)), array, jnp.zeros((), array.dtype))

        per_token: RowMap = jax.tree.map(kept, replace(self, ids=None))
        return replace(per_token, ids=self.ids)

    def apart(self) -> tuple[RowMap, jax.Array | None]:
        """What is of one row a token, and the ids."""
        return replace(self, ids=None), self.ids

    def of_chunk(self, ids: jax.Array | None) -> Rows:
        """`ready`, of some tokens and the ids of all, the inverse of `apart`."""
        return replace(self, ids=ids).ready()

    def ready(self) -> Rows:
        """With a row of booleans or bits for each token."""
        rows, empty, wrong = self.bits, None, None
        if self.first is not None and self.end is not None and self.ids is not None:
            leading = self.first.shape
            found = members(self.first.reshape(-1), self.end.reshape(-1), self.ids, self.vocabulary, self.width)
            rows, wrong = found[0].reshape(*leading, self.width), found[1].reshape(leading)
            empty = self.end <= self.first
        elif rows is not None:
            empty = ~some_bit(rows, self.vocabulary)
        return Rows(self.temperature, self.vocabulary, self.width, self.temperatures, rows, empty, wrong, self.shard)

    def of_head(self, array: jax.Array) -> jax.Array:
        """A head's weight (V, H) or bias (V,), with 0 at the padding: what that holds enters no product."""
        if self.vocabulary == self.width:
            return array
        real = jax.lax.broadcasted_iota(jnp.int32, array.shape, 0) + self.shard.start(len(array)) < self.vocabulary
        return jnp.where(real, array, jnp.zeros((), array.dtype))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperatures", "rows", "empty", "wrong"],
    meta_fields=["temperature", "vocabulary", "width", "shard"],
)
@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The row map of tokens (…) whose supports are `rows` of booleans or bits.

    `empty` says which supports are, and `wrong` which have an id outside the vocabulary; (…).
    """

    temperature: float
    vocabulary: int
    width: int
    temperatures: jax.Array | None
    rows: jax.Array | None
    empty: jax.Array | None
    wrong: jax.Array | None
    shard: Shard

    def ready(self) -> Rows:
        """Itself."""
        return self

    def at_temperature(self, temperature: float | jax.Array) -> Rows:
        """The same support and vocabulary, for logits of a behaviour policy with a temperature of its own."""
        number, per_token = (1.0, temperature) if isinstance(temperature, jax.Array) else (temperature, None)
        return replace(self, temperature=number, temperatures=per_token)

    def logits(self, z: jax.Array) -> jax.Array:
        """The policy's logits x of rows z (…, V)."""
        return self.over_temperature(self.restricted(z))

    def restricted(self, z: jax.Array) -> jax.Array:
        """Rows z (…, V), with −∞ outside the support and in the padding."""
        inside = self._inside(z.shape)
        return z if inside is None else jnp.where(inside, z, -jnp.inf)

    def at(self, chosen: jax.Array, ids: jax.Array) -> jax.Array:
        """The policy's logits of entries z (…, K) at ids of the vocabulary."""
        holds = self.holds(ids)
        return self.over_temperature(chosen if holds is None else jnp.where(holds, chosen, -jnp.inf))

    def over_temperature(self, array: jax.Array) -> jax.Array:
        """An array of the tokens (…), or of some figures of each (…, K), over T."""
        if self.temperatures is None:
            return array / self.temperature
        t = jnp.where(self.temperatures == 0.0, 1.0, self.temperatures.astype(array.dtype))
        return array / t.reshape(*t.shape, *(1,) * (array.ndim - t.ndim))

    def within(self, gradient: jax.Array) -> jax.Array:
        """A derivative in rows (…, V), with an exact 0 outside the support and in the padding."""
        inside = self._inside(gradient.shape)
        return gradient if inside is None else jnp.where(inside, gradient, 0.0)

    def holds(self, ids: jax.Array) -> jax.Array | None:
        """Whether ids (…, K) are in the support and the vocabulary; None if every id below V is."""
        if self.rows is None and self.vocabulary == self.width:
            return None
        holds = ~outside_vocabulary(ids, self.vocabulary)
        if self.rows is None or self.empty is None:
            return holds
        return holds & (is_member(self.rows, inside_vocabulary(ids, self.vocabulary)) | self.empty[..., None])

    def broken(self, tokens: jax.Array) -> jax.Array:
        """True at tokens whose id is outside the vocabulary or their support, and at unusable ones."""
        broken = outside_vocabulary(tokens, self.vocabulary)
        holds, unusable = self.holds(tokens[..., None]), self.unusable
        broken = broken if holds is None else broken | ~holds[..., 0]
        return broken if unusable is None else broken | unusable

    @property
    def unusable(self) -> jax.Array | None:
        """True at tokens whose temperature is not valid, or whose support has an id outside the vocabulary."""
        bad = None if self.temperatures is None else jnp.isnan(self.temperatures)
        return self.wrong if bad is None else bad if self.wrong is None else bad | self.wrong

    def repaired(self) -> Rows:
        """With a temperature of 1 where it is not valid."""
        return self if self.temperatures is None else replace(self, temperatures=jnp.nan_to_num(self.temperatures))

    def _inside(self, shape: tuple[int, ...]) -> jax.Array | None:
        """True in the support and the vocabulary, in rows (…, V) of this shape; None if that is everything."""
        inside = None
        if self.rows is not None and self.empty is not None:
            inside = self.shard.part(membership(self.rows, self.width), shape[-1]) | self.empty[..., None]
        if self.vocabulary == self.width:
            return inside
        real = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) + self.shard.start(shape[-1]) < self.vocabulary
        return real if inside is None else inside & real
