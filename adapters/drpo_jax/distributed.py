"""The denominator and the diagnostics of a batch that `jax.shard_map` divides over devices.

Nothing here is needed under `jit` with sharded arrays, whose mesh axes may be Auto or Explicit: `policy_loss` then sees
the whole batch, and XLA adds up. Sum the devices' losses with `jax.lax.psum`; don't average them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from drpo_core.diagnostics import combine_diagnostics, map_diagnostics
from drpo_core.reduction import reduction_coefficients, reduction_count

if TYPE_CHECKING:
    from drpo_core._sequences import Across
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.reduction import Reduction

__all__ = ["across", "all_reduce_diagnostics", "global_coefficients", "global_normalizer"]


def global_normalizer(
    reduction: Reduction,
    mask: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
    segment_ids: jax.Array | None = None,
    shard_axis_name: str | None = None,
) -> jax.Array:
    """Denominator of the whole batch over devices: the number of valid tokens, or of sequences that have one.

    Parameters
    ----------
    reduction
        `drpo_core.token_mean`, `drpo_core.sequence_mean_token_mean` or `drpo_core.sequence_mean_token_sum`.
    mask
        The mask of this device's tokens; True at tokens that count. Add the results of micro-batches.
    axis_name
        Mesh axes along which the batch is divided, `shard_axis_name` included.
    segment_ids
        The sequence of each packed token, any integers.
    shard_axis_name
        Mesh axis along which the tokens of each sequence are divided (sequence or context parallelism).

    Returns
    -------
    jax.Array
        0-d, to be passed as `normalizer`, or to `global_coefficients`.

    Raises
    ------
    TypeError
        If the reduction is another one, or a dtype is wrong.
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from drpo_core import token_mean
    >>> from drpo_jax.distributed import global_normalizer
    >>> masks = jnp.array([[True, True, True], [True, False, False]])  # of two devices; vmap stands for shard_map
    >>> jax.vmap(lambda mask: global_normalizer(token_mean, mask, axis_name="data"), axis_name="data")(masks).tolist()
    [4.0, 4.0]
    """
    count = reduction_count(
        reduction,
        _whole(mask, shard_axis_name),
        dtype=jnp.result_type(float),
        segment_ids=None if segment_ids is None else _whole(segment_ids, shard_axis_name),
        xp=jnp,
    )
    total: jax.Array = jax.lax.psum(count, axis_name)  # type: ignore[no-untyped-call]
    # devices that hold parts of the same sequences have counted the same ones
    return total if shard_axis_name is None else total / jax.lax.axis_size(shard_axis_name)


def global_coefficients(
    reduction: Reduction,
    mask: jax.Array,
    *,
    normalizer: jax.Array | float,
    shard_axis_name: str,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Coefficients c in the whole batch's reduction Σ m c L, where sequences lie across devices.

    A device that holds a part of each sequence can't count the tokens of a sequence by itself. Pass the coefficients as
    `token_weights`, with ``reduction=token_mean, normalizer=1`` or beside a mode whose reduction is ``"token_sum"``, and sum
    the losses of all devices.

    Parameters
    ----------
    reduction
        `drpo_core.token_mean`, `drpo_core.sequence_mean_token_mean` or `drpo_core.sequence_mean_token_sum`.
    mask
        (…, tokens) or packed (tokens,): this device's shard; True at tokens that count.
    normalizer
        A result of `global_normalizer` with the same `shard_axis_name`.
    shard_axis_name
        Mesh axis along which the tokens of each sequence are divided.
    segment_ids
        The sequence of each packed token, integers that mean the same on all these devices.

    Returns
    -------
    jax.Array
        c, an array of the mask's shape; anything at masked tokens.

    Raises
    ------
    TypeError
        If the reduction is another one, or a dtype is wrong.
    ValueError
        If the shapes differ.

    Examples
    --------
    One sequence of three tokens, on two devices:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from drpo_core import sequence_mean_token_mean
    >>> from drpo_jax.distributed import global_coefficients
    >>> masks = jnp.array([[True, True], [True, False]])
    >>> def coefficients(mask):
    ...     return global_coefficients(sequence_mean_token_mean, mask, normalizer=1, shard_axis_name="tokens")
    >>> [round(c, 3) for c in jax.vmap(coefficients, axis_name="tokens")(masks)[0].tolist()]
    [0.333, 0.333]
    """
    whole = _whole(mask, shard_axis_name)
    segments = None if segment_ids is None else _whole(segment_ids, shard_axis_name)
    coefficients = reduction_coefficients(
        reduction, whole, dtype=jnp.result_type(float), normalizer=normalizer, segment_ids=segments, xp=jnp
    )
    start = jax.lax.axis_index(shard_axis_name) * mask.shape[-1]
    return jax.lax.dynamic_slice_in_dim(jnp.broadcast_to(coefficients, whole.shape), start, mask.shape[-1], axis=-1)


