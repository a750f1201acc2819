"""From hidden states and the LM head to a policy loss and its gradients; (tokens × vocabulary) logits never exist."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from drpo_core._checks import check_number
from drpo_torch._checks import check_untransformed
from drpo_torch._host import is_waited_for, without_autocast
from drpo_torch.autograd import refuse_second_derivative, scaled
from drpo_torch.vocabulary.batch import Arguments, Found, TokenBatch, VocabularyLoss, looks_at_one_token
from drpo_torch.vocabulary.chunks import Chunks, chunk_sizes
from drpo_torch.vocabulary.composed import composed, is_composable
from drpo_torch.vocabulary.engines import loops
from drpo_torch.vocabulary.graph import depends_on_values
from drpo_torch.vocabulary.head import Head, HeadInputs
from drpo_torch.vocabulary.log_prob import linear_log_prob
from drpo_torch.vocabulary.recorded import FullCentering, FullDivergence, product_dtype, products_like
from drpo_torch.vocabulary.shards import shard_of_head
from drpo_torch.vocabulary.softmax_functions import HeadSteps

if TYPE_CHECKING:
    from types import ModuleType

    import torch.distributed as dist

    from drpo_core import Objective
    from drpo_core.loss import Engine
    from drpo_core.reduction import Reduction
    from drpo_torch.vocabulary.chunks import Kept
    from drpo_torch.vocabulary.recorded import Centering, Divergence
    from drpo_torch.vocabulary.softmax import Places, Pull
    from drpo_torch.vocabulary.support import Support

__all__ = ["linear_policy_loss"]


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
    centering: Centering | None = None,
    temperature: float | torch.Tensor = 1.0,
    support: Support | None = None,
    vocabulary_size: int | None = None,
    logit_softcap: float | None = None,
    entropy: bool = False,
    entropy_coefficient: float = 0.0,
    chunk_tokens: int | None = None,
    chunk_vocabulary: int | None = None,
    vocabulary_group: dist.ProcessGroup | None = None,
    diagnostics: bool = True,
    engine: Engine = "auto",
) -> VocabularyLoss:
    """Policy loss of tokens from hidden states and the LM head, π = softmax(cap·tanh((h Wᵀ + b)/cap) / T).

    The gradients ∂hidden, ∂weight and ∂bias are formed in the forward pass, one chunk of tokens after the other, with
    three matrix products a chunk. Masked tokens are left out before the first product, and tokens whose gradient is 0
    (dropped by DPPO, say) before the other two. No gradient is formed for a tensor that doesn't require it, such as a
    frozen head.

    Under autocast the products are taken in its dtype. ∂weight of several chunks of tokens adds up in float32 at least.
    float16 factors are scaled by powers of two so that nothing underflows or overflows in a product, and gradients of
    float16 inputs are kept in float32 until the cotangent (a loss scaler's factor, say) is known.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode`, for which the first product of each chunk is
        taken twice, because its sequences come in several.
    hidden
        Last hidden states, (…, H); anything where the mask is False.
    weight, bias
        W and b of the LM head, (V, H) and (V,): plain tensors, or DTensors that are divided along the vocabulary. The
        weight has the dtype of `hidden`, except under autocast.
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
    centering
        Adds the score-centring term, which makes the expected gradient at a constant advantage 0: a `TopKCentering` or a
        `FullCentering`. Its value, which means nothing, is in the loss. A mode must look at one token at a time.
    temperature
        T > 0, a number, or one per token, (…), which is constant: it gets no gradient.
    support
        The `Support` of each token's policy, over which it is renormalised: of truncated sampling, from which log μ was
        recorded. A sampled token has to be in its own. Recorded divergences and centring have the same support: the record
        of an id outside it counts for nothing.
    vocabulary_size
        Rows of the head from this id on are padding, which is neither read nor moved, in the records too. None: none are.
    logit_softcap
        cap > 0; None for none.
    entropy
        Whether to return the entropies too.
    entropy_coefficient
        c of an entropy bonus: the loss has −c H of each valid token, reduced as the others, with its gradient.
    chunk_tokens
        How many tokens' logits exist at once.
    chunk_vocabulary
        How many of the vocabulary's logits exist at once: None for all; a number recomputes them for the gradient, with a
        fourth matrix product. ``chunk_tokens=1024, chunk_vocabulary=6144`` needs the least memory.
    vocabulary_group
        Vocabulary-parallel: the ranks that hold the rows of the weight and the bias in parts, in their order. Each calls this
        with its own rows and the same of everything else, and gets the same results to the bit, the gradients of its
        rows and all of ∂hidden. DTensors that are Shard(0) on a mesh of one dimension need no group. See
        `docs/how-to/tensor-parallelism.md`.
        Logits or a `LinearHead` in a record are divided too.
    diagnostics
        Whether to compute them, in the same pass over the tokens.
    engine
        What takes the softmaxes and their gradient. ``"arrays"``: torch's operations. ``"compiled"``: loops that are
        compiled in a few seconds, once a process: by numba on the CPU, and not for float16 products; by Triton on a GPU.
        ``"auto"``: the loops where they exist, otherwise torch's operations.

    Returns
    -------
    VocabularyLoss
        `loss` (0-d, float32 at least), `diagnostics`, `log_prob` and `entropy`.

    Raises
    ------
    TypeError
        If a type, a dtype or the reduction is wrong.
    ValueError
        If shapes disagree, a number is out of its range, a valid token's id is outside the vocabulary or its support (on the
        CPU), a `FullDivergence` is asked for in parts of the vocabulary, the engine is unknown, or ``engine="compiled"``
        can't take these tensors.
    ImportError
        If ``engine="compiled"`` finds no numba, or on a GPU no Triton.
    RuntimeError
        On a second derivative, forward-mode differentiation or a transform of torch.func: not implemented.

    See Also
    --------
    drpo_torch.logits_policy_loss : the same from logits, with the formula of their gradient.

    Notes
    -----
    Under `torch.compile` it is `linear_log_prob`, as an operator, and the loss of that, which takes a fourth product. With a
    `FullDivergence`, a centring, a top-K divergence in a support, or vocabulary-parallel, the graph breaks here.

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
        centering=centering,
        temperature=temperature,
        support=support,
        vocabulary_size=vocabulary_size,
        diagnostics=diagnostics,
        entropy=entropy,
        entropy_coefficient=check_number("entropy_coefficient", entropy_coefficient),
        engine=engine,
    )
    inputs, steps = HeadInputs(hidden, weight, bias), HeadSteps(logit_softcap, chunk_tokens, chunk_vocabulary)
    if is_composable(arguments, vocabulary_group):
        head: dict[str, Any] = {"hidden": hidden, "weight": weight, "bias": bias, "logit_softcap": logit_softcap}
        head |= {"chunk_tokens": chunk_tokens, "chunk_vocabulary": chunk_vocabulary, "engine": engine}
        step: dict[str, Any] = {"temperature": temperature, "support": support, "vocabulary_size": vocabulary_size}
        return composed(arguments, partial(linear_log_prob, tokens=tokens, mask=mask, **head, **step))
    return _looking_at_values(arguments, inputs, steps, vocabulary_group)


