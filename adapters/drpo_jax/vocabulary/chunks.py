"""Tokens through the LM head, a chunk at a time: which rows are taken when, and the gradients that chunks add up to."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal

from drpo_core._checks import check_number
from drpo_jax._checks import working_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_jax.vocabulary.shards import Shard

__all__ = ["Gradients", "HeadSums", "Needed", "before_softcap", "chunk_size", "over_chunks", "primals"]

_WEIGHT_ROWS = 8192
"""Rows of ∂weight that a chunk adds to at a time: a product of the whole size would be a second ∂weight."""

_Sums = TypeVar("_Sums")


def chunk_size(tokens: int | None) -> int:
    """The tokens of a chunk: so many that a GPU waits for its products, and a CPU has them in its cache."""
    if tokens is not None:
        return int(check_number("chunk_tokens", tokens, at_least=1, whole=True))
    return 256 if jax.default_backend() == "cpu" else 2048


def over_chunks(
    function: Callable[[_Sums, Any, jax.Array], tuple[_Sums, dict[str, jax.Array]]],
    sums: _Sums,
    hidden: jax.Array,
    rows: Any,  # noqa: ANN401 -- a pytree
    mask: jax.Array,
    *,
    chunk: int,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Any,  # noqa: ANN401 -- a dtype of the namespace
    integers: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> tuple[_Sums, dict[str, jax.Array]]:
    """Take every valid token through ``function(sums, (hidden, rows), valid)``; the loop ends where the masked tokens begin.

    The function gives the sums with the chunk's share, and figures of its tokens. Of these, `shapes` has the names and what
    follows the token axis; they are returned at their tokens, and 0 at masked ones. `integers` has those that are int32.
    """
    n = mask.size
    padded = -(-n // chunk) * chunk
    order = jnp.argsort(~mask.reshape(-1), stable=True)
    order = jnp.concatenate((order, jnp.zeros(padded - n, order.dtype)))
    count = jnp.sum(mask.astype(jnp.int32))
    # like an array of the tokens, so that under shard_map they vary over the devices as the tokens do
    figures = {name: jnp.zeros_like(hidden, dtype=dtype, shape=(padded, *shape)) for name, shape in shapes.items()}
    figures |= {name: jnp.zeros_like(hidden, dtype=jnp.int32, shape=(padded, *shape)) for name, shape in integers.items()}

    def body(i: jax.Array, carry: tuple[_Sums, dict[str, jax.Array]]) -> tuple[_Sums, dict[str, jax.Array]]:
        sums, figures = carry
        start = i * chunk
        # not of flattened arrays, whose masked tokens jax_debug_nans would see
        here = jnp.unravel_index(jax.lax.dynamic_slice_in_dim(order, start, chunk), mask.shape)
        valid = start + jnp.arange(chunk) < count

        def kept(array: jax.Array) -> jax.Array:
            return jnp.where(valid.reshape(-1, *(1,) * (array.ndim - 1)), array, jnp.zeros((), array.dtype))

        # what masked positions hold is replaced before any arithmetic
        taken = jax.tree.map(lambda array: kept(array[here] if mask.ndim else array[None]), (hidden, rows))
        sums, found = function(sums, taken, valid)
        return sums, {
            name: jax.lax.dynamic_update_slice_in_dim(array, kept(found[name]), start, 0) for name, array in figures.items()
        }

    if n:
        sums, figures = jax.lax.fori_loop(0, (count + chunk - 1) // chunk, body, (sums, figures))
    place = jnp.argsort(order[:n]).reshape(mask.shape)
    return sums, {name: array[place] for name, array in figures.items()}


@jax.tree_util.register_static
@dataclass(frozen=True, slots=True)
class Needed:
    """Of which inputs a gradient is formed; no array, so that a custom derivative can keep it."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @classmethod
    def by(cls, *inputs: CustomVJPPrimal | None) -> Needed:
        """By a derivative of hidden states, weight and bias."""
        return cls(*(a is not None and a.perturbed for a in inputs))

    @property
    def any(self) -> bool:
        """Whether one is."""
        return self.hidden or self.weight or self.bias


