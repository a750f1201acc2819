"""A batch's scalar loss with its final gradient and diagnostics, in one pass over the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from array_api_compat import is_numpy_namespace

from drpo_core.diagnostics import diagnostics_of
from drpo_core.gradient import gradient_of
from drpo_core.ratio import Tokens, check_tokens
from drpo_core.reduction import reduction_coefficients, token_mean
from drpo_core.trace import UntraceableError

if TYPE_CHECKING:
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.objectives import Objective
    from drpo_core.reduction import Reduction
    from drpo_core.types import Array, Bool, Float, Int, Namespace, Spread

__all__ = ["PolicyLoss", "policy_loss_and_gradient"]

ENGINES = ("plain", "jit")


class PolicyLoss(NamedTuple):
    """Scalar `loss`, its `gradient` in log π, and `diagnostics`, or None where they were not asked for."""

    loss: Array
    gradient: Array
    diagnostics: Diagnostics | None


def policy_loss_and_gradient(
    objective: Objective,
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"],
    reduction: Reduction = token_mean,
    normalizer: float | Array | None = None,
    token_weights: Float[Array, "*tokens"] | None = None,
    segment_ids: Int[Array, " tokens"] | None = None,
    divergence: Float[Array, "*tokens"] | None = None,
    diagnostics: bool = True,
    engine: Literal["plain", "jit"] = "plain",
    threads: int | None = None,
    spread: Spread | None = None,
    xp: Namespace | None = None,
) -> PolicyLoss:
    """Scalar loss Σ m c L of a batch, its gradient m c ∂L/∂log π = −m c A r w, and diagnostics, in one pass.

    The coefficients c are those of the reduction, so the gradient is final. NumPy arrays are worked on piece by piece: beyond
    the gradient, memory is that of a piece, unless the objective can't be traced (see `drpo_core.trace`).

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``.
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; (…, tokens) padded or (tokens,) packed.
        float16 and bfloat16 are computed in float32.
    mask
        True at tokens that count. Masked positions may hold anything, NaN included.
    reduction
        `drpo_core.token_mean`, `drpo_core.sequence_mean_token_mean` or `drpo_core.sequence_mean_token_sum` (with its
        horizon bound by `functools.partial`).
    normalizer
        Denominator of the whole batch, where this call sees a micro-batch or a shard of it.
    token_weights
        Constant factors of the per-token losses (truncated importance weights, say).
    segment_ids
        Of packed tokens: which sequence each belongs to.
    divergence
        Per-token divergence for ``DPPO(divergence="per_token")``.
    diagnostics
        Whether to compute them: what `drpo_core.diagnostics` returns, from the same pass.
    engine
        ``"plain"``: array operations, of any namespace. ``"jit"``: a loop compiled for the objective, which must be
        hashable, at the first call; NumPy arrays and the extra `jit` only. See `drpo_core.jit`.
    threads
        Of the compiled loop; default: the CPUs this process may use. The result does not depend on it.
    spread
        ``spread(run, count, threads)`` calls ``run(first, last)`` for shares that cover ``range(count)``, on so many threads
        at most; `run` releases the GIL. Default: on a pool of this library's. The torch adapter gives torch's own threads.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    PolicyLoss
        `loss` 0-d, `gradient` in the shape and dtype of `log_prob`, and `diagnostics`.

    Raises
    ------
    TypeError
        If an array is not real floating-point, the mask is not boolean, or the reduction is not one of those above.
    ValueError
        If the shapes differ, the normalizer is negative or not finite, or the engine is unknown.
    ImportError
        If ``engine="jit"`` finds no numba.
    UntraceableError
        If ``engine="jit"`` can't compile what the objective does; ``engine="plain"`` runs any.

    References
    ----------
    `docs/derivations/index.md`: an objective is its gradient weight.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import DRPO, policy_loss_and_gradient, summarize
    >>> log_prob, behavior = np.log([[0.5, 0.2, 0.3]]), np.log([[0.25, 0.2, np.nan]])
    >>> advantages, mask = np.array([[1.0, 1.0, -1.0]]), np.array([[True, True, False]])
    >>> result = policy_loss_and_gradient(DRPO(delta=0.5), log_prob, behavior, advantages, mask=mask)
    >>> float(result.loss.round(6)), result.gradient.round(6).tolist()
    (-1.375, [[-0.5, -0.5, 0.0]])
    >>> summarize(result.diagnostics)["attenuated_fraction"]
    0.5
    """
    if engine not in ENGINES:
        msg = f"engine: expected 'plain' or 'jit', got {engine!r}"
        raise ValueError(msg)
    xp, dtype = check_tokens(log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=xp)
    coefficients = reduction_coefficients(
        reduction, mask, dtype=dtype, normalizer=normalizer, token_weights=token_weights, segment_ids=segment_ids, xp=xp
    )
    if coefficients is None:
        msg = (
            "reduction: expected token_mean, sequence_mean_token_mean or sequence_mean_token_sum, "
            f"whose gradient is known, got {reduction!r}"
        )
        raise TypeError(msg)
    arrays = (log_prob, behavior_log_prob, advantages, mask, coefficients, divergence)
    if engine == "jit":
        return _compiled(objective, *arrays, dtype=dtype, diagnostics=diagnostics, threads=threads, spread=spread, xp=xp)
    if is_numpy_namespace(xp):
        return _in_pieces(objective, *arrays, dtype=dtype, diagnostics=diagnostics)
    result = policy_loss_of(objective, *arrays, dtype=dtype, diagnostics=diagnostics, xp=xp)
    return result._replace(gradient=xp.astype(result.gradient, log_prob.dtype, copy=False))


def policy_loss_of(
    objective: Objective,
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    mask: Bool[Array, "*tokens"],
    coefficients: Float[Array, "..."],
    divergence: Float[Array, "*tokens"] | None,
    *,
    dtype: object,
    diagnostics: bool,
    select: bool = True,
    xp: Namespace,
) -> PolicyLoss:
    """Σ m c L and m c ∂L/∂log π of some of a batch's tokens, in one dtype; checks nothing.

    It is all that a fast path has to run, whatever the objective: chunk by chunk, compiled, or traced. What is returned is
    selected by the mask; without `select`, what is computed with is not, which is as good unless the result is
    differentiated again or the namespace warns of NaN.
    """
    log_prob, behavior_log_prob, advantages = (
        xp.astype(array, dtype, copy=False) for array in (log_prob, behavior_log_prob, advantages)
    )
    if divergence is not None:
        divergence = xp.astype(divergence, dtype, copy=False)
    tokens = Tokens.selected(
        log_prob, behavior_log_prob, advantages, mask=mask if select else None, divergence=divergence, xp=xp
    )
    weight = objective.weight(tokens)
    return PolicyLoss(
        xp.sum(xp.where(mask, coefficients * objective.loss(tokens), 0.0)),
        gradient_of(tokens, weight, mask=mask, coefficients=coefficients),
        diagnostics_of(tokens, weight, objective.inside(tokens), mask) if diagnostics else None,
    )


def _in_pieces(objective: Objective, log_prob: Array, *others: Array | None, dtype: Any, diagnostics: bool) -> PolicyLoss:
    """`policy_loss_of` of NumPy arrays by `replay`, or at once for an objective that can't be traced."""
    from drpo_core.numpy_operations import LIBRARY, PIECE  # noqa: PLC0415 - what it imports imports this module
    from drpo_core.replay import replay  # noqa: PLC0415

    xp, arrays = LIBRARY.xp, (log_prob, *others)
    gradient = xp.empty(log_prob.shape, dtype=log_prob.dtype)
    if gradient.size:
        try:
            # what masked positions hold is computed with, but not selected
            with np.errstate(all="ignore"):
                loss, statistics = replay(
                    objective, arrays, gradient, dtype, diagnostics=diagnostics, size=PIECE, library=LIBRARY
                )
        except UntraceableError:
            pass
        else:
            return PolicyLoss(loss, gradient, statistics)
    result = policy_loss_of(objective, *arrays, dtype=dtype, diagnostics=diagnostics, xp=xp)
    return result._replace(gradient=xp.astype(result.gradient, log_prob.dtype, copy=False))