def across(axis_name: str | tuple[str, ...]) -> Across:
    """How devices that hold parts of the same padded rows combine what each has found of them (context parallelism).

    Pass it as `across` to `drpo_jax.policy_loss` or `token_loss`, inside `shard_map` or a named `vmap`. A mean
    over sequences, which no device can count, is refused: take ``dataclasses.replace(mode, reduction="token_sum")``, with
    `global_coefficients` as `token_weights`, and sum the losses of all devices.

    Parameters
    ----------
    axis_name
        Mesh axes along which the tokens of each row are divided.

    Returns
    -------
    callable
        ``across(array, "sum" | "max")``: the array of all devices, reduced.
    """
    operations = {"sum": jax.lax.psum, "max": jax.lax.pmax}

    def reduced(array: jax.Array, operation: str, /) -> jax.Array:
        return operations[operation](array, axis_name)  # type: ignore[no-any-return, no-untyped-call]

    return reduced


def all_reduce_diagnostics(diagnostics: Diagnostics, *, axis_name: str | tuple[str, ...]) -> Diagnostics:
    """Diagnostics of all devices, as if they had been one: the same on each of them.

    Parameters
    ----------
    diagnostics
        Those of this device's tokens.
    axis_name
        Mesh axes along which the batch is divided.

    Returns
    -------
    dict
        Statistics by name. `drpo_core.summarize` makes numbers of them, outside `jit`.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from drpo_core import DRPO, summarize, token_diagnostics
    >>> from drpo_jax.distributed import all_reduce_diagnostics
    >>> def step(log_prob):  # two devices; vmap stands for shard_map
    ...     diagnostics = token_diagnostics(DRPO(delta=0.5), log_prob, jnp.log(jnp.array([0.25])), jnp.array([1.0]))
    ...     return all_reduce_diagnostics(diagnostics, axis_name="data")
    >>> of_all = jax.vmap(step, axis_name="data")(jnp.log(jnp.array([[0.5], [0.25]])))
    >>> summarize(jax.tree.map(lambda field: field[0], of_all))["ratio_mean"]
    1.5
    """

    def of_all_devices(field: jax.Array) -> jax.Array:
        # a sum of vectors that are zero but for one element, rather than an all_gather: JAX knows its result to be the
        # same on all devices, as an out_spec of P() asks
        slots = jnp.zeros(jax.lax.axis_size(axis_name), dtype=field.dtype)
        mine = slots.at[jax.lax.axis_index(axis_name)].set(field)
        return jax.lax.psum(mine, axis_name)  # type: ignore[no-any-return, no-untyped-call]

    return combine_diagnostics(map_diagnostics(of_all_devices, diagnostics), xp=jnp)


def _whole(shard: jax.Array, axis_name: str | None) -> jax.Array:
    """The array that is divided along its last axis; without an axis name, the array itself."""
    if axis_name is None:
        return shard
    if not shard.ndim:
        msg = "mask: expected (…, tokens), a shard of each sequence, got a 0-d array"
        raise ValueError(msg)
    whole: jax.Array = jax.lax.all_gather(shard, axis_name, axis=shard.ndim - 1, tiled=True)
    return whole
