"""The ids that truncated sampling could have drawn: flat ids with offsets, or bits; and rows of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from drpo_jax._checks import check_integers, check_jax_arrays, check_shape
from drpo_jax._sharding import varying_like
from drpo_jax.vocabulary.softmax import outside_vocabulary

__all__ = ["Support", "check_support", "is_member", "members", "membership", "some_bit"]

_WORD = 32
"""Bits a word."""

_IDS = 8192
"""Ids that are scattered at a time: a chunk's own are as many as its tokens' supports are large."""


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "offsets", "bits"], meta_fields=[])
@dataclass(frozen=True, slots=True, eq=False)
class Support:
    """The ids S that could be sampled at each token, over which the policy is renormalised; a pytree.

    π_S(v) = π(v) / Σ_{u∈S} π(u) for v in S, else 0. A sampler that truncates (top-p, top-k, min-p) draws from this, so that
    log μ is of it: log π must be too, or E_μ[π/μ] is the kept mass Σ_{u∈S} π(u) instead of 1. An empty support stands for
    one that was not recorded: the whole vocabulary. μ has the support of π.

    Its arrays are checked where it is used, because JAX also builds pytrees whose leaves aren't arrays. Values are unknown
    under `jit`: a support with an id outside the vocabulary, and a sampled token outside its support, give NaN at that token.

    Flat ids can't be divided over devices with the tokens. Under `shard_map`, give each device the ids and offsets of its
    own tokens, or take `from_bits` or `from_mask`, whose rows are divided as the tokens are. `vmap` takes supports of the
    same number of ids.

    Parameters
    ----------
    ids
        The supports of all tokens, one after the other, in row-major order of the tokens; integers, (S,). An id that comes
        twice counts once. Those of masked tokens may be anything.
    offsets
        Token i has ``ids[offsets[i]:offsets[i + 1]]``; integers, (N + 1,) for N tokens, never decreasing.
    bits
        Instead of these, a bit for each id, from `from_bits`.

    See Also
    --------
    drpo_jax.token_log_prob : and the other functions that take a support.

    References
    ----------
    vLLM, pull request 49577: ``SamplingMask(token_ids, offsets)``. prime-rl, pull request 3431: a count of 0 is no support.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from drpo_jax import Support, token_log_prob
    >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]))
    >>> support = Support(ids=jnp.array([0, 1]), offsets=jnp.array([0, 2, 2]))  # nothing recorded at the second token
    >>> found = token_log_prob(logits=logits, tokens=jnp.array([0, 0]), support=support)
    >>> [round(p, 4) for p in jnp.exp(found.log_prob).tolist()]
    [0.625, 0.5]
    """

    ids: jax.Array | None = None
    offsets: jax.Array | None = None
    bits: jax.Array | None = field(default=None, kw_only=True)

    @classmethod
    def from_bits(cls, bits: jax.Array) -> Support:
        """Id v is in a token's support if bit v % 32 of word v // 32 is set, the least significant bit being 0.

        Parameters
        ----------
        bits
            int32, (…, ⌈V/32⌉), with the axes of the tokens; the vocabulary V with or without its padding. A row without a
            set bit is an empty support. Bits beyond the vocabulary may be anything.

        Raises
        ------
        TypeError
            If the bits are not a JAX array of int32.

        References
        ----------
        The layout of xgrammar's token bitmask.

        Examples
        --------
        >>> import jax.numpy as jnp
        >>> from drpo_jax import Support
        >>> support = Support.from_bits(jnp.array([[0b011]], dtype=jnp.int32))
        """
        _check_bits("bits", bits)
        return cls(bits=bits)

    @classmethod
    def from_mask(cls, mask: jax.Array) -> Support:
        """Id v is in a token's support if element v of its row is True; packed into bits.

        Parameters
        ----------
        mask
            Boolean, (…, V), with the axes of the tokens; the vocabulary V with or without its padding. A row without a
            True element is an empty support.

        Raises
        ------
        TypeError
            If the mask is not a boolean JAX array.
        ValueError
            If it has no last axis.

        Examples
        --------
        >>> import jax.numpy as jnp
        >>> from drpo_jax import Support
        >>> Support.from_mask(jnp.array([[True, True, False]])).bits.tolist()
        [[3]]
        """
        check_jax_arrays(mask=mask)
        if mask.dtype != jnp.bool_:
            msg = f"mask: expected a bool dtype, got {mask.dtype}"
            raise TypeError(msg)
        if mask.ndim == 0 or mask.shape[-1] == 0:
            msg = f"mask: expected shape (…, V) with V of 1 or more, got {mask.shape}"
            raise ValueError(msg)
        padding = [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % _WORD)]
        shape = (*mask.shape[:-1], -(-mask.shape[-1] // _WORD), _WORD)
        words = jnp.pad(mask, padding).reshape(shape).astype(jnp.uint32)
        bits = jnp.sum(words << jax.lax.broadcasted_iota(jnp.uint32, words.shape, words.ndim - 1), axis=-1, dtype=jnp.uint32)
        return cls(bits=jax.lax.bitcast_convert_type(bits, jnp.int32))


def _check_bits(name: str, bits: jax.Array) -> None:
    check_jax_arrays(**{name: bits})
    if bits.dtype != jnp.int32:
        msg = f"{name}: expected an int32 dtype, got {bits.dtype}"
        raise TypeError(msg)


def check_support(support: object, leading: tuple[int, ...], of: str, vocabularies: tuple[int, ...]) -> None:
    """Raise unless this is a support of tokens of this shape, and of a vocabulary of one of these sizes."""
    if not isinstance(support, Support):
        msg = f"support: expected a Support, got {type(support).__name__}"
        raise TypeError(msg)
    bits = support.bits
    if bits is not None:
        if support.ids is not None or support.offsets is not None:
            msg = "support.bits: expected None beside ids and offsets, got an array"
            raise TypeError(msg)
        _check_bits("support.bits", bits)
        words = {-(-size // _WORD) for size in vocabularies}
        if bits.ndim == 0 or bits.shape[-1] not in words:
            expected = " or ".join(map(str, sorted(words)))
            msg = f"support.bits: expected {expected} words a token, ⌈V/32⌉, got shape {bits.shape}"
            raise ValueError(msg)
        check_shape("support.bits", bits, (*leading, bits.shape[-1]), f"{of} and one more axis, ⌈V/32⌉")
        return
    named: dict[str, Any] = {"support.ids": support.ids, "support.offsets": support.offsets}
    check_integers(**named)
    for name, array in named.items():
        if array.ndim != 1:
            msg = f"{name}: expected one axis, got shape {array.shape}"
            raise ValueError(msg)
    n = math.prod(leading)
    if named["support.offsets"].shape != (n + 1,):
        msg = f"support.offsets: expected one more than the {n} tokens, {(n + 1,)}, got {named['support.offsets'].shape}"
        msg += "; under shard_map, give each device the ids and offsets of its own tokens, or take Support.from_bits"
        raise ValueError(msg)


def members(first: jax.Array, end: jax.Array, ids: jax.Array, vocabulary: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Rows (n, width), True at the ids first … end of each token, and which tokens have one outside the vocabulary.

    first and end, (n,), increase from token to token, but for those without ids, which may have anything there.
    The ids of these tokens lie in one range, which is scattered some at a time.
    """
    n, total = first.shape[0], ids.shape[0]
    rows = varying_like(ids, jnp.zeros_like(first, dtype=bool, shape=(n, width)))
    wrong = varying_like(ids, jnp.zeros_like(first, dtype=bool))
    if not n or not total:
        return rows, wrong
    size = min(_IDS, total)
    some = end > first
    start, stop = jnp.min(jnp.where(some, first, total)), jnp.max(jnp.where(some, end, 0))
    # the first end beyond a place is that of its token, whatever stands for tokens without ids
    ends = jax.lax.cummax(jnp.where(some, end, 0))

    def scattered(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, wrong = carry
        at = jnp.minimum(start + i * size, total - size)
        some_ids = jax.lax.dynamic_slice_in_dim(ids, at, size)
        place = at + jnp.arange(size, dtype=at.dtype)
        row = jnp.searchsorted(ends, place, side="right")
        row = jnp.where(first[jnp.minimum(row, n - 1)] <= place, row, n)
        outside = outside_vocabulary(some_ids, vocabulary)
        column = jnp.where(outside, width, some_ids.astype(jnp.int32))
        return rows.at[row, column].set(True, mode="drop"), wrong.at[jnp.where(outside, row, n)].set(True, mode="drop")

    blocks = (stop - start + size - 1) // size
    return jax.lax.fori_loop(0, blocks, scattered, (rows, wrong))  # type: ignore[no-any-return]


def membership(rows: jax.Array, width: int) -> jax.Array:
    """Booleans (…, width) of rows of bits or booleans, False beyond these."""
    if rows.dtype != jnp.bool_:
        words = jnp.broadcast_to(rows[..., None], (*rows.shape, _WORD))
        bits = (words >> jax.lax.broadcasted_iota(rows.dtype, words.shape, rows.ndim)) & 1
        rows = bits.reshape(*rows.shape[:-1], rows.shape[-1] * _WORD) != 0
    missing = width - rows.shape[-1]
    return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)]) if missing > 0 else rows[..., :width]


def some_bit(bits: jax.Array, vocabulary: int) -> jax.Array:
    """Whether rows of bits have one of an id in the vocabulary."""
    words, rest = divmod(vocabulary, _WORD)
    some = jnp.any(bits[..., :words] != 0, axis=-1)
    return some if not rest else some | ((bits[..., words] & ((1 << rest) - 1)) != 0)


def is_member(rows: jax.Array, ids: jax.Array) -> jax.Array:
    """Whether ids (…, K) of the vocabulary are in rows of bits or booleans."""
    if rows.dtype == jnp.bool_:
        return jnp.take_along_axis(rows, ids, axis=-1, mode="fill", fill_value=False)
    words = jnp.take_along_axis(rows, ids // _WORD, axis=-1, mode="fill", fill_value=0)
    return ((words >> (ids % _WORD).astype(rows.dtype)) & 1) != 0