def _size(array: Array) -> int:
    size = 1
    for extent in array.shape:
        size *= extent
    return size


def _compiled(
    objective: Objective,
    log_prob: Array,
    behavior_log_prob: Array,
    advantages: Array,
    mask: Array,
    coefficients: Array,
    divergence: Array | None,
    *,
    dtype: Any,
    diagnostics: bool,
    threads: int | None,
    spread: Spread | None,
    xp: Namespace,
) -> PolicyLoss:
    if not is_numpy_namespace(xp):
        msg = f"engine: 'jit' compiles for NumPy arrays, got {type(log_prob).__module__}.{type(log_prob).__name__}"
        raise ValueError(msg)
    try:
        from drpo_core.jit import fused  # noqa: PLC0415 - numba is an extra
    except ImportError as error:
        msg = "engine: 'jit' needs numba: pip install 'drpo-core[jit]'"
        raise ImportError(msg) from error

    def flat(array: Array, dtype: Any = dtype) -> Array:
        return xp.reshape(xp.asarray(array, dtype=dtype, order="C"), (-1,))

    gradient = xp.empty(_size(log_prob), dtype=dtype)
    loss, statistics = fused(objective, dtype=dtype, diagnostics=diagnostics)(
        flat(log_prob),
        flat(behavior_log_prob),
        flat(advantages),
        flat(mask, xp.bool),
        flat(coefficients),
        divergence=None if divergence is None else flat(divergence),
        gradient=gradient,
        threads=threads,
        spread=spread,
    )
    gradient = xp.astype(xp.reshape(gradient, log_prob.shape), log_prob.dtype, copy=False)
    return PolicyLoss(loss, gradient, statistics)
