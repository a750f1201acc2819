"""From logits: log-probs of the sampled tokens, entropy, and policy losses with their gradient, without a log-softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from drpo_core import token_mean
from drpo_torch.batch import TokenBatch, VocabularyLoss
from drpo_torch.cotangent import scaled_by_cotangent
from drpo_torch.divergence import (
    FullDivergence,
    check_float,
    check_positive,
    check_same_shape,
    is_jit,
    refuse_second_derivative,
)
from drpo_torch.softmax import Tempering, Workspace, eager, gradient_of_logits, normalize

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core import Objective
    from drpo_core.reduction import Reduction
    from drpo_torch.batch import Divergence

__all__ = ["SelectedLogProb", "logits_policy_loss", "selective_log_prob"]

# rows whose softmaxes are kept between the two passes: few enough for the last-level cache, many for one objective call
_CHUNK_BYTES = 16 << 20


class SelectedLogProb(NamedTuple):
    """Per token, in nats: `log_prob` of the sampled token, `entropy` of its distribution (or None), `log_normalizer`."""

    log_prob: torch.Tensor
    entropy: torch.Tensor | None
    log_normalizer: torch.Tensor


@eager
def selective_log_prob(
    *,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    overwrite_logits: bool = False,
    engine: Literal["eager", "jit"] = "eager",
) -> SelectedLogProb:
    """Log-prob log π of each sampled token, π = softmax(logits / temperature), differentiable, without a log-softmax.

    The softmax exists for a few rows at a time; the backward pass recomputes it. Rows that no cotangent reaches are
    skipped there, whatever they hold: their gradient is 0.

    Parameters
    ----------
    logits
        (…, V); −inf is a probability of 0. float16 and bfloat16 are computed in float32.
    tokens
        Ids of the sampled tokens, (…).
    temperature
        T > 0.
    entropy
        Whether to compute the entropy −Σ_v π log π too.
    overwrite_logits
        Let the backward pass put ∂/∂logits in the storage of the logits instead of one of its own. Nothing else may
        need the logits then; autograd raises if something did.
    engine
        ``"eager"``: torch's operations. ``"jit"``: the softmaxes and their gradient as loops that numba compiles in a second
        or two, once a process; CPU only, extra `jit`.

    Returns
    -------
    SelectedLogProb
        `log_prob`, `entropy` and `log_normalizer` = log Σ_v e^(logits/T), (…), float32 at least.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes disagree, the temperature is not finite and positive, or the engine is unknown or can't take these
        logits.
    ImportError
        If ``engine="jit"`` finds no numba.
    RuntimeError
        On a second derivative, which is not implemented.

    Examples
    --------
    >>> import torch
    >>> from drpo_torch import selective_log_prob
    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_()
    >>> selected = selective_log_prob(logits=logits, tokens=torch.tensor([0]), entropy=True)
    >>> selected.log_prob.sum().backward()
    >>> logits.grad
    tensor([[ 0.5000, -0.3000, -0.2000]])
    """
    tempering = _check_logits(logits, temperature)
    check_same_shape("tokens", tokens, "logits without V", logits.shape[:-1])
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        msg = f"tokens: expected an integral dtype, got {tokens.dtype}"
        raise TypeError(msg)
    flat = logits.reshape(-1, logits.shape[-1])
    function = _SelectiveLogProbJit if _takes_rows(engine, flat) else _SelectiveLogProb
    outputs = function.apply(flat, tokens.reshape(-1), tempering, entropy, overwrite_logits)  # type: ignore[no-untyped-call]
    log_prob, log_normalizer, entropies = (None if o is None else o.reshape(tokens.shape) for o in outputs)
    return SelectedLogProb(log_prob, entropies, log_normalizer)  # type: ignore[arg-type]


@eager
def logits_policy_loss(
    objective: Objective,
    *,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    behavior_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    reduction: Reduction = token_mean,
    normalizer: float | torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    divergence: Divergence | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    overwrite_logits: bool = False,
    engine: Literal["eager", "jit"] = "eager",
) -> VocabularyLoss:
    """Policy loss of tokens from logits; ∂loss/∂logits is formed in the forward pass, in one sweep.

    ∂L/∂logits(v) = c g (1[v = token] − π(v)) / T with g = ∂L/∂log π = −A r w, and c the token's share in the reduction.
    Beside that gradient nothing of the size of the logits exists; with `overwrite_logits` not even the gradient.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``.
    logits
        (…, V); −inf is a probability of 0. float16 and bfloat16 are computed in float32.
    tokens
        Ids of the sampled tokens, (…); anything where the mask is False.
    behavior_log_prob, advantages
        log μ (nats, ≤ 0) and A of the sampled tokens; (…).
    mask
        Boolean, (…), True at tokens that count. The others may hold anything, also in their logits.
    reduction, normalizer, token_weights, segment_ids
        See `drpo_torch.policy_loss`; the reduction is one of drpo_core's.
    divergence
        For ``DPPO(divergence="per_token")``: a divergence per token, or a `TopKDivergence` or `FullDivergence` to measure.
    temperature
        π = softmax(logits / temperature).
    entropy
        Whether to return the entropies too.
    overwrite_logits
        Put the gradient in the storage of the logits, at once. Nothing else may need the logits then; autograd raises if
        something did.
    engine
        ``"eager"``: torch's operations. ``"jit"``: the softmaxes and their gradient as loops that numba compiles in a second
        or two, once a process; CPU only, extra `jit`.

    Returns
    -------
    VocabularyLoss
        `loss` (0-d, float32 at least), `diagnostics`, `log_prob` and `entropy`.

    Raises
    ------
    TypeError
        If a dtype or the reduction is wrong.
    ValueError
        If shapes disagree, the temperature is not finite and positive, a valid token's id is outside the vocabulary, or the
        engine is unknown or can't take these logits.
    ImportError
        If ``engine="jit"`` finds no numba.
    RuntimeError
        On a second derivative, which is not implemented.

    See Also
    --------
    drpo_torch.linear_policy_loss : the same from hidden states, where the logits never exist as a whole.

    Examples
    --------
    >>> import torch
    >>> from drpo_core import DRPO
    >>> from drpo_torch import logits_policy_loss
    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_()
    >>> result = logits_policy_loss(
    ...     DRPO(delta=0.5),
    ...     logits=logits,
    ...     tokens=torch.tensor([0]),
    ...     behavior_log_prob=torch.tensor([0.25]).log(),
    ...     advantages=torch.tensor([1.0]),
    ...     mask=torch.tensor([True]),
    ... )
    >>> result.loss.backward()
    >>> logits.grad
    tensor([[-0.5000,  0.3000,  0.2000]])
    """
    tempering = _check_logits(logits, temperature)
    flat = logits.reshape(-1, logits.shape[-1])
    jit = _takes_rows(engine, flat)
    batch = TokenBatch(
        objective,
        leading=logits.shape[:-1],
        vocabulary=flat.shape[-1],
        dtype=logits.dtype,
        tokens=tokens,
        behavior_log_prob=behavior_log_prob,
        advantages=advantages,
        mask=mask,
        reduction=reduction,
        normalizer=normalizer,
        token_weights=token_weights,
        segment_ids=segment_ids,
        divergence=divergence,
        entropy=entropy,
        jit=jit,
    )
    if not (flat.requires_grad and torch.is_grad_enabled()):
        with torch.no_grad():
            _sweep_of(batch)(batch, flat, tempering, needed=False, overwrite=False)
            return batch.result()
    loss = _LogitsPolicyLoss.apply(flat, batch, tempering, overwrite_logits)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return batch.result()._replace(loss=loss)


def _takes_rows(engine: str, flat: torch.Tensor) -> bool:
    """Whether the loops are asked for, and the logits of a row lie one after the other, as these need them."""
    return is_jit(engine, flat) and flat.stride(-1) == 1


def _sweep_of(batch: TokenBatch) -> Callable[..., torch.Tensor | None]:
    return _sweep_in_loops if batch.jit else _sweep


def _sweep_in_loops(
    batch: TokenBatch, logits: torch.Tensor, tempering: Tempering, *, needed: bool, overwrite: bool
) -> torch.Tensor | None:
    """`_sweep`, compiled: a softmax is not kept but taken again for the gradient, which costs no more than to read it."""
    from drpo_torch.rows import row_gradients, row_statistics  # noqa: PLC0415 -- numba is an extra, and slow to import

    gradient = (logits if overwrite else torch.empty_like(logits)) if needed else None
    full = isinstance(batch.divergence, FullDivergence)
    # all at once, where no rows have to be copied
    chunk = _CHUNK_BYTES // (logits.shape[-1] * logits.element_size()) if full else len(batch.valid)
    for rows in batch.chunks(max(1, chunk)):
        columns = batch.columns(rows)
        measured = batch.full_divergence(rows, logits[rows], tempering) if full else None
        statistics = row_statistics(logits, rows, tempering.temperature)
        normalizer = statistics.normalizer()
        picked = tempering(logits[rows[:, None], columns])
        slope = batch.step(rows, picked - normalizer.maximum[:, None] - normalizer.log_sum[:, None], normalizer, measured)
        if gradient is not None:
            row_gradients(
                logits,
                rows,
                tempering.temperature,
                statistics=statistics,
                index=columns[:, 0],
                at_index=slope,
                scale=-slope,
                out=gradient,
            )
    if gradient is not None:
        gradient.index_fill_(0, (~batch.mask.reshape(-1)).nonzero()[:, 0], 0.0)
    return gradient


def _sweep(
    batch: TokenBatch, logits: torch.Tensor, tempering: Tempering, *, needed: bool, overwrite: bool
) -> torch.Tensor | None:
    """Take every valid token through `batch`; ∂loss/∂logits if needed, in the logits themselves if they may go."""
    vocabulary = logits.shape[-1]
    gradient = (logits if overwrite else torch.empty_like(logits)) if needed else None
    work = Workspace(vocabulary, logits)
    # a softmax that is in the working dtype already waits in the gradient's place for its coefficient
    kept = needed and logits.dtype == work.p.dtype
    chunk = max(work.rows, _CHUNK_BYTES // max(1, vocabulary * work.p.element_size()))
    for rows in batch.chunks(chunk):
        # views, not copies, of consecutive rows
        consecutive = int(rows[-1]) - int(rows[0]) + 1 == len(rows)
        place = slice(int(rows[0]), int(rows[-1]) + 1) if consecutive else rows
        z = logits[place]
        full_divergence = batch.full_divergence(rows, z, tempering)
        columns = batch.columns(rows)
        picked = tempering(z.gather(-1, columns))
        # (copied rows are their own scratch)
        out = z if gradient is None or not consecutive else gradient[place]
        normalizer = normalize(z, tempering, work, entropy=batch.entropy is not None, out=out if kept else None)
        log_prob = picked - normalizer.maximum[:, None] - normalizer.log_sum[:, None]
        slope = batch.step(rows, log_prob, normalizer, full_divergence)
        if gradient is None:
            continue
        gradient_of_logits(
            out if kept else z,
            tempering,
            work,
            index=columns[:, 0],
            at_index=slope,
            scale=-slope / normalizer.total if kept else -slope,  # type: ignore[operator]
            normalized=kept,
            out=out,
        )
        # a dropped token's row may hold a NaN, which 0 does not silence
        out.index_fill_(0, (slope == 0.0).nonzero()[:, 0], 0.0)
        if not consecutive:
            gradient[place] = out
    if gradient is not None:
        gradient.index_fill_(0, (~batch.mask.reshape(-1)).nonzero()[:, 0], 0.0)
    return gradient


class _SelectiveLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        logits: torch.Tensor,
        tokens: torch.Tensor,
        tempering: Tempering,
        entropy: bool,  # noqa: FBT001 -- Function.apply takes no keywords
        overwrite: bool,  # noqa: FBT001
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        normalizer = normalize(logits, tempering, Workspace(logits.shape[-1], logits), entropy=entropy)
        index = tokens.to(torch.int64)
        log_prob = normalizer.log_prob(tempering(logits.gather(-1, index[:, None]))[:, 0])
        ctx.save_for_backward(logits, index, normalizer.log_sum, *([normalizer.entropy] if entropy else []))
        ctx.tempering, ctx.overwrite = tempering, overwrite
        return log_prob, normalizer.log_normalizer, normalizer.entropy

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        """∂log π/∂x = 1[token] − π, ∂log Z/∂x = π, ∂H/∂x = −π (log π + H)."""
        refuse_second_derivative()
        logits, index, log_sum, *entropies = ctx.saved_tensors
        of_log_prob, of_normalizer, of_entropy = cotangents
        scale, slope, reached = of_normalizer - of_log_prob, None, (of_log_prob != 0.0) | (of_normalizer != 0.0)
        if entropies:
            scale, slope = scale + of_entropy * (log_sum - entropies[0]), of_entropy
            reached |= of_entropy != 0.0
        rows = reached.nonzero()[:, 0]
        gradient = logits.detach() if ctx.overwrite else torch.zeros_like(logits)
        work = Workspace(logits.shape[-1], logits)
        gradient_of_logits(
            logits,
            ctx.tempering,
            work,
            index=index[rows],
            at_index=of_log_prob[rows],
            scale=scale[rows],
            slope=None if slope is None else slope[rows],
            rows=rows,
            out=gradient,
        )
        if ctx.overwrite:
            gradient.index_fill_(0, (~reached).nonzero()[:, 0], 0.0)
        return gradient, None, None, None, None


class _SelectiveLogProbJit(torch.autograd.Function):
    """`_SelectiveLogProb` by the loops of `drpo_torch.rows`."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        logits: torch.Tensor,
        tokens: torch.Tensor,
        tempering: Tempering,
        entropy: bool,  # noqa: FBT001
        overwrite: bool,  # noqa: FBT001
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        from drpo_torch.rows import row_statistics  # noqa: PLC0415

        statistics = row_statistics(logits, torch.arange(len(logits)), tempering.temperature)
        normalizer, index = statistics.normalizer(), tokens.to(torch.int64)
        log_prob = normalizer.log_prob(tempering(logits.gather(-1, index[:, None]))[:, 0])
        ctx.save_for_backward(logits, index, *statistics)
        ctx.tempering, ctx.entropy, ctx.overwrite = tempering, entropy, overwrite
        return log_prob, normalizer.log_normalizer, normalizer.entropy if entropy else None

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        """∂log π/∂x = 1[token] − π, ∂log Z/∂x = π, ∂H/∂x = −π (log π + H)."""
        from drpo_torch.rows import RowStatistics, row_gradients  # noqa: PLC0415

        refuse_second_derivative()
        logits, index, *saved = ctx.saved_tensors
        statistics = RowStatistics(*saved)
        of_log_prob, of_normalizer, of_entropy = cotangents
        scale, slope = of_normalizer - of_log_prob, None
        if ctx.entropy:
            scale, slope = scale + of_entropy * (statistics.total.log() - statistics.entropy), of_entropy
            # where nothing reaches a row, 0 times what it holds would be NaN
            scale = torch.where((of_log_prob == 0.0) & (of_normalizer == 0.0) & (of_entropy == 0.0), 0.0, scale)
        gradient = logits.detach() if ctx.overwrite else torch.empty_like(logits)
        row_gradients(
            logits,
            torch.arange(len(logits)),
            ctx.tempering.temperature,
            statistics=statistics,
            index=index,
            at_index=of_log_prob,
            scale=scale,
            slope=slope,
            out=gradient,
        )
        return gradient, None, None, None, None


class _LogitsPolicyLoss(torch.autograd.Function):
    """The loss with its gradient in the logits; backward multiplies that by the cotangent."""

    # the sweep is in here because the graph must know the logits as they were: of a view that has been written to,
    # autograd would take the derivative through its base, in an array of the size of the logits
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, batch: TokenBatch, tempering: Tempering, overwrite: bool) -> torch.Tensor:  # noqa: ANN401, FBT001
        ctx.save_for_backward(_sweep_of(batch)(batch, logits.detach(), tempering, needed=True, overwrite=overwrite))
        return batch.loss()

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return scaled_by_cotangent(gradient, cotangents[0]), None, None, None


def _check_logits(logits: torch.Tensor, temperature: float) -> Tempering:
    check_float(logits=logits)
    return Tempering(check_positive("temperature", temperature))
