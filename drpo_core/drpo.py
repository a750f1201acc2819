"""DRPO (Divergence Regularized Policy Optimization) and its ablation Mask-DRPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drpo_core.ratio import Tokens
from drpo_core.thresholds import Bounds, bounds, warn_if_vacuous, within

if TYPE_CHECKING:
    from drpo_core.types import Array, Bool, Float, Namespace

__all__ = ["drpo_loss", "drpo_weight", "mask_drpo_loss", "mask_drpo_weight"]


def drpo_loss(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    delta: float | None = None,
    delta_low: float | None = None,
    delta_high: float | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """DRPO loss: L = −A r + abs(A) μ (r − 1)² / (2δ) = −A r + abs(A) (r − 1)(π − μ) / (2δ).

    Under μ the penalty's expectation is the advantage-weighted ℓ₂² distance Σ abs(A) (π − μ)² / (2δ).

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    delta
        δ > 0, a difference of probabilities. No default: δ = 0.15 draws a boundary, δ = 12.5 (the DRPO paper's
        setting) only re-weights gently.
    delta_low, delta_high
        Instead of `delta`: δ_high governs A > 0, δ_low governs A < 0.
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

    Warns
    -----
    VacuousTrustRegionWarning
        If δ ≥ 1, which abs(π − μ) never exceeds.

    References
    ----------
    arXiv:2606.09821 (Yao et al., Rethinking the Divergence Regularization in LLM RL).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import drpo_loss
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> drpo_loss(log_prob, behavior, np.array([1.0, 1.0, -1.0]), delta=0.5).round(6)
    array([-1.75, -1.  ,  0.65])
    """
    tokens = Tokens.checked(log_prob, behavior_log_prob, advantages, xp=xp)
    return loss(tokens, _delta("DRPO", delta, delta_low, delta_high))


def drpo_weight(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    delta: float | None = None,
    delta_low: float | None = None,
    delta_high: float | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Gradient weight of DRPO: w = 1 − sign(A) (π − μ)/δ = 1 − sign(A(r − 1)) abs(π − μ)/δ.

    Bounded in [1 − 1/δ, 1 + 1/δ] and continuous in π; w ≥ 0 exactly where DPPO Binary-TV at the same δ keeps the token,
    and beyond that boundary w < 0 points back to μ. Evaluated as (δ − sign(A) d)/δ, whose sign is exact in floating
    point.

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    delta
        δ > 0, a difference of probabilities. No default: δ = 0.15 draws a boundary, δ = 12.5 (the DRPO paper's
        setting) only re-weights gently.
    delta_low, delta_high
        Instead of `delta`: δ_high governs A > 0, δ_low governs A < 0.
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

    Warns
    -----
    VacuousTrustRegionWarning
        If δ ≥ 1, which abs(π − μ) never exceeds.

    References
    ----------
    arXiv:2606.09821 (Yao et al., Rethinking the Divergence Regularization in LLM RL).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import drpo_weight
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> drpo_weight(log_prob, behavior, np.array([1.0, 1.0, -1.0]), delta=0.5).round(6)
    array([0.5, 1. , 0.4])
    """
    tokens = Tokens.checked(log_prob, behavior_log_prob, advantages, xp=xp)
    return weight(tokens, _delta("DRPO", delta, delta_low, delta_high))


