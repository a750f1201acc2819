"""Log-probs of the sampled tokens and of K others, entropies and log-normalisers, without a log-softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from drpo_core._checks import check_number
from drpo_torch._checks import check_ids, check_shape, check_tensor, check_top_k_ids, check_untransformed
from drpo_torch._host import without_autocast
from drpo_torch.autograd import refuse_second_derivative
from drpo_torch.vocabulary.chunks import Chunks, Kept
from drpo_torch.vocabulary.engines import loops, row_kernels
from drpo_torch.vocabulary.graph import (
    depends_on_values,
    gradient_like,
    may_be_overwritten,
    refuse_transformed_cotangents,
    rows_of,
)
from drpo_torch.vocabulary.head import Head, HeadInputs
from drpo_torch.vocabulary.most_probable import most_probable
from drpo_torch.vocabulary.recorded import product_dtype, products_like
from drpo_torch.vocabulary.row_map import row_map
from drpo_torch.vocabulary.shards import Shard, shard_of_head, shard_of_logits
from drpo_torch.vocabulary.softmax import Places, Pull, Statistics

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    import torch.distributed as dist

    from drpo_core.loss import Engine
    from drpo_torch.vocabulary.softmax import Tempering
    from drpo_torch.vocabulary.support import Support

__all__ = ["TokenLogProb", "linear_log_prob", "token_log_prob"]


class TokenLogProb(NamedTuple):
    """Per token, in nats, 0 where the mask is False.

    `log_prob` is that of the sampled token, `entropy` that of its distribution (or None), `log_normalizer` is
    log Σ_v e^x(v) of its logits x; `top_k_log_prob` those of the `top_k_ids` (…, K), int64, that were given or found, or None.
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor | None
    log_normalizer: torch.Tensor
    top_k_log_prob: torch.Tensor | None
    top_k_ids: torch.Tensor | None


