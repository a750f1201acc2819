"""SPO (Simple Policy Optimization): a quadratic penalty on the importance ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drpo_core.ratio import Tokens
from drpo_core.thresholds import Bounds, bounds

if TYPE_CHECKING:
    from drpo_core.types import Array, Float, Namespace

__all__ = ["spo_loss", "spo_weight"]


def spo_loss(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    eps: float | None = None,
    eps_low: float | None = None,
    eps_high: float | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """SPO loss: L = −A r + abs(A) (r − 1)² / (2ε).

    The penalty keeps pulling a token back once it is outside abs(r − 1) ≤ ε, where clipping only stops pushing.

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    eps
        ε > 0, dimensionless: the abs(r − 1) at which the gradient vanishes and turns back.
    eps_low, eps_high
        Instead of `eps`: ε_high governs A > 0, ε_low governs A < 0.
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
    arXiv:2401.16025 (Xie et al., Simple Policy Optimization).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import spo_loss
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> spo_loss(log_prob, behavior, np.array([1.0, 1.0, -1.0]), eps=0.5).round(6)
    array([-1.  , -1.  ,  0.75])
    """
    return loss(Tokens.checked(log_prob, behavior_log_prob, advantages, xp=xp), bounds("eps", eps, eps_low, eps_high))


def spo_weight(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    eps: float | None = None,
    eps_low: float | None = None,
    eps_high: float | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Gradient weight of SPO: w = 1 − sign(A) (r − 1)/ε.

    w ≥ 0 exactly where PPO's clip at the same ε keeps the token. Evaluated as (ε − sign(A)(r − 1))/ε, whose sign is
    exact in floating point.

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    eps
        ε > 0, dimensionless: the abs(r − 1) at which the gradient vanishes and turns back.
    eps_low, eps_high
        Instead of `eps`: ε_high governs A > 0, ε_low governs A < 0.
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
    arXiv:2401.16025 (Xie et al., Simple Policy Optimization).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import spo_weight
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> spo_weight(log_prob, behavior, np.array([1.0, 1.0, -1.0]), eps=0.5).round(6)
    array([-1.,  1.,  0.])
    """
    return weight(Tokens.checked(log_prob, behavior_log_prob, advantages, xp=xp), bounds("eps", eps, eps_low, eps_high))


def loss(tokens: Tokens, eps: Bounds) -> Float[Array, "*tokens"]:
    """−A r + |A| (r − 1)² / (2ε)."""
    a, r, excess = tokens.advantages, tokens.ratio, tokens.ratio_minus_one
    return -a * r + tokens.xp.abs(a) * excess * excess * tokens.by_advantage(*(0.5 / threshold for threshold in eps))


def weight(tokens: Tokens, eps: Bounds) -> Float[Array, "*tokens"]:
    """(ε − sign(A)(r − 1)) / ε."""
    e = tokens.by_advantage(*eps)
    return (e - tokens.along_advantage(tokens.ratio_minus_one)) / e
