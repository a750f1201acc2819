"""A batch's scalar loss with its final gradient and diagnostics, in one pass over the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from array_api_compat import is_numpy_namespace

from drpo_core.diagnostics import diagnostics_of, merge_stacked
from drpo_core.gradient import gradient_of
from drpo_core.ratio import Tokens, check_tokens
from drpo_core.reduction import reduction_coefficients, token_mean
from drpo_core.selection import SelectingNamespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drpo_core.diagnostics import Diagnostics
    from drpo_core.objectives import Objective
    from drpo_core.reduction import Reduction
    from drpo_core.types import Array, Bool, Float, Int, Namespace, Spread

__all__ = ["PolicyLoss", "policy_loss_and_gradient"]

ENGINES = ("plain", "jit")

CHUNK = 32768
"""Tokens whose intermediate results, a few dozen arrays, stay in the cache of a core."""


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

    The coefficients c are those of the reduction, so the gradient is final. NumPy arrays are worked on chunk by chunk:
    beyond the gradient, memory is that of a chunk.

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
        gradient = xp.empty(log_prob.shape, dtype=log_prob.dtype)
        selecting = SelectingNamespace(xp)
        loss, statistics = in_chunks(objective, *arrays, gradient, dtype=dtype, diagnostics=diagnostics, xp=selecting)
        return PolicyLoss(loss, gradient, statistics)
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


def in_chunks(
    objective: Objective,
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    mask: Bool[Array, "*tokens"],
    coefficients: Float[Array, "..."],
    divergence: Float[Array, "*tokens"] | None,
    gradient: Float[Array, "*tokens"],
    *,
    dtype: object,
    diagnostics: bool,
    chunk: int | None = None,
    xp: Namespace,
) -> tuple[Array, Diagnostics | None]:
    """`policy_loss_of` chunk by chunk, for a namespace whose arrays can be assigned to: the gradient is written."""
    n, count = _size(log_prob), _size(coefficients)
    # tokens that share a coefficient make a row; if none do, all tokens make one
    rows = 1 if count == n else count
    columns = n // rows if rows else 0
    coefficients = xp.reshape(coefficients, (1, n) if count == n else (count, 1))

    def matrix(array: Array) -> Array:
        return xp.reshape(array, (rows, columns))

    x, b, a, m = (matrix(array) for array in (log_prob, behavior_log_prob, advantages, mask))
    d = None if divergence is None else matrix(divergence)
    target = matrix(gradient)
    parts = []
    for part in _chunks(rows, columns, CHUNK if chunk is None else chunk):
        c = coefficients[part] if count == n else coefficients[part[0], :]
        measured = None if d is None else d[part]
        result = policy_loss_of(
            objective, x[part], b[part], a[part], m[part], c, measured, dtype=dtype, diagnostics=diagnostics, xp=xp
        )
        target[part] = result.gradient
        parts.append((result.loss, result.diagnostics))
    losses, statistics = zip(*parts, strict=True)
    return xp.sum(xp.stack(losses)), merge_stacked(statistics, xp=xp) if diagnostics else None


def _chunks(rows: int, columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a matrix of about `size` elements, contiguous in memory; one, if it has none."""
    step = max(1, size // max(columns, 1))
    for row in range(0, max(rows, 1), step):
        for column in range(0, max(columns, 1), size):
            yield slice(row, row + step), slice(column, column + size)


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