@depends_on_values
def token_log_prob(
    *,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor | None = None,
    top_k_ids: torch.Tensor | None = None,
    top_k: int | None = None,
    temperature: float | torch.Tensor = 1.0,
    support: Support | None = None,
    vocabulary_size: int | None = None,
    entropy: bool = False,
    overwrite_logits: bool = False,
    vocabulary_group: dist.ProcessGroup | None = None,
    engine: Engine = "auto",
) -> TokenLogProb:
    """Log-prob log π of each sampled token, π = softmax(logits / T), differentiable, without a log-softmax.

    Softmaxes exist for a few rows at a time only. The backward pass computes them again, and skips rows that no cotangent
    reaches: their gradient is 0, whatever they hold.

    Parameters
    ----------
    logits
        (…, V); −inf is a probability of 0. float16 and bfloat16 are computed in float32.
    tokens
        Ids of the sampled tokens, (…), of any integral dtype; anything, such as −100, where the mask is False.
    mask
        Boolean, (…), True at tokens that count; the logits of the others may hold anything. None: every token counts.
    top_k_ids
        Ids of K more tokens for each, (…, K), whose log-probs are wanted too.
    top_k
        Instead of these, K: the K most probable tokens of the policy itself, from 1 to the vocabulary's size. Their ids are
        constants. They come by decreasing logit, before a soft-cap and a temperature, and of equal logits the lower id
        first, however tokens and vocabulary are divided. Where fewer than K have a probability, because of the support or of
        logits of −inf, the others follow, the lower id first, with a log-prob of −∞ whose gradient is 0. A row that holds a
        NaN has log-probs of NaN, of any ids.
    temperature
        T > 0, a number, or one per token, (…), which is constant: it gets no gradient.
    support
        The `Support` of each token's policy, over which it is renormalised: log π = −∞ outside, with a gradient of 0. A
        sampled token has to be in its own.
    vocabulary_size
        Logits from this id on are padding, with a probability and a gradient of 0. None: none are.
    entropy
        Whether to compute the entropy −Σ_v π log π too.
    overwrite_logits
        Let the backward pass put ∂/∂logits in the storage of the logits instead of one of its own. Nothing else may need the
        logits then: autograd raises if something did. Logits that share memory with each other (expanded ones) are left
        as they are, and all logits in a checkpoint, which computes from them twice.
    vocabulary_group
        Vocabulary-parallel: the ranks that hold the columns of the logits in parts, in their order. Each calls this with its
        own columns and the same of everything else, and gets the same results to the bit, and the gradient of its columns. A
        DTensor that is Shard(-1) on a mesh of one dimension needs no group. See `docs/how-to/tensor-parallelism.md`.
    engine
        ``"arrays"``: torch's operations. ``"compiled"``: loops that are compiled in a few seconds, once a process: by numba
        on the CPU, for rows that are contiguous, and not for float16; by Triton on a GPU, for any rows. ``"auto"``: the loops
        where they exist, otherwise torch's operations.

    Returns
    -------
    TokenLogProb
        `log_prob`, `entropy` and `log_normalizer`, (…), and `top_k_log_prob`, (…, K); float32 at least, each differentiable.
        `top_k_ids`, (…, K).

    Raises
    ------
    TypeError
        If a dtype is wrong, or the temperature is not a number.
    ValueError
        If the shapes disagree, an id is outside the vocabulary or a sampled token outside its support (on the CPU), a number
        is out of its range, `top_k` and `top_k_ids` are both given, the engine is unknown, or ``engine="compiled"`` can't take
        these logits.
    ImportError
        If ``engine="compiled"`` finds no numba, or on a GPU no Triton.
    RuntimeError
        On a second derivative, forward-mode differentiation or a transform of torch.func: not implemented.

    References
    ----------
    `docs/derivations/divergence.md`; `drpo_torch.top_k_divergences` takes the log-normaliser.

    Examples
    --------
    >>> import torch
    >>> from drpo_torch import token_log_prob
    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_()
    >>> found = token_log_prob(logits=logits, tokens=torch.tensor([0]), entropy=True)
    >>> found.log_prob.sum().backward()
    >>> logits.grad
    tensor([[ 0.5000, -0.3000, -0.2000]])

    The two most probable tokens:

    >>> found = token_log_prob(logits=logits, tokens=torch.tensor([2]), top_k=2)
    >>> found.top_k_ids, found.top_k_log_prob.exp().detach()
    (tensor([[0, 1]]), tensor([[0.5000, 0.3000]]))
    """
    logits, shard = shard_of_logits(logits, vocabulary_group, vocabulary_size)
    check_untransformed("logits", logits)
    leading = logits.shape[:-1]
    columns, rows = _checked(tokens, mask, top_k_ids, leading, shard.vocabulary, logits)
    top_k = _check_top_k(top_k, top_k_ids, shard.vocabulary)
    known: dict[str, Any] = {"size": shard.vocabulary, "leading": leading, "beside": logits, "columns": shard.all_columns}
    tempering = shard.narrowed(row_map(temperature, support, tokens, mask, **known))
    flat = rows_of(logits)
    overwrite = overwrite_logits and may_be_overwritten(flat)
    module = loops(engine, logits=flat)
    found = _TokenLogProb.apply(flat, columns, rows, tempering, entropy, top_k, overwrite, module, shard)  # type: ignore[no-untyped-call]
    return _shaped(found, tokens.shape, given=top_k_ids is not None)