@depends_on_values
def _looking_at_values(
    arguments: Arguments, inputs: HeadInputs, steps: HeadSteps, group: dist.ProcessGroup | None
) -> VocabularyLoss:
    """The loss with the gradients formed on the way."""
    inputs, shard = shard_of_head(*inputs, group, arguments.vocabulary_size, arguments.tokens, arguments.mask)
    for name, tensor in inputs.named():
        check_untransformed(name, tensor)
    hidden = inputs.hidden
    cap = None if steps.softcap is None else check_number("logit_softcap", steps.softcap, above=0.0)
    tempering = arguments.check(hidden.shape[:-1], shard, hidden, cap)
    dtype = product_dtype(hidden, inputs.weight)
    tokens_at_once, width = chunk_sizes(steps.chunk_tokens, steps.chunk_vocabulary, shard.width, dtype, hidden.device)
    if steps.chunk_vocabulary is not None:
        for record in (arguments.divergence, arguments.centering):
            if isinstance(record, (FullDivergence, FullCentering)):
                kind = type(record).__name__
                msg = f"chunk_vocabulary: expected None with a {kind}, which needs whole rows of logits, got {width}"
                raise ValueError(msg)  # noqa: TRY004 -- both types are right, but not together
    module = loops(arguments.engine, products=products_like(hidden, dtype), **arguments.matrices())
    needed = torch.is_grad_enabled() and any(tensor.requires_grad for _, tensor in inputs.named())
    with torch.no_grad():
        batch = TokenBatch(arguments, dtype, tempering, shard)
    with torch.no_grad(), without_autocast(hidden.device):
        head = Head(inputs, dtype, shard, needed=needed, several=len(batch.valid) > tokens_at_once)
        _Sweep(batch, head, module, (tokens_at_once, width)).run()
        result = batch.result()
    if not needed:
        return result
    return result._replace(loss=_WithGradients.apply(*inputs, result.loss, *head.gradients))  # type: ignore[no-untyped-call]


