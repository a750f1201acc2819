"""Per-token and reduced policy losses whose derivative is the analytic gradient −A r w."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from drpo_core import diagnostics, token_loss_and_gradient, token_mean

if TYPE_CHECKING:
    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.reduction import Reduction

__all__ = ["policy_loss", "token_loss"]


def token_loss(
    objective: Objective,
    *,
    log_prob: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    divergence: jax.Array | None = None,
) -> jax.Array:
    """Unreduced loss L of an objective, with ∂L/∂log π = −A r w as its derivative.

    Only `log_prob` is differentiated, in forward and reverse mode; the other arrays are constants. Only the gradient is
    kept for the backward pass. Works under `jit`, `vmap`, `grad`, `shard_map`, with x64 on or off. A second derivative
    is that of the formula −A r w.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``; static and hashable under `jit`.
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
    mask
        Boolean, True at tokens that count; the others may hold anything and have loss and gradient 0.
    divergence
        Per-token divergence for ``DPPO(divergence="per_token")``.

    Returns
    -------
    jax.Array
        L per token, float32 at least.

    Raises
    ------
    TypeError
        If an argument is not a JAX array or a dtype is wrong.
    ValueError
        If the shapes differ.

    See Also
    --------
    drpo_core.token_loss_and_gradient : the formula and its source.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from drpo_core import DRPO
    >>> from drpo_jax import token_loss
    >>> def loss(log_prob):
    ...     behavior, advantages = jnp.log(jnp.array([0.25, 0.2, 0.6])), jnp.array([1.0, 1.0, -1.0])
    ...     return token_loss(
    ...         DRPO(delta=0.5), log_prob=log_prob, behavior_log_prob=behavior, advantages=advantages
    ...     ).sum()
    >>> gradient = jax.grad(loss)(jnp.log(jnp.array([0.5, 0.2, 0.3])))
    >>> [round(g, 4) for g in gradient.tolist()]
    [-1.0, -1.0, 0.2]
    """
    _check_arrays(
        log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantages=advantages, mask=mask, divergence=divergence
    )
    return _token_loss(objective, log_prob, behavior_log_prob, advantages, mask, divergence)


def policy_loss(
    objective: Objective,
    *,
    log_prob: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    reduction: Reduction = token_mean,
    normalizer: float | jax.Array | None = None,
    token_weights: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    divergence: jax.Array | None = None,
) -> tuple[jax.Array, Diagnostics]:
    """Scalar loss of a batch of tokens to differentiate, and diagnostics (for `has_aux=True`).

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``; static and hashable under `jit`.
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; (sequences, tokens) padded or (tokens,) packed.
    mask
        Boolean, True at tokens that count; the others may hold anything.
    reduction
        `drpo_core.token_mean`, `drpo_core.sequence_mean_token_mean`, `drpo_core.sequence_mean_token_sum` (with its
        horizon bound by `functools.partial`) or a function with the same arguments.
    normalizer
        Denominator of the whole batch, where this call sees a micro-batch or a shard of it.
    token_weights
        Constant factors of the per-token losses (truncated importance weights, say).
    segment_ids
        Of packed tokens: which sequence each belongs to.
    divergence
        Per-token divergence for ``DPPO(divergence="per_token")``.

    Returns
    -------
    loss : jax.Array
        0-d, float32 at least.
    diagnostics : dict
        See `drpo_core.diagnostics`; a pytree of 0-d arrays.

    Raises
    ------
    TypeError
        If an argument is not a JAX array or a dtype is wrong.
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from drpo_core import DRPO, summarize
    >>> from drpo_jax import policy_loss
    >>> def loss(log_prob):
    ...     return policy_loss(
    ...         DRPO(delta=0.5),
    ...         log_prob=log_prob,
    ...         behavior_log_prob=jnp.log(jnp.array([[0.25, 0.2, jnp.nan]])),
    ...         advantages=jnp.array([[1.0, 1.0, -1.0]]),
    ...         mask=jnp.array([[True, True, False]]),
    ...     )
    >>> gradient, diagnostics = jax.grad(loss, has_aux=True)(jnp.log(jnp.array([[0.5, 0.2, 0.3]])))
    >>> gradient.tolist()
    [[-0.5, -0.5, 0.0]]
    >>> summarize(diagnostics)["attenuated_fraction"]
    0.5
    """
    _check_arrays(token_weights=token_weights, segment_ids=segment_ids)
    tokens = {"log_prob": log_prob, "behavior_log_prob": behavior_log_prob, "advantages": advantages}
    losses = token_loss(objective, **tokens, mask=mask, divergence=divergence)
    constants = None if token_weights is None else jax.lax.stop_gradient(token_weights)

    # differentiated on its own, a reduction would keep arrays of the tokens' shape, some of them zeros
    @partial(jax.checkpoint, prevent_cse=False)
    def reduce(losses: jax.Array) -> jax.Array:
        return reduction(losses, mask, normalizer=normalizer, token_weights=constants, segment_ids=segment_ids, xp=jnp)  # type: ignore[no-any-return]

    detached = {name: jax.lax.stop_gradient(array) for name, array in tokens.items()}
    return reduce(losses), diagnostics(objective, **detached, mask=mask, divergence=divergence, xp=jnp)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _token_loss(
    objective: Objective,
    log_prob: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None,
    divergence: jax.Array | None,
) -> jax.Array:
    loss: jax.Array = token_loss_and_gradient(
        objective, log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=jnp
    ).loss
    return loss


# a forward rule: it is linear in the tangent, so JAX transposes it for reverse mode and keeps only the gradient
@_token_loss.defjvp
def _token_loss_jvp(objective: Objective, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    log_prob, behavior_log_prob, advantages, mask, divergence = primals
    result = token_loss_and_gradient(
        objective, log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=jnp
    )
    dtype = result.loss.dtype
    return result.loss, result.gradient.astype(dtype) * tangents[0].astype(dtype)


def _check_arrays(**arrays: object) -> None:
    """Raise for what is neither a JAX array nor None; the core names a None that it can't do without."""
    for name, array in arrays.items():
        if array is not None and not isinstance(array, jax.Array):
            msg = f"{name}: expected a jax.Array, got {type(array).__name__}"
            raise TypeError(msg)