@depends_on_values
def linear_log_prob(
    *,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    top_k_ids: torch.Tensor | None = None,
    top_k: int | None = None,
    temperature: float | torch.Tensor = 1.0,
    support: Support | None = None,
    vocabulary_size: int | None = None,
    logit_softcap: float | None = None,
    entropy: bool = False,
    chunk_tokens: int = 256,
    chunk_vocabulary: int | None = None,
    vocabulary_group: dist.ProcessGroup | None = None,
    engine: Engine = "auto",
) -> TokenLogProb:
    """Log-prob log π of each sampled token from hidden states and the LM head, π = softmax(cap·tanh((h Wᵀ + b)/cap) / T).

    Any loss follows from it, differentiable in `hidden`, `weight` and `bias`. Logits exist for a chunk of tokens at a time,
    in the forward pass and in the backward pass, which takes the products again: four matrix products a chunk, where
    `drpo_torch.linear_policy_loss` needs three. No gradient is formed for a tensor that doesn't require it, nor for tokens
    that no cotangent reaches.

    Parameters
    ----------
    hidden
        Last hidden states, (…, H); anything where the mask is False.
    weight, bias
        W and b of the LM head, (V, H) and (V,): plain tensors, or DTensors that are divided along the vocabulary. The
        weight has the dtype of `hidden`, except under autocast.
    tokens, mask, top_k_ids, top_k
        See `drpo_torch.token_log_prob`.
    temperature, support
        See `drpo_torch.token_log_prob`.
    vocabulary_size
        Rows of the head from this id on are padding, which is neither read nor moved. None: none are.
    logit_softcap
        cap > 0; None for none.
    entropy
        Whether to compute the entropy −Σ_v π log π too.
    chunk_tokens
        How many tokens' logits exist at once.
    chunk_vocabulary
        How many of the vocabulary's logits exist at once; None for all.
    vocabulary_group, engine
        See `drpo_torch.linear_policy_loss`.

    Returns
    -------
    TokenLogProb
        `log_prob`, `entropy` and `log_normalizer`, (…), and `top_k_log_prob`, (…, K); float32 at least, each differentiable.
        `top_k_ids`, (…, K).

    Raises
    ------
    TypeError
        If a type or a dtype is wrong.
    ValueError
        If shapes disagree, a number is out of its range, `top_k` and `top_k_ids` are both given, a valid token's id is outside
        the vocabulary or its support (on the CPU), the engine is unknown, or ``engine="compiled"`` can't take these tensors.
    ImportError
        If ``engine="compiled"`` finds no numba, or on a GPU no Triton.
    RuntimeError
        On a second derivative, forward-mode differentiation or a transform of torch.func: not implemented.

    See Also
    --------
    drpo_torch.linear_policy_loss : a policy loss from the same in three products.

    Notes
    -----
    `torch.compile` of a model that calls it breaks the graph here: what is computed depends on the mask's values. Under
    autocast the products are taken in its dtype, in both passes. ∂weight of several chunks of tokens adds up in float32 at
    least; one chunk of all tokens, with a `chunk_vocabulary`, needs no such sum.

    Examples
    --------
    A penalty on the entropy of the policy, beside its log-probs:

    >>> import torch
    >>> from drpo_torch import linear_log_prob
    >>> hidden = torch.eye(3)[:1].requires_grad_()
    >>> weight = torch.tensor([[0.5, 0.3, 0.2]]).log().T.expand(3, 3).contiguous().requires_grad_()
    >>> found = linear_log_prob(hidden=hidden, weight=weight, tokens=torch.tensor([0]), entropy=True)
    >>> (found.log_prob - 0.1 * found.entropy).sum().backward()
    >>> weight.grad[:, 0]
    tensor([ 0.5168, -0.3052, -0.2116])
    """
    inputs, shard = shard_of_head(hidden, weight, bias, vocabulary_group, vocabulary_size)
    for name, tensor in inputs.named():
        check_untransformed(name, tensor)
    leading = hidden.shape[:-1]
    columns, rows = _checked(tokens, mask, top_k_ids, leading, shard.vocabulary, hidden)
    top_k = _check_top_k(top_k, top_k_ids, shard.vocabulary)
    cap = None if logit_softcap is None else check_number("logit_softcap", logit_softcap, above=0.0)
    known: dict[str, Any] = {"leading": leading, "beside": hidden, "columns": shard.all_columns, "softcap": cap}
    tempering = shard.narrowed(row_map(temperature, support, tokens, mask, size=shard.vocabulary, **known))
    size, width = int(check_number("chunk_tokens", chunk_tokens, at_least=1, whole=True)), shard.width
    if chunk_vocabulary is not None:
        width = min(int(check_number("chunk_vocabulary", chunk_vocabulary, at_least=1, whole=True)), width)
    dtype = product_dtype(hidden, inputs.weight)
    module = loops(engine, products=products_like(hidden, dtype))
    sweep = _HeadSweep(rows, columns, tempering, module, dtype, (size, width), shard, entropy=entropy, top_k=top_k)
    found = _LinearLogProb.apply(*inputs, sweep)  # type: ignore[no-untyped-call]
    return _shaped(found, tokens.shape, given=top_k_ids is not None)


