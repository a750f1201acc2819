"""Checks of arguments that JAX can make while it traces: types, dtypes and shapes of arrays, and plain numbers.

Values of arrays are unknown under `jit`, so none is ever checked; an id outside the vocabulary gives NaN instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from drpo_core._checks import check_dtype, check_mask, compute_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "check_choice",
    "check_float",
    "check_head",
    "check_integers",
    "check_jax_arrays",
    "check_logits",
    "check_shape",
    "check_tokens",
    "check_top_k_ids",
    "working_dtype",
]


def check_jax_arrays(**arrays: object) -> None:
    """Raise for what is neither a JAX array nor None; the core names a None that it can't do without."""
    for name, array in arrays.items():
        if array is not None and not isinstance(array, jax.Array):
            msg = f"{name}: expected a jax.Array, got {type(array).__name__}"
            raise TypeError(msg)


def check_float(**arrays: object) -> None:
    """Raise for what is not a JAX array of real floating-point numbers."""
    _check_kind("real floating", arrays)


def check_integers(**arrays: object) -> None:
    """Raise for what is not a JAX array of integers."""
    _check_kind("integral", arrays)


def check_shape(name: str, array: jax.Array, shape: Sequence[int], of: str) -> None:
    """Raise unless the array has exactly this shape, which is that of `of`: nothing is broadcast."""
    if array.shape != tuple(shape):
        hint = ""
        if name == "advantages" and array.ndim == 1:
            hint = "; per-sequence advantages are expanded with expand_advantages(advantages, mask)"
        msg = f"{name}: expected the shape of {of}, {tuple(shape)}, got {array.shape}{hint}"
        raise ValueError(msg)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless the value is one of these words."""
    if value not in choices:
        msg = f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}"
        raise ValueError(msg)


def check_logits(name: str, logits: jax.Array) -> None:
    """Raise unless these are floating-point logits (…, V) with V of 1 or more."""
    check_float(**{name: logits})
    if logits.ndim == 0 or logits.shape[-1] == 0:
        msg = f"{name}: expected shape (…, V) with V of 1 or more, got {logits.shape}"
        raise ValueError(msg)


def check_head(hidden: jax.Array, weight: jax.Array, bias: jax.Array | None, *, prefix: str = "") -> None:
    """Raise unless these are hidden states (…, H), a weight (V, H) and a bias (V,), with H and V of 1 or more."""
    check_float(**{f"{prefix}hidden": hidden, f"{prefix}weight": weight})
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        msg = f"{prefix}hidden: expected shape (…, H) with H of 1 or more, got {hidden.shape}"
        raise ValueError(msg)
    if weight.ndim != 2 or weight.shape[0] == 0:
        msg = f"{prefix}weight: expected shape (V, H) with V of 1 or more, got {weight.shape}"
        raise ValueError(msg)
    check_shape(f"{prefix}weight", weight, (weight.shape[0], hidden.shape[-1]), "the vocabulary and hidden, (V, H)")
    if bias is not None:
        check_float(**{f"{prefix}bias": bias})
        check_shape(f"{prefix}bias", bias, weight.shape[:1], "the vocabulary, (V,)")


def check_top_k_ids(name: str, ids: jax.Array, leading: tuple[int, ...]) -> None:
    """Raise unless these are integers, K at each token."""
    check_integers(**{name: ids})
    if ids.ndim == 0:
        msg = f"{name}: expected shape (…, K), got ()"
        raise ValueError(msg)
    check_shape(name, ids, (*leading, *ids.shape[-1:]), "the tokens and one more axis, K")


def check_tokens(
    leading: tuple[int, ...],
    of: str,
    *,
    tokens: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
) -> None:
    """Raise for per-token arrays of a wrong dtype or shape."""
    check_integers(tokens=tokens)
    check_float(behavior_log_prob=behavior_log_prob, advantages=advantages)
    check_jax_arrays(mask=mask)
    for name, array in (("tokens", tokens), ("behavior_log_prob", behavior_log_prob), ("advantages", advantages)):
        check_shape(name, array, leading, of)
    check_mask(mask, "tokens", tokens, xp=jnp)


def working_dtype(*arrays: jax.Array) -> Any:  # noqa: ANN401 -- a dtype of the namespace
    """Dtype of the arithmetic: the arrays' own, but float32 at least."""
    return compute_dtype(*arrays, xp=jnp)


def _check_kind(kind: str, arrays: dict[str, object]) -> None:
    check_jax_arrays(**arrays)
    for name, array in arrays.items():
        check_dtype(name, array, kind, xp=jnp)
