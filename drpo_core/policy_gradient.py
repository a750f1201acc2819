"""Unregularised surrogate (PG-IS), optionally with a truncated importance ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drpo_core.ratio import Tokens
from drpo_core.thresholds import cap

if TYPE_CHECKING:
    from drpo_core.types import Array, Bool, Float, Namespace

__all__ = ["policy_gradient_loss", "policy_gradient_weight"]


def policy_gradient_loss(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    max_ratio: float | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Unregularised surrogate: L = −A r, or its truncated form at `max_ratio` = c.

    With a cap c, L = −A r where r ≤ c and L = −A c (1 + log(r/c)) beyond: the function whose derivative in log π is
    −A min(r, c), the gradient of truncated importance sampling. It continues −A r smoothly as c → ∞.

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    max_ratio
        c > 0, the largest importance ratio a gradient is multiplied with; None for no truncation. Below 1 it also scales
        on-policy gradients.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        L per token, of the inputs' shape, to be minimised after a reduction.

    Raises
    ------
    TypeError
        If an array is not real floating-point.
    ValueError
        If the shapes differ.

    References
    ----------
    Off-policy policy gradient with importance sampling; truncation as DPPO's (arXiv:2602.04879).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import policy_gradient_loss
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> policy_gradient_loss(log_prob, behavior, np.array([1.0, 1.0, -1.0]), max_ratio=1.5).round(6)
    array([-1.931523, -1.      ,  0.5     ])
    """
    tokens = Tokens.checked(log_prob, behavior_log_prob, advantages, xp=xp)
    return loss(tokens, None if max_ratio is None else cap("max_ratio", max_ratio))


def policy_gradient_weight(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    max_ratio: float | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Gradient weight of the unregularised surrogate: w = 1, or min(1, c/r) with `max_ratio` = c.

    ∂L/∂log π = −A r w = −A min(r, c).

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    max_ratio
        c > 0, the largest importance ratio a gradient is multiplied with; None for no truncation. Below 1 it also scales
        on-policy gradients.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        w per token, of the inputs' shape, dimensionless.

    Raises
    ------
    TypeError
        If an array is not real floating-point.
    ValueError
        If the shapes differ.

    References
    ----------
    Off-policy policy gradient with importance sampling; truncation as DPPO's (arXiv:2602.04879).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import policy_gradient_weight
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> policy_gradient_weight(log_prob, behavior, np.array([1.0, 1.0, -1.0]), max_ratio=1.5).round(6)
    array([0.75, 1.  , 1.  ])
    """
    tokens = Tokens.checked(log_prob, behavior_log_prob, advantages, xp=xp)
    return weight(tokens, None if max_ratio is None else cap("max_ratio", max_ratio))


def loss(tokens: Tokens, max_ratio: float | None) -> Float[Array, "*tokens"]:
    """−A r, continued along −A c (1 + log(r/c)) beyond r = c."""
    a, r, xp = tokens.advantages, tokens.ratio, tokens.xp
    if max_ratio is None:
        return -a * r
    c = max_ratio
    beyond = r > c
    return xp.where(beyond, -a * c * (1.0 + xp.log(xp.where(beyond, r / c, 1.0))), -a * r)


def weight(tokens: Tokens, max_ratio: float | None) -> Float[Array, "*tokens"]:
    """min(1, c/r), without dividing by zero."""
    r, xp = tokens.ratio, tokens.xp
    if max_ratio is None:
        return xp.ones_like(r)
    return max_ratio / xp.where(r > max_ratio, r, max_ratio)


def inside(tokens: Tokens) -> Bool[Array, "*tokens"]:
    """Every token that is not NaN: there is no trust region."""
    return tokens.log_ratio == tokens.log_ratio