def primals(arguments: Any) -> Any:  # noqa: ANN401 -- a pytree
    """What is in the arguments of a custom derivative that has symbolic zeros."""
    return jax.tree.map(lambda a: a.value, arguments, is_leaf=lambda a: isinstance(a, CustomVJPPrimal))


class Gradients(NamedTuple):
    """∂loss/∂ each differentiable input; None for those that need none."""

    hidden: jax.Array | None
    weight: jax.Array | None
    bias: jax.Array | None

    def cast(self, *inputs: jax.Array | None) -> tuple[jax.Array | None, ...]:
        """Each in the dtype of its input."""
        pairs = zip(self, inputs, strict=True)
        return tuple(None if g is None or a is None else g.astype(a.dtype) for g, a in pairs)


class HeadSums(NamedTuple):
    """∂weight and ∂bias of the chunks so far; None for what needs none."""

    weight: jax.Array | None
    bias: jax.Array | None

    @classmethod
    def zeros(cls, needed: Needed, hidden: jax.Array, weight: jax.Array) -> HeadSums:
        """Those of no chunk."""
        dtype = working_dtype(hidden, weight)

        def of(shape: tuple[int, ...], *, wanted: bool) -> jax.Array | None:
            # like the weight, which under shard_map varies over the devices as the tokens and the vocabulary do
            return jnp.zeros_like(weight, dtype=dtype, shape=shape) if wanted else None

        return cls(of(weight.shape, wanted=needed.weight), of(weight.shape[:1], wanted=needed.bias))

    def plus(
        self, of_logits: jax.Array, hidden: jax.Array, weight: jax.Array, needed: Needed, shard: Shard
    ) -> tuple[HeadSums, dict[str, jax.Array]]:
        """With a chunk's share; and ∂hidden of its tokens. Products are taken in the dtype of the model."""
        dtype = of_logits.dtype
        of_weight, of_bias, of_hidden = self.weight, self.bias, {}
        if of_bias is not None:
            of_bias = of_bias + jnp.sum(of_logits, axis=0)
        power = _power_of_two(of_logits) if weight.dtype == jnp.float16 else None
        low = (of_logits if power is None else jnp.ldexp(of_logits, power)).astype(weight.dtype)

        def product(subscripts: str, *factors: jax.Array) -> jax.Array:
            share = jnp.einsum(subscripts, *factors, preferred_element_type=dtype)
            return share if power is None else jnp.ldexp(share, -power)

        if needed.hidden:
            of_hidden["hidden"] = shard.total(product("nv,vh->nh", low, weight))
        if of_weight is not None:

            def add(row: jax.Array | int, size: int, of_weight: jax.Array) -> jax.Array:
                share = product("nv,nh->vh", jax.lax.dynamic_slice_in_dim(low, row, size, 1), hidden)
                sum_of_both = jax.lax.dynamic_slice_in_dim(of_weight, row, size) + share
                return jax.lax.dynamic_update_slice(of_weight, sum_of_both, (row, 0))

            size = min(_WEIGHT_ROWS, weight.shape[0])
            blocks, rest = divmod(weight.shape[0], size)
            of_weight = jax.lax.fori_loop(0, blocks, lambda i, g: add(i * size, size, g), of_weight)
            if rest:
                of_weight = add(blocks * size, rest, of_weight)
        return HeadSums(of_weight, of_bias), of_hidden


def before_softcap(of_logits: jax.Array, z: jax.Array, softcap: float | None) -> jax.Array:
    """∂loss/∂z from ∂loss/∂logits, z = h Wᵀ + b: times the soft-cap's sech²(z/cap)."""
    if softcap is None:
        return of_logits
    # 1 − tanh² has lost its digits where the logit is some times the cap
    t = jnp.exp(-2.0 * jnp.abs(z / softcap))
    return of_logits * (4.0 * t / jnp.square(1.0 + t))


def _power_of_two(x: jax.Array) -> jax.Array:
    """The n for which the largest element times 2ⁿ is just within float16, so that small ones do not underflow."""
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x)))
    return 15 - exponent
