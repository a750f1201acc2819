"""From hidden states and the LM head to a policy loss and its gradients; (tokens × vocabulary) logits never exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from drpo_core import token_mean
from drpo_torch.batch import TokenBatch, VocabularyLoss, head_logits
from drpo_torch.cotangent import scaled_by_cotangent
from drpo_torch.divergence import (
    FullDivergence,
    check_float,
    check_positive,
    check_same_shape,
    is_jit,
    refuse_second_derivative,
)
from drpo_torch.softmax import Normalizer, Tempering, Workspace, eager, gradient_of_logits, normalize, working_dtype

if TYPE_CHECKING:
    from drpo_core import Objective
    from drpo_core.reduction import Reduction
    from drpo_torch.batch import Divergence
    from drpo_torch.rows import RowStatistics

__all__ = ["linear_policy_loss"]

# of ∂weight at a time, where it is rounded to the dtype it is accumulated in, or its other factor transposed
_WEIGHT_ROWS = 4096


class _Gradients(NamedTuple):
    """∂loss/∂ each differentiable input; None for those that need none."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


@eager
def linear_policy_loss(
    objective: Objective,
    *,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    behavior_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    reduction: Reduction = token_mean,
    normalizer: float | torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    divergence: Divergence | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    entropy: bool = False,
    chunk_tokens: int = 256,
    chunk_vocabulary: int | None = None,
    engine: Literal["eager", "jit"] = "eager",
) -> VocabularyLoss:
    """Policy loss of tokens from hidden states and the LM head, π = softmax(cap·tanh((h Wᵀ + b)/cap) / T).

    The gradients ∂hidden, ∂weight and ∂bias are formed in the forward pass, one chunk of tokens after the other, with
    three matrix products a chunk. Masked tokens are left out before the first, tokens whose gradient is 0 (dropped by
    DPPO, say) before the other two. No gradient is formed for a tensor that doesn't require it, such as a frozen head.

    Under autocast the products are taken in its dtype. ∂weight is accumulated in the dtype of `weight`: a bfloat16 one is
    rounded once a chunk.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``.
    hidden
        Last hidden states, (…, H); anything where the mask is False.
    weight, bias
        Of the LM head, (V, H) and (V,): plain tensors, gathered if they are sharded. Of the dtype of `hidden`, except under
        autocast.
    tokens
        Ids of the sampled tokens, (…); anything where the mask is False.
    behavior_log_prob, advantages
        log μ (nats, ≤ 0) and A of the sampled tokens; (…).
    mask
        Boolean, (…), True at tokens that count.
    reduction, normalizer, token_weights, segment_ids
        See `drpo_torch.policy_loss`; the reduction is one of drpo_core's.
    divergence
        For ``DPPO(divergence="per_token")``: a divergence per token, or a `TopKDivergence` or `FullDivergence` to measure
        chunk by chunk. A `LinearHead` in it takes another chunk of logits.
    temperature
        T > 0.
    logit_softcap
        cap > 0; None for none.
    entropy
        Whether to return the entropies too.
    chunk_tokens
        How many tokens' logits exist at once.
    chunk_vocabulary
        How many of the vocabulary's logits exist at once: None for all; a number recomputes them for the gradient, with a
        fourth matrix product. ``chunk_tokens=1024, chunk_vocabulary=6144`` needs the least memory.
    engine
        Of the softmaxes and their gradient: ``"eager"`` for torch's operations, ``"jit"`` for loops that numba compiles in a
        second or two, once a process; CPU only, extra `jit`. With a soft-cap they are always torch's.

    Returns
    -------
    VocabularyLoss
        `loss` (0-d, float32 at least), `diagnostics`, `log_prob` and `entropy`.

    Raises
    ------
    TypeError
        If a dtype or the reduction is wrong.
    ValueError
        If shapes disagree, a number is out of its range, a valid token's id is outside the vocabulary, a
        `FullDivergence` is asked for in parts of the vocabulary, or the engine is unknown or can't take these tensors.
    ImportError
        If ``engine="jit"`` finds no numba.
    RuntimeError
        On a second derivative, which is not implemented.

    Notes
    -----
    `torch.compile` of a model that calls it breaks the graph here: what is computed depends on the mask's values.

    Examples
    --------
    >>> import torch
    >>> from drpo_core import DRPO
    >>> from drpo_torch import linear_policy_loss
    >>> hidden = torch.eye(3)[:1].requires_grad_()
    >>> weight = torch.tensor([[0.5, 0.3, 0.2]]).log().T.expand(3, 3).contiguous().requires_grad_()
    >>> result = linear_policy_loss(
    ...     DRPO(delta=0.5),
    ...     hidden=hidden,
    ...     weight=weight,
    ...     tokens=torch.tensor([0]),
    ...     behavior_log_prob=torch.tensor([0.25]).log(),
    ...     advantages=torch.tensor([1.0]),
    ...     mask=torch.tensor([True]),
    ... )
    >>> result.loss.backward()
    >>> weight.grad[:, 0]
    tensor([-0.5000,  0.3000,  0.2000])
    """
    tempering = _check(hidden, weight, bias, temperature, logit_softcap)
    for name, size in (("chunk_tokens", chunk_tokens), ("chunk_vocabulary", chunk_vocabulary)):
        if size is not None and size < 1:
            msg = f"{name}: expected 1 or more, got {size!r}"
            raise ValueError(msg)
    if chunk_vocabulary is not None and isinstance(divergence, FullDivergence):
        msg = "chunk_vocabulary: expected None with a FullDivergence, which needs whole rows of logits"
        raise ValueError(msg)
    result: VocabularyLoss = _linear_policy_loss(
        objective,
        (hidden.reshape(-1, hidden.shape[-1]), weight, bias),
        tempering,
        chunk_tokens,
        chunk_vocabulary,
        leading=hidden.shape[:-1],
        vocabulary=weight.shape[0],
        dtype=hidden.dtype,
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
        jit=is_jit(engine, hidden) and logit_softcap is None,
    )
    return result


