"""PPO / GRPO ratio clipping, with separate low and high thresholds and optional dual clip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drpo_core.ratio import Tokens
from drpo_core.thresholds import Bounds, bounds, cap, kept, within

if TYPE_CHECKING:
    from drpo_core.types import Array, Bool, Float, Namespace

__all__ = ["ppo_clip_loss", "ppo_clip_weight"]


def ppo_clip_loss(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    eps: float | None = None,
    eps_low: float | None = None,
    eps_high: float | None = None,
    dual_clip: float | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Clipped surrogate: L = max(−A r, −A clip(r, 1 − ε_low, 1 + ε_high)).

    With `dual_clip` = c, additionally L ≤ −A c where A < 0.

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    eps
        ε > 0, dimensionless: the largest abs(r − 1) of a token that still moves away from μ.
    eps_low, eps_high
        Instead of `eps`: ε_high governs A > 0, ε_low governs A < 0.
    dual_clip
        c > 1, the largest ratio with a gradient where A < 0; None for no dual clip.
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
    arXiv:1707.06347 (PPO), eq. 7; arXiv:2402.03300 (GRPO), eq. 3; ε_low ≠ ε_high: arXiv:2503.14476 (DAPO), eq. 10;
    dual clip: arXiv:1912.09729, eq. 5.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import ppo_clip_loss
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> ppo_clip_loss(log_prob, behavior, np.array([1.0, 1.0, -1.0]), eps=0.2).round(6)
    array([-1.2, -1. ,  0.8])
    """
    tokens = Tokens.checked(log_prob, behavior_log_prob, advantages, xp=xp)
    dual_clip = None if dual_clip is None else cap("dual_clip", dual_clip, above=1.0)
    return loss(tokens, bounds("eps", eps, eps_low, eps_high), dual_clip)


def ppo_clip_weight(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    eps: float | None = None,
    eps_low: float | None = None,
    eps_high: float | None = None,
    dual_clip: float | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Gradient weight of the clipped surrogate: 1 inside, 0 where clipping removes the gradient.

    w = 0 where A > 0 and r > 1 + ε_high, where A < 0 and r < 1 − ε_low, and, with `dual_clip` = c, where A < 0 and
    r > c; otherwise w = 1, on the boundary too.

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    eps
        ε > 0, dimensionless: the largest abs(r − 1) of a token that still moves away from μ.
    eps_low, eps_high
        Instead of `eps`: ε_high governs A > 0, ε_low governs A < 0.
    dual_clip
        c > 1, the largest ratio with a gradient where A < 0; None for no dual clip.
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
    arXiv:1707.06347 (PPO), eq. 7; arXiv:2402.03300 (GRPO), eq. 3; ε_low ≠ ε_high: arXiv:2503.14476 (DAPO), eq. 10;
    dual clip: arXiv:1912.09729, eq. 5.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import ppo_clip_weight
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> ppo_clip_weight(log_prob, behavior, np.array([1.0, 1.0, -1.0]), eps=0.2).round(6)
    array([0., 1., 0.])
    """
    tokens = Tokens.checked(log_prob, behavior_log_prob, advantages, xp=xp)
    dual_clip = None if dual_clip is None else cap("dual_clip", dual_clip, above=1.0)
    return weight(tokens, bounds("eps", eps, eps_low, eps_high), dual_clip)


def inside(tokens: Tokens, eps: Bounds) -> Bool[Array, "*tokens"]:
    """−ε_low ≤ r − 1 ≤ ε_high."""
    return within(tokens.ratio_minus_one, eps)


def loss(tokens: Tokens, eps: Bounds, dual_clip: float | None) -> Float[Array, "*tokens"]:
    """−A r where the gradient is kept, else −A times the ratio it is clipped to."""
    bound = tokens.by_advantage(1.0 - eps.low, 1.0 + eps.high)
    clipped = tokens.xp.where(kept(tokens, inside(tokens, eps)), tokens.ratio, bound)
    if dual_clip is not None:
        clipped = tokens.xp.where(_beyond(tokens, dual_clip), dual_clip, clipped)
    return -tokens.advantages * clipped


def weight(tokens: Tokens, eps: Bounds, dual_clip: float | None) -> Float[Array, "*tokens"]:
    """1 where kept, else 0."""
    keep = kept(tokens, inside(tokens, eps))
    if dual_clip is not None:
        keep = keep & ~_beyond(tokens, dual_clip)
    return tokens.indicator(keep)


def _beyond(tokens: Tokens, dual_clip: float) -> Bool[Array, "*tokens"]:
    return (tokens.advantages < 0.0) & (tokens.ratio > dual_clip)
