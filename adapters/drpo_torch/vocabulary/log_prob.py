"""From logits: log-probs of the sampled tokens, entropies and log-normalisers, without a log-softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from drpo_core._checks import check_number
from drpo_torch._checks import check_ids, check_logits, check_shape, check_tensor, check_untransformed
from drpo_torch.autograd import refuse_second_derivative
from drpo_torch.vocabulary.engines import loops, row_kernels
from drpo_torch.vocabulary.graph import (
    depends_on_values,
    gradient_like,
    may_be_overwritten,
    refuse_transformed_cotangents,
)
from drpo_torch.vocabulary.softmax import Places, Pull, Statistics, Tempering

if TYPE_CHECKING:
    from types import ModuleType

    from drpo_core.loss import Engine

__all__ = ["TokenLogProb", "token_log_prob"]


class TokenLogProb(NamedTuple):
    """Per token, in nats: `log_prob` of the sampled token, `entropy` of its distribution (or None), `log_normalizer`."""

    log_prob: torch.Tensor
    entropy: torch.Tensor | None
    log_normalizer: torch.Tensor


@depends_on_values
def token_log_prob(
    *,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    overwrite_logits: bool = False,
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
        Ids of the sampled tokens, (…), of any integral dtype.
    temperature
        T > 0.
    entropy
        Whether to compute the entropy −Σ_v π log π too.
    overwrite_logits
        Let the backward pass put ∂/∂logits in the storage of the logits instead of one of its own. Nothing else may need the
        logits then: autograd raises if something did. Logits that share memory with each other (expanded ones) are left
        as they are, and all logits in a checkpoint, which computes from them twice.
    engine
        ``"arrays"``: torch's operations. ``"compiled"``: loops that numba compiles in a few seconds, once a process; on the
        CPU, for rows that are contiguous, and not for float16. ``"auto"``: the loops where they exist, otherwise torch's
        operations.

    Returns
    -------
    TokenLogProb
        `log_prob`, `entropy` and `log_normalizer` = log Σ_v e^(logits/T), (…), float32 at least.

    Raises
    ------
    TypeError
        If a dtype is wrong, or the temperature is not a number.
    ValueError
        If the shapes disagree, an id is outside the vocabulary (on the CPU), the temperature is not finite and positive, the
        engine is unknown, or ``engine="compiled"`` can't take these logits.
    ImportError
        If ``engine="compiled"`` finds no numba.
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
    """
    check_untransformed("logits", check_logits(logits))
    check_untransformed("tokens", check_tensor("tokens", tokens, "integral", beside=logits))
    check_shape("tokens", tokens, logits.shape[:-1], "logits without V")
    check_ids("tokens", tokens, logits.shape[-1])
    tempering = Tempering(check_number("temperature", temperature, above=0.0))
    flat = logits.reshape(-1, logits.shape[-1])
    overwrite = overwrite_logits and may_be_overwritten(flat)
    module = loops(engine, logits=flat)
    return TokenLogProb(*_TokenLogProb.apply(flat, tokens, tempering, entropy, overwrite, module))  # type: ignore[no-untyped-call]


class _TokenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        logits: torch.Tensor,
        tokens: torch.Tensor,
        tempering: Tempering,
        entropy: bool,  # noqa: FBT001 -- Function.apply takes no keywords
        overwrite: bool,  # noqa: FBT001
        module: ModuleType | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        kernels = row_kernels(module, tempering, logits.shape[-1], logits.dtype, logits.device)
        every, index = Places.first(len(logits), logits.device), tokens.reshape(-1).to(torch.int64)
        found = kernels.statistics(logits, every, entropy=entropy)
        log_prob = found.log_prob(tempering(logits.gather(-1, index[:, None]))[:, 0])
        ctx.save_for_backward(logits, index, *(field for field in found if field is not None))
        ctx.tempering, ctx.entropy, ctx.overwrite, ctx.module = tempering, entropy, overwrite, module
        # copies, so that changing an output in place changes neither another nor what is saved
        entropies = None if found.entropy is None else found.entropy.reshape(tokens.shape).clone()
        return log_prob.reshape(tokens.shape).clone(), entropies, found.log_normalizer.reshape(tokens.shape).clone()

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        of_log_prob: torch.Tensor,
        of_entropy: torch.Tensor | None,
        of_normalizer: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        """∂log π/∂x = 1[token] − π, ∂log Z/∂x = π, ∂H/∂x = −π (log π + H)."""
        refuse_second_derivative()
        refuse_transformed_cotangents(of_log_prob, of_entropy, of_normalizer)
        logits, index, maximum, log_sum, *rest = ctx.saved_tensors
        statistics = Statistics(maximum, log_sum, rest[0] if ctx.entropy else None, rest[-1])
        of_log_prob, of_normalizer = of_log_prob.reshape(-1), of_normalizer.reshape(-1)
        reached = (of_log_prob != 0.0) | (of_normalizer != 0.0)
        if of_entropy is not None:
            of_entropy = of_entropy.reshape(-1)
            reached = reached | (of_entropy != 0.0)
        rows = Places.where(reached)
        at, of_log_prob, of_normalizer = statistics.at(rows.index), of_log_prob[rows.index], of_normalizer[rows.index]
        pull = Pull(index[rows.index], of_log_prob, of_normalizer - of_log_prob)
        if of_entropy is not None and at.entropy is not None:
            slope = of_entropy[rows.index]
            pull = pull._replace(scale=pull.scale + slope * (at.log_sum - at.entropy), slope=slope)
        gradient = logits.detach() if ctx.overwrite else gradient_like(logits)
        kernels = row_kernels(ctx.module, ctx.tempering, logits.shape[-1], logits.dtype, logits.device)
        kernels.gradients(logits, rows, pull, statistics=at, out=gradient)
        gradient.index_fill_(0, Places.where(~reached).index, 0.0)
        return gradient, None, None, None, None, None
