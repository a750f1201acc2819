"""The denominator of a batch that is spread over devices and micro-batches, and its diagnostics: under `jax.shard_map`.

Nothing here is needed under `jit` with sharded arrays: `policy_loss` then sees the whole batch, and XLA adds up.
Sum the shares of the loss with `jax.lax.psum`; don't average them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from drpo_core.diagnostics import Maximum, Minimum
from drpo_core.reduction import reduction_coefficients, reduction_count

if TYPE_CHECKING:
    from drpo_core.diagnostics import Diagnostics, Statistic
    from drpo_core.reduction import Reduction

__all__ = ["all_reduce_diagnostics", "global_coefficients", "global_normalizer"]


def global_normalizer(
    reduction: Reduction,
    mask: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
    segment_ids: jax.Array | None = None,
    shard_axis_name: str | None = None,
) -> jax.Array:
    """Denominator of the whole batch: valid tokens, or sequences that have one, over devices.

    Parameters
    ----------
    reduction
        `drpo_core.token_mean`, `drpo_core.sequence_mean_token_mean` or `drpo_core.sequence_mean_token_sum`.
    mask
        The mask of this device's tokens; True at tokens that count. Add the results of micro-batches.
    axis_name
        Mesh axes along which the batch is divided, `shard_axis_name` included.
    segment_ids
        Of packed tokens: which sequence each belongs to.
    shard_axis_name
        Mesh axis along which the tokens of each sequence are divided (sequence or context parallelism).

    Returns
    -------
    jax.Array
        0-d, to be passed as `normalizer`, or to `global_coefficients`.

    Raises
    ------
    TypeError
        If nothing is known of the reduction, or a dtype is wrong.
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
    if count is None:
        raise _unknown(reduction)
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
    """What each token's loss is multiplied with in the reduction of the whole batch, where sequences lie across devices.

    A device that holds a part of each sequence can't count the tokens of a sequence. With these coefficients c the whole
    reduction is Σ m c L over all devices: pass them as `token_weights`, with ``reduction=token_mean, normalizer=1``.

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
        Of packed tokens: which sequence each belongs to, by numbers that mean the same on all these devices.

    Returns
    -------
    jax.Array
        Of the mask's shape; anything at masked tokens.

    Raises
    ------
    TypeError
        If nothing is known of the reduction, or a dtype is wrong.
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
    if coefficients is None:
        raise _unknown(reduction)
    start = jax.lax.axis_index(shard_axis_name) * mask.shape[-1]
    return jax.lax.dynamic_slice_in_dim(jnp.broadcast_to(coefficients, whole.shape), start, mask.shape[-1], axis=-1)


def all_reduce_diagnostics(diagnostics: Diagnostics, *, axis_name: str | tuple[str, ...]) -> Diagnostics:
    """Diagnostics of all devices, as if they had been one: the same on each of them.

    Parameters
    ----------
    diagnostics
        This device's.
    axis_name
        Mesh axes along which the batch is divided.

    Returns
    -------
    dict
        Statistics by name. `drpo_core.summarize` makes numbers of them, outside `jit`.
    """
    return {name: _all_reduce(statistic, axis_name) for name, statistic in diagnostics.items()}


def _all_reduce(statistic: Statistic, axis_name: str | tuple[str, ...]) -> Statistic:
    added: Statistic = jax.lax.psum(statistic, axis_name)  # type: ignore[no-untyped-call]
    if not isinstance(statistic, Maximum | Minimum):
        return added
    # a sum of vectors that are zero but for one element, rather than an all_gather: its result is known to be the same on
    # all devices, as an out_spec of P() wants; and rather than a pmax, which need not pass on a NaN
    slots = jnp.zeros(jax.lax.axis_size(axis_name), dtype=statistic.value.dtype)
    mine = slots.at[jax.lax.axis_index(axis_name)].set(statistic.value)
    everyone = jax.lax.psum(mine, axis_name)  # type: ignore[no-untyped-call]
    extreme = jnp.max if isinstance(statistic, Maximum) else jnp.min
    return type(statistic)(extreme(everyone), added.count)


def _whole(shard: jax.Array, axis_name: str | None) -> jax.Array:
    """The array that is divided along its last axis; without an axis name, the array itself."""
    if axis_name is None:
        return shard
    whole: jax.Array = jax.lax.all_gather(shard, axis_name, axis=shard.ndim - 1, tiled=True)
    return whole


def _unknown(reduction: object) -> TypeError:
    msg = (
        f"reduction: expected one of drpo_core, whose denominator is known, got {reduction!r}; count its denominator yourself"
    )
    return TypeError(msg)
