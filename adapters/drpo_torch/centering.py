"""The score-centring term of any objective, whose backward pass gives its coefficients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drpo_core.centering import outcome_terms
from drpo_torch._checks import check_tensors
from drpo_torch.autograd import with_gradient
from drpo_torch.engines._namespace import namespace

if TYPE_CHECKING:
    from drpo_core import Objective

__all__ = ["score_centering"]


def score_centering(
    objective: Objective,
    *,
    log_prob: torch.Tensor,
    behavior_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    tail: bool = True,
    mask: torch.Tensor | None = None,
    proximal_log_prob: torch.Tensor | None = None,
    divergence: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score-centring term Σ_v C_v log π_v per token, C_v = −μ_v g_v, with the derivative C_v in each log π_v.

    Added to `drpo_torch.token_loss`, it makes the expected gradient at a constant advantage 0. Only `log_prob` receives a
    gradient, in its own dtype; the other tensors are constants. The value has no meaning of its own. Works in eager mode,
    under `torch.compile` and `torch.func` (`grad`, `vmap`).

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode` that looks at one token at a time.
    log_prob, behavior_log_prob
        log π and log μ of K distinct outcomes of each token, nats, ≤ 0; (…, K). −inf is a probability of 0.
    advantages
        A of the sampled tokens, (…).
    tail
        True if the K outcomes are part of the vocabulary, False if they are all that can be sampled.
    mask
        Boolean, (…), True at tokens that count; the others may hold anything and have term and gradient 0.
    proximal_log_prob
        log π_old of the K outcomes, (…, K), where the mode needs it.
    divergence
        Per-token divergence, (…), for ``DPPO(divergence="per_token")``.

    Returns
    -------
    torch.Tensor
        The term per token, (…), float32 at least.

    Raises
    ------
    TypeError
        If an argument is not a tensor or a dtype is wrong.
    ValueError
        If shapes disagree, K is 0, or the mode has a part that looks at other tokens.
    RuntimeError
        On a second derivative or forward-mode differentiation, which are not implemented.

    See Also
    --------
    drpo_core.centering.score_centering : the formula, the tail and their source.

    Examples
    --------
    >>> import torch
    >>> from drpo_core import DRPO
    >>> from drpo_torch import score_centering
    >>> log_prob = torch.tensor([0.5, 0.3, 0.2]).log().requires_grad_()
    >>> behavior = torch.tensor([0.2, 0.3, 0.5]).log()
    >>> term = score_centering(
    ...     DRPO(delta=0.5), log_prob=log_prob, behavior_log_prob=behavior, advantages=torch.tensor(1.0), tail=False
    ... )
    >>> term.backward()
    >>> log_prob.grad
    tensor([0.2000, 0.3000, 0.3200])
    """
    tensors = {"log_prob": log_prob, "behavior_log_prob": behavior_log_prob, "advantages": advantages}
    options: dict[str, Any] = {"mask": mask, "proximal_log_prob": proximal_log_prob, "divergence": divergence}
    check_tensors(**tensors, **options)
    # outside the autograd.Function, as in `token_loss`
    with torch.no_grad():
        values, gradient = outcome_terms(objective, **tensors, **options, tail=tail, xp=namespace())
    return with_gradient(log_prob, values, gradient).sum(-1)
