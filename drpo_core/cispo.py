"""CISPO: the policy gradient with a clipped, detached importance ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drpo_core import policy_gradient
from drpo_core.ratio import Tokens
from drpo_core.thresholds import cap

if TYPE_CHECKING:
    from drpo_core.types import Array, Float, Namespace

__all__ = ["cispo_loss", "cispo_weight"]


def cispo_loss(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    max_ratio: float,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """CISPO loss: L = −sg(min(r, c)) A log π, where sg is stop-gradient.

    The Array API has no stop-gradient, so differentiating this value automatically gives another gradient:
    use the weight, `drpo_core.token_loss_and_gradient` or an adapter. A token with π = 0 has L = 0.

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    max_ratio
        c > 0, the cap on the importance ratio. Below 1 it also scales on-policy gradients.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        L per token, of the inputs' shape, to be minimised after a reduction.

    Raises
    ------
    TypeError
        If an array is not real floating-point, or the threshold is missing, doubled or not a number.
    ValueError
        If the shapes differ, or the threshold is not finite and positive.

    References
    ----------
    arXiv:2506.13585 (MiniMax-M1), eq. 4 and 5, without its lower bound.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import cispo_loss
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> cispo_loss(log_prob, behavior, np.array([1.0, 1.0, -1.0]), max_ratio=1.5).round(6)
    array([ 1.039721,  1.609438, -0.601986])
    """
    return loss(Tokens.checked(log_prob, behavior_log_prob, advantages, xp=xp), cap("max_ratio", max_ratio))


def cispo_weight(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    max_ratio: float,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Gradient weight of CISPO: w = min(1, c/r), so that ∂L/∂log π = −A min(r, c).

    No token is dropped; the cap bounds the variance, not the move.

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    max_ratio
        c > 0, the cap on the importance ratio. Below 1 it also scales on-policy gradients.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        w per token, of the inputs' shape, dimensionless.

    Raises
    ------
    TypeError
        If an array is not real floating-point, or the threshold is missing, doubled or not a number.
    ValueError
        If the shapes differ, or the threshold is not finite and positive.

    References
    ----------
    arXiv:2506.13585 (MiniMax-M1), eq. 4 and 5, without its lower bound.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import cispo_weight
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> cispo_weight(log_prob, behavior, np.array([1.0, 1.0, -1.0]), max_ratio=1.5).round(6)
    array([0.75, 1.  , 1.  ])
    """
    return weight(Tokens.checked(log_prob, behavior_log_prob, advantages, xp=xp), cap("max_ratio", max_ratio))


def loss(tokens: Tokens, max_ratio: float) -> Float[Array, "*tokens"]:
    """−min(r, c) A log π."""
    r, log_prob, xp = tokens.ratio, tokens.log_prob, tokens.xp
    # where π = 0 the limit of r log π is 0, but 0·(−inf) is a NaN
    score = xp.where(log_prob == -xp.inf, 0.0, log_prob)
    return -xp.where(r > max_ratio, max_ratio, r) * tokens.advantages * score


def weight(tokens: Tokens, max_ratio: float) -> Float[Array, "*tokens"]:
    """min(1, c/r), that of the truncated surrogate: only the value differs from it."""
    return policy_gradient.weight(tokens, max_ratio)
