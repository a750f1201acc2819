"""From logits to a policy loss and its gradient in them, without a log-softmax."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from drpo_core._checks import check_number
from drpo_torch._checks import check_untransformed
from drpo_torch.autograd import refuse_second_derivative, scaled
from drpo_torch.vocabulary.batch import Arguments, TokenBatch, VocabularyLoss
from drpo_torch.vocabulary.composed import composed, is_composable
from drpo_torch.vocabulary.engines import loops, row_kernels
from drpo_torch.vocabulary.graph import depends_on_values, gradient_like, may_be_overwritten, rows_of
from drpo_torch.vocabulary.log_prob import token_log_prob
from drpo_torch.vocabulary.shards import shard_of_logits
from drpo_torch.vocabulary.softmax import power_of_two_below

if TYPE_CHECKING:
    from types import ModuleType

    import torch.distributed as dist

    from drpo_core import Objective
    from drpo_core.loss import Engine
    from drpo_core.reduction import Reduction
    from drpo_torch.vocabulary.recorded import Centering, Divergence
    from drpo_torch.vocabulary.support import Support

__all__ = ["logits_policy_loss"]

# the largest power of two below float16's largest number
_FLOAT16_BITS = 15


def logits_policy_loss(
    objective: Objective,
    *,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    behavior_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
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
    entropy: bool = False,
    entropy_coefficient: float = 0.0,
    overwrite_logits: bool = False,
    vocabulary_group: dist.ProcessGroup | None = None,
    diagnostics: bool = True,
    engine: Engine = "auto",
) -> VocabularyLoss:
    """Policy loss of tokens from logits; ∂loss/∂logits is formed in the forward pass, in one sweep.

    ∂L/∂logits(v) = c g (1[v = token] − π(v)) / T with g = ∂L/∂log π = −A r w, and c the token's share in the reduction.
    Beside that gradient nothing of the size of the logits exists; with `overwrite_logits` not even the gradient.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode`.
    logits
        (…, V); −inf is a probability of 0. float16 and bfloat16 are computed in float32. The gradient is in their dtype;
        that of float16 waits for the cotangent (a loss scaler's factor, say) times a power of two a row, so that nothing
        underflows.
    tokens
        Ids of the sampled tokens, (…), of any integral dtype; anything where the mask is False.
    behavior_log_prob, advantages
        log μ (nats, ≤ 0) and A of the sampled tokens; (…), each of any floating-point dtype.
    mask
        Boolean, (…), True at tokens that count. The others may hold anything, also in their logits.
    proximal_log_prob, reference_log_prob, reduction, normalizer, token_weights, segment_ids
        See `drpo_torch.policy_loss`.
    divergence
        For ``DPPO(divergence="per_token")``: a divergence per token, or a `TopKDivergence` or `FullDivergence` to measure.
    centering
        Adds the score-centring term, which makes the expected gradient at a constant advantage 0: a `TopKCentering` or a
        `FullCentering`. Its value, which means nothing, is in the loss. A mode must look at one token at a time.
    temperature
        T > 0: π = softmax(logits / T); a number, or one per token, (…), which is constant: it gets no gradient.
    support
        The `Support` of each token's policy, over which it is renormalised: of truncated sampling, from which log μ was
        recorded. A sampled token has to be in its own. Recorded divergences and centring have the same support: the record
        of an id outside it counts for nothing.
    vocabulary_size
        Logits from this id on are padding, with a probability and a gradient of 0, in the records too. None: none are.
    entropy
        Whether to return the entropies too.
    entropy_coefficient
        c of an entropy bonus: the loss has −c H of each valid token, reduced as the others, with its gradient.
    overwrite_logits
        Put the gradient in the storage of the logits, at once. Nothing else may need the logits then: autograd raises if
        something did. Logits that share memory with each other (expanded ones) are left as they are, and all logits in a
        checkpoint, which computes from them twice.
    vocabulary_group
        See `drpo_torch.token_log_prob`. Logits in a record are divided as these are.
    diagnostics
        Whether to compute them, in the same pass over the tokens.
    engine
        ``"arrays"``: torch's operations. ``"compiled"``: loops that are compiled in a few seconds, once a process: by numba
        on the CPU, for rows that are contiguous, and not for float16; by Triton on a GPU, for any rows. ``"auto"``: the loops
        where they exist, otherwise torch's operations.

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
        CPU), the engine is unknown, or ``engine="compiled"`` can't take these logits.
    ImportError
        If ``engine="compiled"`` finds no numba, or on a GPU no Triton.
    RuntimeError
        On a second derivative, forward-mode differentiation or a transform of torch.func: not implemented.

    Notes
    -----
    Under `torch.compile` it is `token_log_prob`, as an operator, and the loss of that: the gradient then comes from a backward
    pass, in memory of its own. With a centring, a `LinearHead` of the behaviour policy, a top-K divergence in a support, or
    vocabulary-parallel, the graph breaks here.

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
    if is_composable(arguments, vocabulary_group, logits):
        step: dict[str, Any] = {"temperature": temperature, "support": support, "vocabulary_size": vocabulary_size}
        return composed(
            arguments, partial(token_log_prob, logits=logits, tokens=tokens, mask=mask, engine=engine, **step), logits
        )
    return _looking_at_values(arguments, logits, vocabulary_group, overwrite=overwrite_logits)


@depends_on_values
def _looking_at_values(
    arguments: Arguments, logits: torch.Tensor, group: dist.ProcessGroup | None, *, overwrite: bool
) -> VocabularyLoss:
    """The loss with its gradient formed on the way."""
    logits, shard = shard_of_logits(logits, group, arguments.vocabulary_size, arguments.tokens, arguments.mask)
    check_untransformed("logits", logits)
    tempering = arguments.check(logits.shape[:-1], shard, logits)
    flat = rows_of(logits)
    module = loops(arguments.engine, logits=flat, **arguments.matrices())
    with torch.no_grad():
        sweep = _Sweep(TokenBatch(arguments, logits.dtype, tempering, shard), module)
    if not (flat.requires_grad and torch.is_grad_enabled()):
        with torch.no_grad():
            sweep.run(flat.detach(), None)
            return sweep.result
    loss = _LogitsPolicyLoss.apply(flat, sweep, overwrite and may_be_overwritten(flat))  # type: ignore[no-untyped-call]
    return sweep.result._replace(loss=loss)


class _Sweep:
    """Takes every valid token through a `TokenBatch`, and forms the gradient on the way."""

    def __init__(self, batch: TokenBatch, module: ModuleType | None) -> None:
        self.batch, self.module = batch, module
        self.result: VocabularyLoss

    def run(self, logits: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """∂loss/∂logits to `gradient`, which may be the logits; of float16, times powers of two whose inverses it returns."""
        batch, rows, shard, size = self.batch, self.batch.valid, self.batch.shard, self.batch.tempering.size
        tempering, z = batch.tempering.at(rows.key), logits[:, :size]
        into = None if gradient is None else gradient[:, :size]
        kernels = row_kernels(self.module, z.shape[-1], z.dtype, z.device)
        # a softmax that is in the working dtype already waits in the gradient's place for its coefficient
        kept = into is not None and kernels.keeps and logits.dtype == batch.row_dtype and batch.pulls_as_softmax
        columns = batch.columns(rows)
        # before a softmax takes the place of the logits
        divergence = batch.full_divergence(self.module, rows, z, rows)
        options: dict[str, Any] = {"entropy": batch.needs_entropy, "keep": into if kept else None}
        mine = kernels.softmaxes(z, rows, tempering, shard.wanted(columns), **options)
        found, share = shard.merged(mine, rows, columns)
        every = batch.step(batch.find(rows, columns, found, divergence, z, rows))
        self.result = batch.result()
        if gradient is None or into is None:
            return None
        pull = shard.pull(every, mine.statistics, found.statistics, share)
        unit = None
        if logits.dtype == torch.float16:
            pull = pull.counted(rows)
            unit = torch.ones(len(logits), dtype=batch.row_dtype, device=logits.device)
            shift = power_of_two_below(_FLOAT16_BITS, pull.size(z.shape[-1]) / tempering.temperature)
            pull, unit[rows.key] = pull.scaled(shift), 1.0 / shift
        # what is derived at all columns needs their log-probs
        of_rows = (mine if pull.everywhere is None else found).statistics
        kernels.gradients(z, rows, tempering, pull, statistics=of_rows, out=into, kept=kept)
        gradient[:, size:].zero_()
        shard.clear_(gradient, rows, every, mine.statistics)
        return unit


class _LogitsPolicyLoss(torch.autograd.Function):
    """The loss with its gradient in the logits; backward multiplies that by the cotangent."""

    # the sweep is in here because the graph must know the logits as they were: of a view that has been written to,
    # autograd would take the derivative through its base, in an array of the size of the logits
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, sweep: _Sweep, overwrite: bool) -> torch.Tensor:  # noqa: ANN401, FBT001
        logits = logits.detach()
        gradient = logits if overwrite else gradient_like(logits)
        ctx.save_for_backward(gradient, sweep.run(logits, gradient))
        return sweep.result.loss

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        refuse_second_derivative()
        gradient, unit = ctx.saved_tensors
        return scaled(gradient, cotangents[0], gradient.dtype, unit=unit), None, None
