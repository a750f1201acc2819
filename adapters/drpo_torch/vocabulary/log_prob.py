"""Log-probs of the sampled tokens and of K others, entropies and log-normalisers, without a log-softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from drpo_torch.vocabulary import operators
from drpo_torch.vocabulary.graph import depends_on_values
from drpo_torch.vocabulary.head import HeadInputs
from drpo_torch.vocabulary.softmax_functions import HeadSteps, OfHead, OfLogits, Wish, arguments_of_head, arguments_of_logits

if TYPE_CHECKING:
    import torch.distributed as dist

    from drpo_core.loss import Engine
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
    wish = Wish(tokens, mask, top_k_ids, top_k, temperature, support, vocabulary_size, entropy=entropy, engine=engine)
    if torch.compiler.is_compiling() and vocabulary_group is None:
        return _shaped(operators.of_logits(logits, wish), wish)
    return _shaped(_of_logits(logits, wish, vocabulary_group, overwrite=overwrite_logits), wish)


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
    chunk_tokens: int | None = None,
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
        How many tokens' logits exist at once. None: 256 on the CPU, on a GPU those that a 64th of its memory holds.
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
    `torch.compile` keeps it as an operator of the graph, except vocabulary-parallel, where the graph breaks. Under
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
    wish = Wish(tokens, mask, top_k_ids, top_k, temperature, support, vocabulary_size, entropy=entropy, engine=engine)
    steps = HeadSteps(logit_softcap, chunk_tokens, chunk_vocabulary)
    if torch.compiler.is_compiling() and vocabulary_group is None:
        return _shaped(operators.of_head(HeadInputs(hidden, weight, bias), wish, steps), wish)
    return _shaped(_of_head(HeadInputs(hidden, weight, bias), wish, steps, vocabulary_group), wish)


@depends_on_values
def _of_logits(logits: torch.Tensor, wish: Wish, group: dist.ProcessGroup | None, *, overwrite: bool) -> tuple[Any, ...]:
    return OfLogits.apply(*arguments_of_logits(logits, wish, group, overwrite=overwrite))  # type: ignore[no-any-return, no-untyped-call]


@depends_on_values
def _of_head(inputs: HeadInputs, wish: Wish, steps: HeadSteps, group: dist.ProcessGroup | None) -> tuple[Any, ...]:
    return OfHead.apply(*arguments_of_head(inputs, wish, steps, group))  # type: ignore[no-any-return, no-untyped-call]


def _shaped(found: tuple[Any, ...], wish: Wish) -> TokenLogProb:
    """The results of flat tokens at their places."""
    shape, given = wish.tokens.shape, wish.top_k_ids is not None
    log_prob, entropy, log_normalizer, columns = found
    top_k = ids = None
    if given or wish.top_k is not None:
        # results that share memory could not each be changed in place
        log_prob, top_k, ids = log_prob[:, 0].clone(), log_prob[:, 1:].clone(), columns[:, 1:].clone()
        if not given:
            # what has no probability is a constant
            top_k = top_k.masked_fill(top_k.detach() == -torch.inf, -torch.inf)
        top_k, ids = (of_ids.reshape(*shape, of_ids.shape[-1]) for of_ids in (top_k, ids))
    entropy = None if entropy is None else entropy.reshape(shape)
    return TokenLogProb(log_prob.reshape(shape), entropy, log_normalizer.reshape(shape), top_k, ids)