def _checked(
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    top_k_ids: torch.Tensor | None,
    leading: Sequence[int],
    vocabulary: int,
    beside: torch.Tensor,
) -> tuple[torch.Tensor, Places]:
    """Ids whose log-probs are wanted, that of the sampled token first, (rows, 1 or 1 + K), and the tokens that count."""
    check_untransformed("tokens", check_tensor("tokens", tokens, "integral", beside=beside))
    check_shape("tokens", tokens, leading, "the tokens")
    if mask is not None:
        check_untransformed("mask", check_tensor("mask", mask, "bool", beside=beside))
        check_shape("mask", mask, leading, "the tokens")
    check_ids("tokens", tokens, vocabulary, valid=mask)
    columns = tokens.reshape(-1, 1)
    if top_k_ids is not None:
        check_untransformed("top_k_ids", check_tensor("top_k_ids", top_k_ids, "integral", beside=beside))
        check_top_k_ids("top_k_ids", top_k_ids, leading)
        check_ids("top_k_ids", top_k_ids, vocabulary, valid=mask)
        more = top_k_ids.reshape(len(columns), top_k_ids.shape[-1])
        columns = torch.cat((columns.to(torch.int64), more.to(torch.int64)), dim=-1)
    rows = Places.first(len(columns), columns.device) if mask is None else Places.where(mask.reshape(-1))
    # anything where the mask is False, such as −100
    return rows.counted(columns.to(torch.int64), 0), rows


def _check_top_k(top_k: object, top_k_ids: torch.Tensor | None, vocabulary: int) -> int | None:
    """The number of most probable tokens that are wanted."""
    if top_k is None:
        return None
    if top_k_ids is not None:
        msg = f"top_k: expected None beside top_k_ids, got {top_k!r}; give the ids, or how many are to be found"
        raise ValueError(msg)
    return int(check_number("top_k", top_k, at_least=1, at_most=vocabulary, whole=True))


def _shaped(found: tuple[Any, ...], shape: torch.Size, *, given: bool) -> TokenLogProb:
    """The results of flat tokens at their places; those of K more tokens if some were `given`, or if there are some."""
    log_probs, entropy, log_normalizer, columns = found
    log_prob, top_k, ids = log_probs[:, 0], None, None
    if given or log_probs.shape[1] > 1:
        # results that share memory could not each be changed in place
        log_prob, top_k, ids = log_prob.clone(), log_probs[:, 1:].clone(), columns[:, 1:].clone()
        if not given:
            # what has no probability is a constant
            top_k = top_k.masked_fill(top_k.detach() == -torch.inf, -torch.inf)
        top_k, ids = (of_ids.reshape(*shape, of_ids.shape[-1]) for of_ids in (top_k, ids))
    entropy = None if entropy is None else entropy.reshape(shape)
    return TokenLogProb(log_prob.reshape(shape), entropy, log_normalizer.reshape(shape), top_k, ids)


def _spread(values: torch.Tensor, rows: Places, count: int) -> torch.Tensor:
    """The values at their rows, and 0 at the others."""
    zeros = torch.zeros((count, *values.shape[1:]), dtype=values.dtype, device=values.device)
    return zeros.index_copy_(0, rows.index, rows.counted(values))


_Cotangents: TypeAlias = "tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]"
"""Those of the log-probs (rows, C), of the entropies, if there are any, and of the log-normalisers."""


def _picked(cotangents: _Cotangents, rows: Places) -> _Cotangents:
    of_log_probs, of_entropy, of_normalizer = cotangents
    return of_log_probs[rows.index], None if of_entropy is None else of_entropy[rows.index], of_normalizer[rows.index]


def _reached(
    rows: Places, of_log_probs: torch.Tensor, of_entropy: torch.Tensor | None, of_normalizer: torch.Tensor
) -> tuple[Places, torch.Tensor | slice]:
    """Those of the rows that a cotangent reaches, and their numbers among these."""
    every = (of_log_probs != 0.0).any(-1) | (of_normalizer != 0.0)
    if of_entropy is not None:
        every |= of_entropy != 0.0
    return rows.where_also(every[rows.index])