class _Sweep:
    """Takes every valid token through a `TokenBatch`, and adds up the head's gradients."""

    def __init__(
        self,
        batch: TokenBatch,
        head: Head,
        module: ModuleType | None,
        chunk: tuple[int, int],
    ) -> None:
        self.chunk_tokens, width = chunk
        self.batch, self.head = batch, head
        rows = min(self.chunk_tokens, len(batch.valid))
        self.chunks = Chunks(head, batch.tempering, module, rows=rows, width=width)
        self.at_once = rows == len(batch.valid) or looks_at_one_token(batch.given.objective)
        # whether logits are gone when the gradient in them is known
        self.recompute = len(self.chunks.parts) > 1 or not self.at_once
        self.softmax = self.chunks.keeps and head.needed and not self.recompute and batch.pulls_as_softmax

    def run(self) -> None:
        chunks = self.batch.valid.chunks(self.chunk_tokens)
        if self.at_once:
            for rows in chunks:
                found, kept = self._forward(rows)
                self._backward(kept, self.batch.step(found))
        else:
            # the objective has to see all tokens before the first gradient
            every = [self._forward(rows) for rows in chunks]
            pull = self.batch.step(Found.joined([found for found, _ in every]))
            starts = range(0, len(pull.at), self.chunk_tokens)
            for (_, kept), start in zip(every, starts, strict=True):
                self._backward(kept, pull.at_rows(slice(start, start + self.chunk_tokens)))
        self.head.finish()

    def _forward(self, rows: Places) -> tuple[Found, Kept]:
        """Take a chunk through its logits: results for the objective, and results for the gradient."""
        batch: TokenBatch = self.batch
        divergence: torch.Tensor | None = None

        def look(z: torch.Tensor, places: Places) -> None:
            nonlocal divergence
            divergence = batch.full_divergence(self.chunks.module, rows, z, places)

        columns = batch.columns(rows)
        whole, kept = self.chunks.forward(rows, columns, entropy=batch.needs_entropy, keep=self.softmax, look=look)
        return batch.find(rows, columns, whole, divergence, *self.chunks.held(len(rows))), kept

    def _backward(self, kept: Kept, pull: Pull) -> None:
        """Add the gradients of the tokens of a chunk that have one, from ∂loss/∂logits."""
        if not self.head.needed:
            return
        # a device's kernels see for themselves which rows have none
        if not is_waited_for(pull.at):
            count = len(pull.at)
            rows, alive = kept.rows.where_also(pull.moves)
            if len(rows) == 0:
                return
            if isinstance(alive, torch.Tensor) and len(rows) < count:
                if not self.recompute:
                    self.chunks.close_up(alive, count)
                kept, pull = kept.at(rows, alive), pull.at_rows(alive)
        self.chunks.backward(kept, pull, recompute=self.recompute, softmax=self.softmax)


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