def mask_drpo_loss(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    delta: float | None = None,
    delta_low: float | None = None,
    delta_high: float | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Mask-DRPO loss: −A r inside the trust region, DRPO's penalty only for diverging tokens outside it.

    L = −A r + abs(A) μ ((r − 1)² − (δ/μ)²) / (2δ) where sign(A)(π − μ) > δ, else −A r: continuous at the boundary, where
    its derivative jumps.

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    delta
        δ > 0, a difference of probabilities. No default: δ = 0.15 draws a boundary, δ = 12.5 (the DRPO paper's
        setting) only re-weights gently.
    delta_low, delta_high
        Instead of `delta`: δ_high governs A > 0, δ_low governs A < 0.
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

    Warns
    -----
    VacuousTrustRegionWarning
        If δ ≥ 1, which abs(π − μ) never exceeds.

    References
    ----------
    arXiv:2606.09821 (Yao et al., Rethinking the Divergence Regularization in LLM RL).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import mask_drpo_loss
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> mask_drpo_loss(log_prob, behavior, np.array([1.0, 1.0, -1.0]), delta=0.2).round(6)
    array([-1.775   , -1.      ,  0.708333])
    """
    tokens = Tokens.checked(log_prob, behavior_log_prob, advantages, xp=xp)
    return mask_loss(tokens, _delta("Mask-DRPO", delta, delta_low, delta_high))


def mask_drpo_weight(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    delta: float | None = None,
    delta_low: float | None = None,
    delta_high: float | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Gradient weight of Mask-DRPO: 1 inside the trust region, DRPO's weight for diverging tokens outside it.

    w = 1 − sign(A)(π − μ)/δ < 0 where sign(A)(π − μ) > δ, else 1: an ablation that jumps from 1 to 0 at the boundary.

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    delta
        δ > 0, a difference of probabilities. No default: δ = 0.15 draws a boundary, δ = 12.5 (the DRPO paper's
        setting) only re-weights gently.
    delta_low, delta_high
        Instead of `delta`: δ_high governs A > 0, δ_low governs A < 0.
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

    Warns
    -----
    VacuousTrustRegionWarning
        If δ ≥ 1, which abs(π − μ) never exceeds.

    References
    ----------
    arXiv:2606.09821 (Yao et al., Rethinking the Divergence Regularization in LLM RL).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import mask_drpo_weight
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> mask_drpo_weight(log_prob, behavior, np.array([1.0, 1.0, -1.0]), delta=0.2).round(6)
    array([-0.25,  1.  , -0.5 ])
    """
    tokens = Tokens.checked(log_prob, behavior_log_prob, advantages, xp=xp)
    return mask_weight(tokens, _delta("Mask-DRPO", delta, delta_low, delta_high))


def inside(tokens: Tokens, delta: Bounds) -> Bool[Array, "*tokens"]:
    """−δ_low ≤ π − μ ≤ δ_high, the region of DPPO Binary-TV."""
    return within(tokens.shift, delta)


def loss(tokens: Tokens, delta: Bounds) -> Float[Array, "*tokens"]:
    """−A r + |A| (r − 1) d / (2δ); μ (r − 1)² would overflow where (r − 1) d does not."""
    a, r, excess, d = tokens.advantages, tokens.ratio, tokens.ratio_minus_one, tokens.shift
    return -a * r + tokens.xp.abs(a) * excess * d * tokens.by_advantage(*(0.5 / threshold for threshold in delta))


def weight(tokens: Tokens, delta: Bounds) -> Float[Array, "*tokens"]:
    """(δ − sign(A) d) / δ."""
    threshold = tokens.by_advantage(*delta)
    return (threshold - tokens.along_advantage(tokens.shift)) / threshold


def mask_loss(tokens: Tokens, delta: Bounds) -> Float[Array, "*tokens"]:
    """−A r + |A| |r − 1| (d² − δ²) / (2δ |d|) where diverging and outside, else −A r."""
    a, r, xp = tokens.advantages, tokens.ratio, tokens.xp
    threshold = tokens.by_advantage(*delta)
    outside = tokens.along_advantage(tokens.shift) > threshold
    size = xp.where(outside, xp.abs(tokens.shift), threshold)
    # μ (δ/μ)² = |r − 1| δ² / |d|, without dividing by μ
    penalty = xp.abs(a) * xp.abs(tokens.ratio_minus_one) * (size - threshold) * (size + threshold) / (2.0 * threshold * size)
    return -a * r + xp.where(outside, penalty, 0.0)


def mask_weight(tokens: Tokens, delta: Bounds) -> Float[Array, "*tokens"]:
    """DRPO's weight where it is negative, 1 elsewhere; NaN where anything is NaN."""
    w = weight(tokens, delta)
    return tokens.xp.where(w >= 0.0, 1.0, w)


def _delta(objective: str, delta: float | None, low: float | None, high: float | None) -> Bounds:
    region = bounds("delta", delta, low, high)
    warn_if_vacuous(objective, region)
    return region