def _pull(
    columns: torch.Tensor,
    statistics: Statistics,
    tempering: Tempering,
    of_log_probs: torch.Tensor,
    of_entropy: torch.Tensor | None,
    of_normalizer: torch.Tensor,
) -> Pull:
    """∂log π(c)/∂x = 1[c] − π, ∂log Z/∂x = π, ∂H/∂x = −π (log π + H), times cotangents."""
    if tempering.support is not None:
        # an id outside the support has a constant log π
        of_log_probs = of_log_probs.masked_fill(~tempering.support.holds(columns), 0.0)
    pull = Pull(columns, of_log_probs, of_normalizer - of_log_probs.sum(-1))
    if of_entropy is None or statistics.entropy is None:
        return pull
    return pull.with_entropy(of_entropy, statistics.log_sum, statistics.entropy)


class _TokenLogProb(torch.autograd.Function):
    """From logits (N, V): log-probs of the columns (N, C), entropies and log-normalisers (N,), and the columns.

    With `top_k`, columns of the most probable tokens follow those given.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        logits: torch.Tensor,
        columns: torch.Tensor,
        rows: Places,
        tempering: Tempering,
        entropy: bool,  # noqa: FBT001 -- Function.apply takes no keywords
        top_k: int | None,
        overwrite: bool,  # noqa: FBT001
        module: ModuleType | None,
        shard: Shard,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        of_rows, z, ids = tempering.at(rows.key), logits[:, : tempering.size], columns[rows.key]
        kernels = row_kernels(module, z.shape[-1], z.dtype, z.device)
        mine = kernels.statistics(z, rows, of_rows, entropy=entropy)
        found, share, picked = shard.merged(mine, shard.picked(z, rows, ids, of_rows), ids)
        if top_k is not None:
            first = most_probable(module, z, rows, of_rows, top_k, shard.start)
            ids, picked = shard.with_most_probable(first, top_k, ids, picked, of_rows)
        log_probs, columns = found.log_prob(picked), _spread(ids, rows, len(logits))
        ctx.mark_non_differentiable(columns)
        fields = [field for statistics in (found, mine) for field in statistics if field is not None]
        ctx.save_for_backward(logits, columns, share, *fields)
        ctx.rows, ctx.tempering, ctx.entropy, ctx.overwrite = rows, tempering, entropy, overwrite
        ctx.module, ctx.shard = module, shard
        n = len(logits)
        entropies = None if found.entropy is None else _spread(found.entropy, rows, n)
        return _spread(log_probs, rows, n), entropies, _spread(found.log_normalizer, rows, n), columns

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        of_log_probs: torch.Tensor,
        of_entropy: torch.Tensor | None,
        of_normalizer: torch.Tensor,
        _: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        cotangents = of_log_probs, of_entropy, of_normalizer
        refuse_second_derivative()
        refuse_transformed_cotangents(*cotangents)
        logits, columns, share, *fields = ctx.saved_tensors
        half, (rows, alive) = len(fields) // 2, _reached(ctx.rows, *cotangents)
        whole, mine = (Statistics.of(some, entropy=ctx.entropy).at(alive) for some in (fields[:half], fields[half:]))
        tempering, size = ctx.tempering.at(rows.key), ctx.tempering.size
        pull = _pull(columns[rows.index], whole, tempering, *_picked(cotangents, rows)).counted(rows)
        moves = pull.moves
        pull = ctx.shard.pull(pull, mine, whole, share[alive])
        gradient = logits.detach() if ctx.overwrite else gradient_like(logits)
        z = logits[:, :size]
        kernels = row_kernels(ctx.module, z.shape[-1], z.dtype, z.device)
        kernels.gradients(z, rows, tempering, pull, statistics=mine, out=gradient[:, :size])
        gradient[:, size:].zero_()
        ctx.shard.clear_(gradient, rows, moves, mine)
        return gradient, None, None, None, None, None, None, None, None


class _HeadSweep:
    """All tokens through the head, chunk by chunk, in one pass or the other."""

    def __init__(
        self,
        rows: Places,
        columns: torch.Tensor,
        tempering: Tempering,
        module: ModuleType | None,
        dtype: torch.dtype,
        chunk: tuple[int, int],
        shard: Shard,
        *,
        entropy: bool,
        top_k: int | None,
    ) -> None:
        self.rows, self.columns, self.entropy, self._top_k, self._shard = rows, columns, entropy, top_k, shard
        self.tempering, self._module, self._dtype, (self._size, self._width) = tempering, module, dtype, chunk

    def chunks(self, head: Head, rows: Places) -> Chunks:
        return Chunks(head, self.tempering, self._module, rows=min(self._size, len(rows)), width=self._width)

    def head(self, inputs: HeadInputs, rows: Places, *, needed: bool) -> Head:
        with without_autocast(inputs.hidden.device):
            return Head(inputs, self._dtype, self._shard, needed=needed, several=len(rows) > self._size)

    def forward(self, inputs: HeadInputs) -> tuple[torch.Tensor, torch.Tensor, list[Statistics], Statistics, torch.Tensor]:
        """Log-probs of columns, and which; statistics of the parts of the vocabulary, of all of it, and the parts' shares."""
        head = self.head(inputs, self.rows, needed=False)
        chunks = self.chunks(head, self.rows)
        found = [
            chunks.forward(rows, self.columns[rows.key], entropy=self.entropy, top_k=self._top_k)
            for rows in (self.rows.chunks(self._size) if len(self.rows) else (self.rows,))
        ]
        log_probs, whole, kept = zip(*found, strict=True)
        parts = [Statistics.joined(part) for part in zip(*(one.statistics for one in kept), strict=True)]
        columns, shares = torch.cat([one.columns for one in kept]), torch.cat([one.shares for one in kept], dim=1)
        return torch.cat(log_probs), columns, parts, Statistics.joined(whole), shares

    def backward(self, head: Head, kept: Kept, pull: Pull) -> None:
        """Add up the head's gradients; everything is of the same rows."""
        chunks = self.chunks(head, kept.rows)
        for start in range(0, len(kept.rows), self._size):
            some = slice(start, start + self._size)
            chunks.backward(kept.at(kept.rows[some], some), pull.at_rows(some), recompute=True)
        head.finish()


