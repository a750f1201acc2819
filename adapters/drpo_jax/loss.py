"""Per-token and reduced policy losses whose derivative is the analytic gradient −A r w."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from drpo_core import token_loss_and_gradient
from drpo_core._sequences import Sequences
from drpo_core.diagnostics import Maximum, Minimum, combine_diagnostics, map_diagnostics
from drpo_core.loss import PolicyLoss, is_elementwise, policy_pass, reduction_of
from drpo_core.modes.mode import Mode, penalty_gradient, resolve
from drpo_core.objectives.protocol import check_objective
from drpo_core.reduction import reduction_coefficients
from drpo_core.tokens import check_tokens
from drpo_jax._checks import check_jax_arrays, working_dtype
from drpo_jax._namespace import unreduced, xp
from drpo_jax._sharding import is_explicitly_sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drpo_core import Objective, TokenLoss
    from drpo_core._sequences import Across
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.modes.mode import Resolved
    from drpo_core.reduction import Reduction

__all__ = ["policy_loss", "token_loss"]

_CHUNK = 1 << 15
"""Tokens at a time on a CPU: their intermediate results stay in a core's cache."""


def token_loss(
    objective: Objective,
    *,
    log_prob: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    proximal_log_prob: jax.Array | None = None,
    reference_log_prob: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    divergence: jax.Array | None = None,
    across: Across | None = None,
) -> jax.Array:
    """Unreduced loss L of an objective, with ∂L/∂log π = −A r w as its derivative.

    Only `log_prob` is differentiated, in forward and reverse mode; the other arrays are constants. Only the gradient is
    kept for the backward pass. A second derivative is that of the formula −A r w. Works under `jit`, `vmap`, `grad` and
    `shard_map`, on explicit mesh axes, and with x64 on or off.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode`, whose reduction is left to you; static and
        hashable under `jit`.
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
    mask
        Boolean, True at tokens that count; the others may hold anything and have loss and gradient 0.
    proximal_log_prob, reference_log_prob
        log π_old and log π_ref of the sampled tokens, where the mode needs them.
    segment_ids
        Of packed tokens: which sequence each belongs to, for a mode that looks at sequences.
    divergence
        Per-token divergence for ``DPPO(divergence="per_token")``.
    across
        Where sequences are divided over devices: see `drpo_jax.distributed.across`.

    Returns
    -------
    jax.Array
        L per token, float32 at least.

    Raises
    ------
    TypeError
        If an array is not a JAX array or has a wrong dtype.
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
    arrays = {"log_prob": log_prob, "behavior_log_prob": behavior_log_prob, "advantages": advantages}
    others = {"proximal_log_prob": proximal_log_prob, "reference_log_prob": reference_log_prob}
    check_jax_arrays(**arrays, mask=mask, divergence=divergence, segment_ids=segment_ids, **others)
    check_objective(objective)
    _, dtype = check_tokens(**arrays, mask=mask, divergence=divergence, xp=xp)
    sequences = {"segment_ids": segment_ids, "across": across}
    mode = _resolved(objective, **arrays, **others, **sequences, mask=mask, diagnostics=False, dtype=dtype)
    if isinstance(objective, Mode):
        # the gradients of the objective and of its penalties are rounded together
        log_prob = log_prob if mode.penalty is None else log_prob.astype(dtype)
        against: dict[str, Any] = arrays | {"log_prob": log_prob, "behavior_log_prob": mode.anchor_log_prob}
        kept = mask
        if mode.factor is not None:
            # what a correction leaves out is masked: 0 times its loss, or times its derivative, could be a NaN
            nonzero = jnp.broadcast_to(mode.factor != 0.0, log_prob.shape)
            kept = nonzero if mask is None else mask & nonzero
        loss = token_loss(mode.objective, **against, mask=kept, divergence=divergence)
        loss = loss if mode.factor is None else mode.factor * loss
        given: dict[str, Any] = arrays | others | sequences | {"log_prob": log_prob}
        penalty = _penalty_loss(objective, mode, **given, mask=mask, dtype=dtype)
        return loss if penalty is None else loss + penalty

    def run(log_prob: jax.Array, *constants: Any) -> TokenLoss:  # noqa: ANN401 -- the other arrays
        behavior_log_prob, advantages, mask, divergence = constants
        return token_loss_and_gradient(
            objective, log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=xp
        )

    log_prob = _in_working_dtype(log_prob, behavior_log_prob, advantages, divergence)
    constants = jax.lax.stop_gradient((behavior_log_prob, advantages, mask, divergence))
    result = run(jax.lax.stop_gradient(log_prob), *constants)
    return attached(lambda *arrays: run(*arrays).gradient, result.loss, result.gradient, log_prob, constants)


def policy_loss(
    objective: Objective,
    *,
    log_prob: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    proximal_log_prob: jax.Array | None = None,
    reference_log_prob: jax.Array | None = None,
    reduction: Reduction | None = None,
    normalizer: float | jax.Array | None = None,
    token_weights: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    divergence: jax.Array | None = None,
    diagnostics: bool = True,
    across: Across | None = None,
) -> tuple[jax.Array, Diagnostics | None]:
    """Scalar loss Σ m c L of a batch of tokens to differentiate, and diagnostics (for `has_aux=True`).

    Only `log_prob` is differentiated, as in `token_loss`. The coefficients c are those of the reduction, so that one pass
    gives loss, diagnostics and the final gradient −m c A r w, which is all that is kept for the backward pass. A second
    derivative is that of this formula. Meant to be called under `jit`.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode`; static and hashable under `jit`.
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; (sequences, tokens) padded or (tokens,) packed.
    mask
        Boolean, True at tokens that count; the others may hold anything.
    proximal_log_prob, reference_log_prob
        log π_old and log π_ref of the sampled tokens, where the mode needs them.
    reduction
        `drpo_core.token_mean`, `drpo_core.sequence_mean_token_mean`, `drpo_core.sequence_mean_token_sum` or
        `drpo_core.reduction.prompt_mean`, also with arguments bound by `functools.partial`; or a `linear_reduction`. Reduce
        `token_loss` yourself by what is not linear. None: the mode's own, or the mean over tokens.
    normalizer
        Denominator of the whole batch, where this call sees a micro-batch or a shard of it: a number or a 0-d array.
    token_weights
        Constant factors of the per-token losses (truncated importance weights, say).
    segment_ids
        Of packed tokens: which sequence each belongs to.
    divergence
        Per-token divergence for ``DPPO(divergence="per_token")``.
    diagnostics
        Also compute them, in the pass that gives the loss.
    across
        Where sequences are divided over devices: see `drpo_jax.distributed.across`.

    Returns
    -------
    loss : jax.Array
        0-d, float32 at least.
    diagnostics : dict or None
        See `drpo_core.token_diagnostics`; a pytree of 0-d arrays. None where they were not asked for.

    Raises
    ------
    TypeError
        If an array is not a JAX array or has a wrong dtype, or the reduction is unknown.
    ValueError
        If the shapes differ, or the normalizer is negative or not finite.

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
    others: dict[str, Any] = {"proximal_log_prob": proximal_log_prob, "reference_log_prob": reference_log_prob}
    check_jax_arrays(
        **tokens, **others, mask=mask, divergence=divergence, token_weights=token_weights, segment_ids=segment_ids
    )
    check_objective(objective)
    _, dtype = check_tokens(**tokens, mask=mask, divergence=divergence, xp=xp)
    options = {"normalizer": normalizer, "token_weights": token_weights, "segment_ids": segment_ids}
    return mode_loss(
        objective,
        **tokens,
        **others,
        mask=mask,
        divergence=divergence,
        reduction=reduction_of(objective, reduction, across=across),
        options=options,
        across=across,
        dtype=dtype,
        diagnostics=diagnostics,
    )


def mode_loss(
    objective: Objective,
    *,
    log_prob: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    proximal_log_prob: jax.Array | None,
    reference_log_prob: jax.Array | None,
    divergence: jax.Array | None,
    reduction: Reduction,
    options: dict[str, Any],
    across: Across | None = None,
    dtype: Any,  # noqa: ANN401 -- a dtype of the namespace
    diagnostics: bool,
) -> tuple[jax.Array, Diagnostics | None]:
    """`policy_loss` of checked arguments, of which `options` are the reduction's own."""
    tokens = {"log_prob": log_prob, "behavior_log_prob": behavior_log_prob, "advantages": advantages}
    others = {"proximal_log_prob": proximal_log_prob, "reference_log_prob": reference_log_prob}
    sequences = {"segment_ids": options["segment_ids"], "across": across}
    mode = _resolved(objective, **tokens, **others, **sequences, mask=mask, diagnostics=diagnostics, dtype=dtype)
    coefficients = reduction_coefficients(reduction, mode.counted, dtype=dtype, **options, xp=xp)
    # the gradients of the objective and of its penalties are rounded together
    log_prob = log_prob if mode.penalty is None else log_prob.astype(dtype)
    arrays = (log_prob, mode.anchor_log_prob, advantages, mask, mode.scaled(coefficients), divergence)
    loss, statistics = checked_policy_loss(mode.objective, *arrays, dtype=dtype, diagnostics=diagnostics)
    given: dict[str, Any] = tokens | others | sequences | {"log_prob": log_prob}
    penalty = _penalty_loss(objective, mode, **given, mask=mask, dtype=dtype)
    if penalty is not None:
        constant = jax.lax.stop_gradient(coefficients)
        loss = loss + jnp.sum(jnp.where(mode.counted, constant * penalty, 0.0))
    return loss, None if statistics is None else statistics | mode.diagnostics


def _resolved(objective: Objective, **arguments: Any) -> Resolved:  # noqa: ANN401 -- those of `resolve`
    """The objective or mode for these tokens, as constants."""
    constants: dict[str, Any] = {k: jax.lax.stop_gradient(v) if isinstance(v, jax.Array) else v for k, v in arguments.items()}
    return resolve(objective, **constants, xp=xp)


def _penalty_loss(
    objective: Any,  # noqa: ANN401 -- a mode, if there is a penalty
    mode: Resolved,
    *,
    log_prob: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    proximal_log_prob: jax.Array | None,
    reference_log_prob: jax.Array | None,
    segment_ids: jax.Array | None,
    across: Across | None,
    mask: jax.Array | None,
    dtype: Any,  # noqa: ANN401 -- a dtype of the namespace
) -> jax.Array | None:
    """The penalties per token, whose derivative is the gradient that they claim; None where there are none."""
    if mode.penalty is None:
        return None
    where = jnp.ones_like(log_prob, dtype=bool) if mask is None else mask
    others = (behavior_log_prob, proximal_log_prob, reference_log_prob)
    constants = jax.lax.stop_gradient((*others, advantages, segment_ids, where, mode.counted))

    def gradient(log_prob: jax.Array, *constants: Any) -> jax.Array:  # noqa: ANN401 -- the other arrays
        *others, advantages, segment_ids, where, counted = constants
        batch: dict[str, Any] = {"advantages": advantages, "sequences": Sequences(where, segment_ids, across=across, xp=xp)}
        found: jax.Array = penalty_gradient(objective, log_prob, *others, **batch, dtype=dtype)
        return jnp.where(counted, found, 0.0)

    value, slope = (jnp.where(mode.counted, each, 0.0) for each in mode.penalty)
    return attached(gradient, value, slope, log_prob.astype(dtype), constants)


def checked_policy_loss(
    objective: Objective,
    log_prob: jax.Array,
    *constants: Any,  # noqa: ANN401 -- the other arrays of `policy_pass`
    dtype: Any,  # noqa: ANN401 -- a dtype of the namespace
    diagnostics: bool,
) -> tuple[jax.Array, Diagnostics | None]:
    """Σ m c L, differentiable in `log_prob`, and diagnostics; checks nothing."""
    run = partial(policy_pass, objective, dtype=dtype, xp=xp)
    constants = jax.lax.stop_gradient(constants)
    # not to be differentiated: out of a loop that is, JAX moves the constants, as arrays that every round then reads
    arrays = (jax.lax.stop_gradient(log_prob), *constants)
    in_chunks = log_prob.size > _CHUNK and not is_explicitly_sharded(arrays) and is_elementwise(objective)
    result = _in_chunks(run, *arrays, diagnostics=diagnostics) if in_chunks else run(*arrays, diagnostics=diagnostics)

    def gradient(*arrays: Any) -> jax.Array:  # noqa: ANN401 -- those of `policy_pass`
        return run(*arrays, diagnostics=False).gradient  # type: ignore[no-any-return]

    return attached(gradient, result.loss, result.gradient, log_prob, constants), result.diagnostics


def _in_chunks(run: Callable[..., PolicyLoss], *arrays: Any, diagnostics: bool) -> PolicyLoss:  # noqa: ANN401
    """``run(*arrays, diagnostics=diagnostics)``, a pass over many tokens, whose sums a CPU takes chunk by chunk.

    XLA's CPU compiler makes a loop of every sum. It writes what it is going to sum to memory first, and reads the tokens
    again for the next sum: those of a chunk, to and from the cache. The gradient is no output of the chunks, because
    XLA fuses it to one loop of its own, wherever the tokens are.
    """

    def on_cpu(*arrays: Any) -> PolicyLoss:  # noqa: ANN401 -- those of `policy_pass`
        *tokens, coefficients, divergence = arrays
        spread = jnp.broadcast_to(coefficients, tokens[0].shape) if coefficients.ndim else None
        flat = [None if a is None else a.reshape(-1) for a in (*tokens, spread, divergence)]
        chunks, rest = divmod(tokens[0].size, _CHUNK)

        def sums(*chunk: Any) -> tuple[jax.Array, Diagnostics | None]:  # noqa: ANN401
            *tokens, spread, divergence = chunk
            result = run(*tokens, coefficients if spread is None else spread, divergence, diagnostics=diagnostics)
            return result.loss, result.diagnostics

        def chunk(i: jax.Array) -> tuple[jax.Array, Diagnostics | None]:
            return sums(*(None if a is None else jax.lax.dynamic_slice_in_dim(a, i * _CHUNK, _CHUNK) for a in flat))

        parts = jax.lax.map(chunk, jnp.arange(chunks))
        if rest:
            parts = jax.tree.map(jnp.append, parts, sums(*(None if a is None else a[-rest:] for a in flat)))
        losses, statistics = parts
        gradient = run(*arrays, diagnostics=False).gradient
        return PolicyLoss(jnp.sum(losses), gradient, combine_diagnostics(statistics, xp=jnp) if diagnostics else None)

    together = partial(_in_one_reduction, run, diagnostics=diagnostics)
    return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=together)  # type: ignore[no-any-return]


_SUM = (jax.lax.add, 0.0)
_EXTREMES: dict[type, tuple[Callable[..., jax.Array], float]] = {
    Maximum: (jax.lax.max, -jnp.inf),
    Minimum: (jax.lax.min, jnp.inf),
}
"""How the first fields of statistics are combined, and what combining with has no effect."""


def _in_one_reduction(run: Callable[..., PolicyLoss], *arrays: Any, diagnostics: bool) -> PolicyLoss:  # noqa: ANN401
    """``run(*arrays, diagnostics=diagnostics)``, a pass over tokens, whose sums and extremes are one reduction.

    Of many reductions of the same tokens, XLA's compiler for GPUs makes many kernels, and writes to memory what they share.
    """
    loss, gradient, statistics = run(*arrays, diagnostics=diagnostics, xp=unreduced)
    # by identity, because statistics have counts in common
    found = {id(loss): (loss, *_SUM)}
    for statistic in (statistics or {}).values():
        first, *others = statistic
        found[id(first)] = (first, *_EXTREMES.get(type(statistic), _SUM))
        found |= {id(field): (field, *_SUM) for field in others}
    figures, operations, starts = zip(*found.values(), strict=True)

    def combined(one: Sequence[jax.Array], other: Sequence[jax.Array]) -> list[jax.Array]:
        return [operation(a, b) for operation, a, b in zip(operations, one, other, strict=True)]

    initial = tuple(jnp.asarray(start, figure.dtype) for figure, start in zip(figures, starts, strict=True))
    totals = dict(zip(found, jax.lax.reduce(figures, initial, combined, tuple(range(loss.ndim))), strict=True))
    reduced = None if statistics is None else map_diagnostics(lambda field: totals[id(field)], statistics)
    return PolicyLoss(totals[id(loss)], gradient, reduced)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def attached(
    formula: Callable[..., jax.Array],  # noqa: ARG001 -- for the derivative of the gradient
    loss: jax.Array,
    gradient: jax.Array,  # noqa: ARG001 -- for the derivative
    log_prob: jax.Array,  # noqa: ARG001
    constants: tuple[jax.Array | None, ...],  # noqa: ARG001
) -> jax.Array:
    """The loss, of which `gradient` is the derivative in `log_prob`: per token, or of their sum."""
    return loss


# a forward rule, linear in the tangent: JAX transposes it for reverse mode and keeps only the gradient
@attached.defjvp
def attached_jvp(
    formula: Callable[..., jax.Array], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    loss, *others = primals
    gradient = _gradient(formula, *others)
    change = gradient * tangents[2].astype(gradient.dtype)
    return attached(formula, *primals), change if change.shape == loss.shape else jnp.sum(change)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradient(
    formula: Callable[..., jax.Array],  # noqa: ARG001 -- for the derivative
    gradient: jax.Array,
    log_prob: jax.Array,  # noqa: ARG001
    constants: tuple[jax.Array | None, ...],  # noqa: ARG001
) -> jax.Array:
    """The gradient, whose derivative is that of the formula by which it was computed."""
    return gradient


@_gradient.defjvp
def _gradient_jvp(
    formula: Callable[..., jax.Array], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    _, log_prob, constants = primals
    _, change = jax.jvp(lambda x: formula(x, *constants), (log_prob,), (tangents[1],))
    return _gradient(formula, *primals), change


def _in_working_dtype(log_prob: Any, *others: jax.Array | None) -> Any:  # noqa: ANN401 -- None is left to the checks
    """`log_prob` in the dtype of the arithmetic, in which its gradient is then kept; anything but floats as it is."""
    if log_prob is None or not jnp.issubdtype(log_prob.dtype, jnp.floating):
        return log_prob
    dtype = working_dtype(*(a for a in (log_prob, *others) if a is not None))
    return log_prob if log_prob.dtype == dtype else log_prob.astype(dtype)
