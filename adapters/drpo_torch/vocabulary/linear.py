"""From hidden states and the LM head to a policy loss and its gradients; (tokens × vocabulary) logits never exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from drpo_core._checks import check_number
from drpo_torch._checks import check_untransformed
from drpo_torch.autograd import refuse_second_derivative, scaled
from drpo_torch.vocabulary.batch import Arguments, Found, TokenBatch, VocabularyLoss, looks_at_one_token
from drpo_torch.vocabulary.engines import loops, row_kernels
from drpo_torch.vocabulary.graph import depends_on_values
from drpo_torch.vocabulary.head import Head, HeadInputs
from drpo_torch.vocabulary.recorded import FullDivergence, check_head, product_dtype, products_like
from drpo_torch.vocabulary.softmax import Places, Pull, Statistics, Tempering

if TYPE_CHECKING:
    from types import ModuleType

    from drpo_core import Objective
    from drpo_core.loss import Engine
    from drpo_core.reduction import Reduction
    from drpo_torch.vocabulary.recorded import Divergence

__all__ = ["linear_policy_loss"]

# rows of a chunk that are moved together
_ROWS_MOVED = 16


@depends_on_values
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
    proximal_log_prob: torch.Tensor | None = None,
    reference_log_prob: torch.Tensor | None = None,
    reduction: Reduction | None = None,
    normalizer: float | torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    divergence: Divergence | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    entropy: bool = False,
    chunk_tokens: int = 256,
    chunk_vocabulary: int | None = None,
    diagnostics: bool = True,
    engine: Engine = "auto",
) -> VocabularyLoss:
    """Policy loss of tokens from hidden states and the LM head, π = softmax(cap·tanh((h Wᵀ + b)/cap) / T).

    The gradients ∂hidden, ∂weight and ∂bias are formed in the forward pass, one chunk of tokens after the other, with
    three matrix products a chunk. Masked tokens are left out before the first product, and tokens whose gradient is 0
    (dropped by DPPO, say) before the other two. No gradient is formed for a tensor that doesn't require it, such as a
    frozen head.

    Under autocast the products are taken in its dtype. ∂weight is accumulated in the dtype of `weight`: a bfloat16 one is
    rounded once a chunk. float16 factors are scaled by powers of two so that nothing underflows or overflows in a product,
    and gradients of float16 inputs are kept in float32 until the cotangent (a loss scaler's factor, say) is known.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode`, for which the first product of each chunk is
        taken twice, because its sequences come in several.
    hidden
        Last hidden states, (…, H); anything where the mask is False.
    weight, bias
        W and b of the LM head, (V, H) and (V,): plain tensors, gathered if they are sharded. The weight has the dtype of
        `hidden`, except under autocast.
    tokens
        Ids of the sampled tokens, (…), of any integral dtype; anything where the mask is False.
    behavior_log_prob, advantages
        log μ (nats, ≤ 0) and A of the sampled tokens; (…), each of any floating-point dtype.
    mask
        Boolean, (…), True at tokens that count.
    proximal_log_prob, reference_log_prob, reduction, normalizer, token_weights, segment_ids
        See `drpo_torch.policy_loss`.
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
    diagnostics
        Whether to compute them, in the same pass over the tokens.
    engine
        What takes the softmaxes and their gradient. ``"arrays"``: torch's operations. ``"compiled"``: loops that numba
        compiles in a few seconds, once a process; on the CPU, and not for float16 products. ``"auto"``: the loops where they
        exist, otherwise torch's operations.

    Returns
    -------
    VocabularyLoss
        `loss` (0-d, float32 at least), `diagnostics`, `log_prob` and `entropy`.

    Raises
    ------
    TypeError
        If a type, a dtype or the reduction is wrong.
    ValueError
        If shapes disagree, a number is out of its range, a valid token's id is outside the vocabulary (on the CPU), a
        `FullDivergence` is asked for in parts of the vocabulary, the engine is unknown, or ``engine="compiled"`` can't take
        these tensors.
    ImportError
        If ``engine="compiled"`` finds no numba.
    RuntimeError
        On a second derivative, forward-mode differentiation or a transform of torch.func: not implemented.

    See Also
    --------
    drpo_torch.logits_policy_loss : the same from logits, with the formula of their gradient.

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
    check_head(hidden, weight, bias)
    inputs = HeadInputs(hidden, weight, bias)
    for name, tensor in inputs.named():
        check_untransformed(name, tensor)
    leading, vocabulary = hidden.shape[:-1], weight.shape[0]
    arguments = Arguments(
        objective=objective,
        tokens=tokens,
        behavior_log_prob=behavior_log_prob,
        advantages=advantages,
        mask=mask,
        proximal_log_prob=proximal_log_prob,
        reference_log_prob=reference_log_prob,
        reduction=reduction,
        normalizer=normalizer,
        token_weights=token_weights,
        segment_ids=segment_ids,
        divergence=divergence,
        diagnostics=diagnostics,
        entropy=entropy,
        engine=engine,
    )
    arguments.check(leading, vocabulary, hidden)
    cap = None if logit_softcap is None else check_number("logit_softcap", logit_softcap, above=0.0)
    tempering = Tempering(check_number("temperature", temperature, above=0.0), cap)
    chunk_tokens, width = int(check_number("chunk_tokens", chunk_tokens, at_least=1, whole=True)), vocabulary
    if chunk_vocabulary is not None:
        width = min(int(check_number("chunk_vocabulary", chunk_vocabulary, at_least=1, whole=True)), vocabulary)
        if isinstance(divergence, FullDivergence):
            msg = f"chunk_vocabulary: expected None with a FullDivergence, which needs whole rows of logits, got {width}"
            raise ValueError(msg)
    dtype = product_dtype(hidden, weight)
    module = loops(engine, products=products_like(hidden, dtype), **arguments.matrices())
    needed = torch.is_grad_enabled() and any(tensor.requires_grad for _, tensor in inputs.named())
    with torch.no_grad():
        batch = TokenBatch(arguments, dtype)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = Head(inputs, dtype, needed=needed)
        _Sweep(batch, head, tempering, module, (chunk_tokens, width)).run()
        result = batch.result()
    if not needed:
        return result
    return result._replace(loss=_WithGradients.apply(*inputs, result.loss, *head.gradients))  # type: ignore[no-untyped-call]


class _Kept(NamedTuple):
    """A chunk's results that its gradient needs: for each part of the vocabulary, statistics and share of the probability."""

    rows: Places
    sampled: torch.Tensor
    statistics: list[Statistics]
    shares: torch.Tensor

    def at(self, alive: torch.Tensor) -> _Kept:
        """The same of some of the tokens."""
        statistics = [of_part.at(alive) for of_part in self.statistics]
        return _Kept(Places(self.rows.index[alive]), self.sampled[alive], statistics, self.shares[:, alive])


class _Sweep:
    """Takes every valid token through a `TokenBatch`, and adds up the head's gradients."""

    def __init__(
        self,
        batch: TokenBatch,
        head: Head,
        tempering: Tempering,
        module: ModuleType | None,
        chunk: tuple[int, int],
    ) -> None:
        vocabulary, (self.chunk_tokens, width) = head.weight.shape[0], chunk
        self.batch, self.head, self.tempering, self.module = batch, head, tempering, module
        self.parts = [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
        rows = min(self.chunk_tokens, len(batch.valid))
        device = head.weight.device
        self.storage = torch.empty(rows * width, dtype=head.dtype, device=device)
        self.every = Places.first(rows, device)
        widths = {part.stop - part.start for part in self.parts}
        self.kernels = {size: row_kernels(module, tempering, size, head.dtype, device) for size in widths}
        self.at_once = rows == len(batch.valid) or looks_at_one_token(batch.given.objective)
        # whether logits are gone when the gradient in them is known
        self.recompute = len(self.parts) > 1 or not self.at_once
        # softmaxes wait in the logits' place for their coefficient, if neither rounding nor a derivative forbids it
        exact = head.dtype == batch.row_dtype and tempering.softcap is None
        keeps = all(kernels.keeps for kernels in self.kernels.values())
        self.kept = exact and keeps and head.needed and not self.recompute

    def run(self) -> None:
        chunks = self.batch.valid.chunks(self.chunk_tokens)
        if self.at_once:
            for rows in chunks:
                found, kept = self._forward(rows)
                self._backward(kept, self.batch.step(found))
        else:
            # the objective has to see all tokens before the first gradient
            every = [self._forward(rows) for rows in chunks]
            slope = self.batch.step(Found.joined([found for found, _ in every]))
            for (_, kept), part in zip(every, torch.split(slope, self.chunk_tokens), strict=True):
                self._backward(kept, part)
        self.head.finish()

    def _forward(self, rows: Places) -> tuple[Found, _Kept]:
        """Take a chunk through its logits: results for the objective, and results for the gradient."""
        batch, every, statistics = self.batch, self.every[: len(rows)], []
        hidden, columns, full = self.head.rows(rows), batch.columns(rows), None
        picked = torch.zeros(columns.shape, dtype=batch.row_dtype, device=hidden.device)
        for part in self.parts:
            z = self._view(len(rows), part)
            self.head.logits(hidden, part, z)
            index, inside = _within(columns, part)
            picked = torch.where(inside, self.tempering(z.gather(-1, index)), picked)
            full = batch.full_divergence(self.module, rows, z, every, self.tempering)
            kernels = self.kernels[z.shape[1]]
            statistics.append(kernels.statistics(z, every, entropy=batch.given.entropy, keep=z if self.kept else None))
        whole, shares = _merge(statistics)
        found = Found(rows, columns, whole.log_prob(picked), whole.entropy, full)
        return found, _Kept(rows, columns[:, 0], statistics, shares)

    def _backward(self, kept: _Kept, slope: torch.Tensor) -> None:
        """Add the gradients of the tokens of a chunk that have one, from ∂loss/∂log π."""
        if not self.head.needed:
            return
        alive = (slope != 0.0).nonzero()[:, 0]
        if len(alive) == 0:
            return
        if len(alive) < len(slope):
            if not self.recompute:
                self._close_up(alive, len(slope))
            kept, slope = kept.at(alive), slope[alive]
        hidden, every = self.head.rows(kept.rows), self.every[: len(alive)]
        slope, chunk = self.head.begin(hidden, slope, self.tempering.temperature)
        for part, share, statistics in zip(self.parts, kept.shares, kept.statistics, strict=True):
            gradient = self._view(len(alive), part)
            if self.recompute:
                self.head.logits(hidden, part, gradient)
            index, inside = _within(kept.sampled, part)
            pull = Pull(index, torch.where(inside, slope, 0.0), -slope * share)
            kernels = self.kernels[gradient.shape[1]]
            kernels.gradients(gradient, every, pull, statistics=statistics, out=gradient, kept=self.kept)
            if self.recompute:
                # in a part where every logit is −inf, softmax is NaN
                gradient.masked_fill_((statistics.maximum == -torch.inf)[:, None], 0.0)
            self.head.add(gradient, part, chunk)
        self.head.end(kept.rows.key, chunk)

    def _close_up(self, alive: torch.Tensor, rows: int) -> None:
        """Move the rows of logits that are alive to the first places, in this order."""
        z = self._view(rows, self.parts[0])
        # those before the first gap stay; on a device, to count them would be to wait
        stay = int((alive == self.every.index[: len(alive)]).sum()) if alive.device.type == "cpu" else 0
        for start in range(stay, len(alive), _ROWS_MOVED):
            # a row moves to the front, over rows that have moved already: several may be read before any is written
            moved = z[alive[start : start + _ROWS_MOVED]]
            z[start : start + len(moved)] = moved

    def _view(self, rows: int, part: slice) -> torch.Tensor:
        """The first elements of the buffer, as logits of some rows over a part of the vocabulary."""
        width = part.stop - part.start
        return self.storage[: rows * width].view(rows, width)


def _merge(parts: list[Statistics]) -> tuple[Statistics, torch.Tensor]:
    """The statistics of rows from those of parts of them, and each part's share of the probability, (parts, rows)."""
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
    return Statistics(maximum, log_sum, entropy, torch.ones_like(maximum)), shares


def _within(columns: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids counted from the start of a part of the vocabulary, clamped to it, and whether they are in it."""
    size = part.stop - part.start
    index = columns - part.start
    return index.clamp(0, size - 1), (index >= 0) & (index < size)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known; backward multiplies them by the cotangent."""

    @staticmethod
    def forward(ctx: Any, *arguments: torch.Tensor | None) -> torch.Tensor:  # noqa: ANN401
        *inputs, loss, _, _, _ = arguments
        ctx.save_for_backward(*arguments[-3:])
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        return loss.clone()  # type: ignore[union-attr]

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        refuse_second_derivative()
        kept = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        gradients = (None if gradient is None else scaled(gradient, cotangents[0], dtype) for gradient, dtype in kept)
        return *gradients, None, None, None, None