class _LinearLogProb(torch.autograd.Function):
    """From hidden states, weight and bias, the outputs of `_TokenLogProb`."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sweep: _HeadSweep,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        with without_autocast(hidden.device):
            log_probs, ids, parts, whole, shares = sweep.forward(HeadInputs(hidden, weight, bias))
        n = len(sweep.columns)
        columns = _spread(ids, sweep.rows, n)
        ctx.mark_non_differentiable(columns)
        fields = [field for part in (*parts, whole) for field in part if field is not None]
        ctx.save_for_backward(hidden, weight, bias, columns, shares, *fields)
        ctx.sweep, ctx.rows = sweep, sweep.rows
        entropies = None if whole.entropy is None else _spread(whole.entropy, sweep.rows, n)
        return _spread(log_probs, sweep.rows, n), entropies, _spread(whole.log_normalizer, sweep.rows, n), columns

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        of_log_probs: torch.Tensor,
        of_entropy: torch.Tensor | None,
        of_normalizer: torch.Tensor,
        _: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        cotangents = of_log_probs, of_entropy, of_normalizer
        refuse_second_derivative()
        refuse_transformed_cotangents(*cotangents)
        hidden, weight, bias, columns, shares, *fields = ctx.saved_tensors
        sweep, rows = ctx.sweep, ctx.rows
        size = 4 if sweep.entropy else 3
        every = [Statistics.of(fields[i : i + size], entropy=sweep.entropy) for i in range(0, len(fields), size)]
        found, alive = _reached(rows, *cotangents)
        *parts, whole = (statistics.at(alive) for statistics in every)
        columns = columns[found.index]
        kept = Kept(found, columns, whole, parts, shares[:, alive])
        pull = _pull(columns, whole, sweep.tempering.at(found.key), *_picked(cotangents, found)).counted(found)
        with without_autocast(hidden.device):
            head = sweep.head(HeadInputs(hidden, weight, bias), found, needed=True)
            sweep.backward(head, kept, pull)
        gradients = zip(head.gradients, (hidden, weight, bias), strict=True)
        return *(None if g is None else g.to(tensor.dtype) for g, tensor in gradients), None