def _linear_policy_loss(
    objective: Objective,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    tempering: Tempering,
    chunk_tokens: int,
    chunk_vocabulary: int | None,
    **batch_arguments: Any,  # noqa: ANN401
) -> VocabularyLoss:
    device = inputs[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    needed = _Gradients(*(torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs))  # type: ignore[arg-type]
    with torch.no_grad(), torch.autocast(device, enabled=False):
        batch = TokenBatch(objective, **batch_arguments)
        hidden, weight, bias = (None if t is None else t.detach() for t in inputs)
        head = _Head(hidden, weight, bias, needed, autocast)  # type: ignore[arg-type]
        _Sweep(batch, head, tempering, chunk_tokens, chunk_vocabulary).run()
        result = batch.result()
    if not any(needed):
        return result
    return result._replace(loss=_WithGradients.apply(*inputs, result.loss, *head.gradients))  # type: ignore[no-untyped-call]


class _Head:
    """hidden, weight and bias, and the gradients that accumulate for them."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        needed: _Gradients,
        autocast: torch.dtype | None,
    ) -> None:
        dtype = autocast or hidden.dtype
        if autocast is None and weight.dtype != dtype:
            msg = f"weight: expected the dtype of hidden, {dtype}, except under autocast, got {weight.dtype}"
            raise TypeError(msg)
        self.hidden, self.weight, self.bias = hidden, weight.to(dtype), bias
        self.dtype = dtype
        self.gradients = _Gradients(
            torch.zeros_like(hidden) if needed.hidden else None,
            torch.empty_like(weight) if needed.weight else None,
            torch.zeros_like(bias) if needed.bias else None,  # type: ignore[arg-type]
        )
        self.needs_gradient = any(needed)
        self.started: set[int] = set()

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        return self.hidden[rows].to(self.dtype)

    def logits(self, hidden: torch.Tensor, part: slice, out: torch.Tensor) -> torch.Tensor:
        return head_logits(hidden, self.weight[part], None if self.bias is None else self.bias[part], out=out)

    def add(self, gradient: torch.Tensor, hidden: torch.Tensor, part: slice, of_hidden: torch.Tensor) -> None:
        """Add ∂weight and ∂bias of a part of the vocabulary, and ∂hidden of these rows, from their ∂logits."""
        if self.gradients.hidden is not None:
            of_hidden += torch.mm(gradient, self.weight[part])
        if self.gradients.weight is not None:
            total = self.gradients.weight[part]
            again = part.start in self.started
            rounded = total.dtype != gradient.dtype
            # of bfloat16 the product of a transposed matrix takes twice as long as transposing it and their product
            rows = _WEIGHT_ROWS if rounded or gradient.dtype == torch.bfloat16 else max(1, len(total))
            for block, share in zip(torch.split(total, rows), torch.split(gradient, rows, dim=1), strict=True):
                transposed = share.mT.contiguous() if share.dtype == torch.bfloat16 else share.mT
                if rounded:
                    product = torch.mm(transposed, hidden)
                    _ = block.add_(product) if again else block.copy_(product)
                else:
                    # β = 0 overwrites what uninitialised memory holds, NaN included
                    block.addmm_(transposed, hidden, beta=float(again))
        if self.gradients.bias is not None:
            self.gradients.bias[part] += gradient.sum(0, dtype=of_hidden.dtype)
        self.started.add(part.start)

    def finish(self) -> None:
        """Fill in what no token has reached."""
        if self.gradients.weight is not None and not self.started:
            self.gradients.weight.zero_()


class _Sweep:
    """Takes every valid token through a `TokenBatch`, and adds up the head's gradients."""

    def __init__(
        self, batch: TokenBatch, head: _Head, tempering: Tempering, chunk_tokens: int, chunk_vocabulary: int | None
    ) -> None:
        vocabulary = head.weight.shape[0]
        width = min(chunk_vocabulary or vocabulary, vocabulary)
        self.batch, self.head, self.tempering, self.chunk_tokens = batch, head, tempering, chunk_tokens
        self.parts = [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
        rows = min(chunk_tokens, len(batch.valid))
        self.storage = torch.empty(rows * width, dtype=head.dtype, device=head.weight.device)
        self.workspaces = {size: Workspace(size, self.storage) for size in {part.stop - part.start for part in self.parts}}
        self.recompute = len(self.parts) > 1
        # softmaxes wait in the logits' place for their coefficient, if neither rounding nor a derivative forbids it
        exact = head.dtype == working_dtype(head.dtype) and tempering.softcap is None
        self.kept = exact and head.needs_gradient and not self.recompute and not batch.jit

    def run(self) -> None:
        for rows in self.batch.chunks(self.chunk_tokens):
            hidden, columns = self.head.rows(rows), self.batch.columns(rows)
            slope, shares, statistics = self._forward(rows, hidden, columns)
            alive = (slope != 0.0).nonzero()[:, 0]
            if self.head.needs_gradient and len(alive):
                self._backward(rows, hidden, columns[:, :1], slope, shares, statistics, alive)
        self.head.finish()

    def _forward(
        self, rows: torch.Tensor, hidden: torch.Tensor, columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[RowStatistics | Normalizer]]:
        """∂(reduced loss)/∂log π of a chunk's tokens, and the share and statistics of each part of the vocabulary."""
        batch, normalizers = self.batch, []
        statistics: list[RowStatistics | Normalizer] = []
        picked = torch.zeros(columns.shape, dtype=working_dtype(hidden.dtype), device=hidden.device)
        full_divergence = None
        for part in self.parts:
            z = self.head.logits(hidden, part, self._view(len(rows), part))
            index, inside = _within(columns, part)
            picked = torch.where(inside, self.tempering(z.gather(-1, index)), picked)
            full_divergence = batch.full_divergence(rows, z, self.tempering)
            if batch.jit:
                from drpo_torch.rows import row_statistics  # noqa: PLC0415 -- numba is an extra, and slow to import

                found = row_statistics(z, torch.arange(len(z)), self.tempering.temperature)
                statistics.append(found)
                normalizers.append(found.normalizer())
            else:
                work, out = self.workspaces[z.shape[1]], z if self.kept else None
                normalizers.append(normalize(z, self.tempering, work, entropy=batch.entropy is not None, out=out))
                statistics.append(normalizers[-1])
        normalizer, shares = _merge(normalizers)
        log_prob = picked - normalizer.maximum[:, None] - normalizer.log_sum[:, None]
        return batch.step(rows, log_prob, normalizer, full_divergence), shares, statistics

    def _backward(
        self,
        rows: torch.Tensor,
        hidden: torch.Tensor,
        sampled: torch.Tensor,
        slope: torch.Tensor,
        shares: torch.Tensor,
        statistics: list[RowStatistics | Normalizer],
        alive: torch.Tensor,
    ) -> None:
        """Add the gradients of the tokens of a chunk that have one."""
        if len(alive) < len(rows):
            hidden, sampled, slope, shares = hidden[alive], sampled[alive], slope[alive], shares[:, alive]
            if not self.recompute:
                self._close_up(alive, len(rows))
        of_hidden = torch.zeros(hidden.shape, dtype=slope.dtype, device=hidden.device)
        for i, (part, share) in enumerate(zip(self.parts, shares, strict=True)):
            gradient = self._view(len(alive), part)
            if self.recompute:
                self.head.logits(hidden, part, gradient)
            index, inside = _within(sampled, part)
            scale = -slope * share
            at = {"index": index[:, 0], "at_index": torch.where(inside[:, 0], slope, 0.0), "scale": scale}
            if self.batch.jit:
                from drpo_torch.rows import RowStatistics, row_gradients  # noqa: PLC0415

                of_part = RowStatistics(*(statistic[alive] for statistic in statistics[i]))  # type: ignore[index]
                every, temperature = torch.arange(len(alive)), self.tempering.temperature
                row_gradients(gradient, every, temperature, statistics=of_part, **at, out=gradient)
            else:
                if self.kept:
                    at["scale"] = scale / statistics[i].total[alive]  # type: ignore[index]
                work = self.workspaces[gradient.shape[1]]
                gradient_of_logits(gradient, self.tempering, work, **at, normalized=self.kept, out=gradient)
            if self.recompute:
                # in a part where every logit is −inf, softmax is NaN
                gradient.masked_fill_((scale == 0.0)[:, None], 0.0)
            self.head.add(gradient, hidden, part, of_hidden)
        if self.head.gradients.hidden is not None:
            self.head.gradients.hidden[rows[alive]] = of_hidden.to(self.head.gradients.hidden.dtype)

    def _close_up(self, alive: torch.Tensor, rows: int) -> None:
        """Move the rows of logits that are alive to the first places, in this order."""
        z = self._view(rows, self.parts[0])
        for place, row in enumerate(alive.tolist()):
            if place < row:
                z[place] = z[row]

    def _view(self, rows: int, part: slice) -> torch.Tensor:
        """The first elements of the buffer, as logits of some rows over a part of the vocabulary."""
        width = part.stop - part.start
        return self.storage[: rows * width].view(rows, width)


def _merge(parts: list[Normalizer]) -> tuple[Normalizer, torch.Tensor]:
    """The normaliser of rows from those of parts of them, and each part's share of the probability, (parts, rows)."""
    if len(parts) == 1:
        return parts[0], torch.ones_like(parts[0].maximum)[None]
    maxima = torch.stack([part.maximum for part in parts])
    nothing = maxima == -torch.inf
    log_sums = torch.stack([part.log_sum for part in parts]).masked_fill_(nothing, 0.0)
    maximum = maxima.amax(0)
    log_sum = torch.logsumexp(maxima - maximum + log_sums, 0)
    log_shares = maxima - maximum + log_sums - log_sum
    shares = log_shares.exp()
    entropy = None
    if parts[0].entropy is not None:
        # chain rule: of the part, then within it
        entropies = torch.stack([part.entropy for part in parts])  # type: ignore[misc]
        entropy = (entropies - log_shares).mul_(shares).masked_fill_(nothing, 0.0).sum(0)
    return Normalizer(maximum, log_sum, entropy), shares


def _within(columns: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids counted from the start of a part of the vocabulary, clamped to it, and whether they are in it."""
    size = part.stop - part.start
    index = columns - part.start
    return index.clamp(0, size - 1), (index >= 0) & (index < size)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known; backward multiplies them by the cotangent."""

    @staticmethod
    def forward(ctx: Any, *arguments: torch.Tensor | None) -> torch.Tensor:  # noqa: ANN401
        _, _, _, loss, *gradients = arguments
        ctx.save_for_backward(*gradients)
        return loss.clone()  # type: ignore[union-attr]

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        refuse_second_derivative()
        gradients = (None if g is None else scaled_by_cotangent(g, cotangents[0]) for g in ctx.saved_tensors)
        return *gradients, None, None, None, None


def _check(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float, softcap: float | None
) -> Tempering:
    check_float(hidden=hidden, weight=weight)
    check_same_shape("weight", weight, "(V, H)", (*weight.shape[:1], *hidden.shape[-1:]))
    if bias is not None:
        check_float(bias=bias)
        check_same_shape("bias", bias, "(V,)", weight.shape[:1])
    return Tempering(
        check_positive("temperature", temperature), None if softcap is None else check_positive("logit_softcap", softcap)
    )
