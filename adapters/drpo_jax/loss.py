"""Per-token and reduced policy losses whose derivative is the analytic gradient −A r w."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from drpo_core import TokenLoss, token_diagnostics, token_loss_and_gradient, token_mean
from drpo_core.diagnostics import Maximum, Minimum
from drpo_core.tokens import check_tokens
from drpo_core.reduction import reduction_coefficients
from drpo_jax.checks import check_jax_arrays
from drpo_jax.elementary import xp

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.reduction import Reduction

__all__ = ["coefficients_of", "policy_loss", "token_loss"]

# tokens that stay in the cache of a core
_BLOCK = 1 << 14


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
    check_jax_arrays(
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

    Only `log_prob` is differentiated, as in `token_loss`. With a reduction of drpo_core, the final gradient
    ∂(Σ m c L)/∂log π = −m c A r w is formed in one pass and is all that is kept. Meant to be called under `jit`.

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
    tokens = {"log_prob": log_prob, "behavior_log_prob": behavior_log_prob, "advantages": advantages}
    check_jax_arrays(**tokens, mask=mask, divergence=divergence, token_weights=token_weights, segment_ids=segment_ids)
    options: dict[str, Any] = {"normalizer": normalizer, "token_weights": token_weights, "segment_ids": segment_ids}
    _, dtype = check_tokens(**tokens, mask=mask, divergence=divergence, xp=xp)
    statistics = _diagnostics(objective, *jax.lax.stop_gradient((*tokens.values(), mask, divergence)))
    coefficients = reduction_coefficients(reduction, mask, dtype=dtype, **options, xp=xp)
    if coefficients is None:
        losses = token_loss(objective, **tokens, mask=mask, divergence=divergence)
        options["token_weights"] = jax.lax.stop_gradient(token_weights)

        # differentiated on its own, a reduction would keep arrays of the tokens' shape, some of them zeros
        @partial(jax.checkpoint, prevent_cse=False)
        def reduce(losses: jax.Array) -> jax.Array:
            return reduction(losses, mask, **options, xp=xp)  # type: ignore[no-any-return]

        return reduce(losses), statistics
    constants = jax.lax.stop_gradient((behavior_log_prob, advantages, mask, divergence, coefficients))
    return _reduced_loss(objective, log_prob, *constants), statistics


def coefficients_of(reduction: Reduction, mask: jax.Array, dtype: object, options: dict[str, Any]) -> jax.Array:
    """`reduction_coefficients`, or a TypeError for a reduction that has none."""
    coefficients = reduction_coefficients(reduction, mask, dtype=dtype, **options, xp=xp)
    if coefficients is None:
        msg = f"reduction: expected one of drpo_core's, whose coefficients are known beforehand, got {reduction!r}"
        raise TypeError(msg)
    return jax.lax.stop_gradient(coefficients)  # type: ignore[no-any-return]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _reduced_loss(
    objective: Objective,
    log_prob: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    divergence: jax.Array | None,
    coefficients: jax.Array,
) -> jax.Array:
    """Σ m c L."""
    spread = jnp.broadcast_to(coefficients, mask.shape) if coefficients.ndim else None

    def total(*arrays: Any) -> jax.Array:  # noqa: ANN401
        *tokens, mask, spread = arrays
        return jnp.sum(_weighted(objective, tokens, mask, coefficients if spread is None else spread).loss)

    result: jax.Array = _in_blocks(total, jnp.sum, (log_prob, behavior_log_prob, advantages, divergence, mask, spread))
    return result


# linear in the tangent, as that of `_token_loss`; what is kept is the final gradient. An expression of its own, and not an
# output of the sum's blocks: XLA fuses it to one loop wherever the tokens are, and differentiates it as the formula it is
@_reduced_loss.defjvp
def _reduced_loss_jvp(
    objective: Objective, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    log_prob, behavior_log_prob, advantages, mask, divergence, coefficients = primals
    gradient = _weighted(objective, (log_prob, behavior_log_prob, advantages, divergence), mask, coefficients).gradient
    return _reduced_loss(objective, *primals), jnp.sum(gradient * tangents[0].astype(gradient.dtype))


def _weighted(objective: Objective, tokens: Any, mask: jax.Array, coefficients: jax.Array) -> TokenLoss:  # noqa: ANN401
    """C L and c ∂L/∂log π, exactly 0 at masked tokens and, the gradient, where the weight is 0."""
    log_prob, behavior_log_prob, advantages, divergence = tokens
    result = token_loss_and_gradient(
        objective,
        log_prob.astype(coefficients.dtype),
        behavior_log_prob,
        advantages,
        mask=mask,
        divergence=divergence,
        xp=xp,
    )
    # a masked coefficient may be anything
    loss = jnp.where(mask, coefficients * result.loss, 0.0)
    return TokenLoss(loss, jnp.where(result.gradient == 0.0, 0.0, coefficients * result.gradient), result.weight)


def _diagnostics(objective: Objective, *arrays: Any) -> Diagnostics:  # noqa: ANN401
    """`drpo_core.diagnostics`, in blocks."""

    def statistics(*arrays: Any) -> Diagnostics:  # noqa: ANN401
        *tokens, mask, divergence = arrays
        return token_diagnostics(objective, *tokens, mask=mask, divergence=divergence, xp=xp)

    result: Diagnostics = _in_blocks(statistics, _merged, arrays)
    return result


def _merged(parts: Diagnostics) -> Diagnostics:
    """`drpo_core.merge_diagnostics` of parts whose fields are stacked to arrays."""
    merged = {}
    for name, part in parts.items():
        combine: Callable[[jax.Array], jax.Array] = jnp.sum
        if isinstance(part, (Maximum, Minimum)):
            combine = jnp.max if isinstance(part, Maximum) else jnp.min
        merged[name] = type(part)(combine(part[0]), *(jnp.sum(field) for field in part[1:]))
    return merged


def _in_blocks(function: Callable[..., Any], merge: Callable[[Any], Any], arrays: tuple[jax.Array | None, ...]) -> Any:  # noqa: ANN401
    """Figures of all tokens: on a CPU, those of blocks of tokens, merged; else of all of them at once.

    XLA's CPU compiler makes a loop of every sum, writes what it is going to sum to memory first, and reads the tokens
    again for the next: of a block, to and from the cache. It would also have the loops of the sums and of the gradient
    share intermediate results through memory, were all of the same shape.
    """
    size = arrays[0].size  # type: ignore[union-attr]
    if size <= _BLOCK:
        return function(*arrays)
    blocks, rest = divmod(size, _BLOCK)

    def by_block(*arrays: jax.Array | None) -> Any:  # noqa: ANN401
        flat = [None if a is None else a.reshape(-1) for a in arrays]

        def block(i: jax.Array) -> Any:  # noqa: ANN401
            return function(*(None if a is None else jax.lax.dynamic_slice_in_dim(a, i * _BLOCK, _BLOCK) for a in flat))

        parts = jax.lax.map(block, jnp.arange(blocks))
        if rest:
            last = function(*(None if a is None else a[-rest:] for a in flat))
            parts = jax.tree.map(jnp.append, parts, last)
        return merge(parts)

    return jax.lax.platform_dependent(*arrays, cpu=by_block, default=function)


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
        objective, log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=xp
    ).loss
    return loss


# a forward rule: it is linear in the tangent, so JAX transposes it for reverse mode and keeps only the gradient
@_token_loss.defjvp
def _token_loss_jvp(objective: Objective, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    log_prob, behavior_log_prob, advantages, mask, divergence = primals
    result = token_loss_and_gradient(
        objective, log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=xp
    )
    dtype = result.loss.dtype
    return result.loss, result.gradient.astype(dtype) * tangents[0].astype(dtype)
