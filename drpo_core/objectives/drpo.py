"""DRPO (Divergence Regularized Policy Optimization) and its ablation Mask-DRPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.thresholds import Bounds, set_thresholds, sides, warn_if_vacuous, within

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float
    from drpo_core.tokens import Tokens

__all__ = ["DRPO", "MaskDRPO"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShiftRegion:
    """A trust region on π − μ, which both objectives have; neither is a kind of the other."""

    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None

    def __post_init__(self) -> None:
        """Check the threshold and keep it as a Python float."""
        set_thresholds(self, "delta")
        warn_if_vacuous(self.region, type(self).__name__)

    @property
    def region(self) -> Bounds:
        """(δ_low, δ_high)."""
        return sides(self.delta, self.delta_low, self.delta_high)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """−δ_low ≤ π − μ ≤ δ_high, the region of DPPO Binary-TV."""
        return within(tokens.shift, self.region)


@dataclass(frozen=True, slots=True, kw_only=True)
class DRPO(_ShiftRegion):
    """DRPO: L = −A r + abs(A) μ (r − 1)² / (2δ), w = 1 − sign(A) (π − μ)/δ = 1 − sign(A(r − 1)) abs(π − μ)/δ.

    The smooth counterpart of DPPO Binary-TV. w is bounded in [1 − 1/δ, 1 + 1/δ] and continuous in π; w ≥ 0 exactly where
    DPPO at the same δ keeps the token, and beyond that boundary w < 0 points back to μ. Under μ the penalty's expectation
    is the advantage-weighted ℓ₂² distance Σ abs(A) (π − μ)² / (2δ). The trust region is −δ_low ≤ π − μ ≤ δ_high.

    Parameters
    ----------
    delta
        δ > 0, a difference of probabilities. No default: δ = 0.15 draws a boundary, δ = 12.5 (the DRPO paper's
        setting) only re-weights gently.
    delta_low, delta_high
        Instead of `delta`: δ_high governs A > 0, δ_low governs A < 0.

    Raises
    ------
    TypeError
        If the threshold is missing or doubled, or not a real number.
    ValueError
        If a number is not finite and positive.

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
    >>> from drpo_core import DRPO, token_loss_and_gradient
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> result = token_loss_and_gradient(DRPO(delta=0.5), log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.loss.round(6), result.weight.round(6)
    (array([-1.75, -1.  ,  0.65]), array([0.5, 1. , 0.4]))
    """

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−A r + abs(A) (r − 1) d / (2δ); μ (r − 1)² would overflow where (r − 1) d does not."""
        a, r, excess, d = tokens.advantages, tokens.ratio, tokens.ratio_minus_one, tokens.shift
        half_inverse = tokens.by_advantage(*self.region.each(lambda delta: 0.5 / delta))
        return -a * r + tokens.xp.abs(a) * excess * d * half_inverse

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """(δ − sign(A) d) / δ, whose sign is exact in floating point."""
        return _smooth_weight(tokens, self.region)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskDRPO(_ShiftRegion):
    """Mask-DRPO: −A r inside the region of DPPO Binary-TV, DRPO's penalty only for diverging tokens outside it.

    Where sign(A)(π − μ) > δ, L = −A r + abs(A) μ ((r − 1)² − (δ/μ)²) / (2δ) and w = 1 − sign(A)(π − μ)/δ < 0; elsewhere
    L = −A r and w = 1. L is continuous at the boundary, where w jumps from 1 to 0: the DRPO paper's ablation.

    Parameters
    ----------
    delta
        δ > 0, a difference of probabilities. No default: see `drpo_core.DRPO`.
    delta_low, delta_high
        Instead of `delta`: δ_high governs A > 0, δ_low governs A < 0.

    Raises
    ------
    TypeError
        If the threshold is missing or doubled, or not a real number.
    ValueError
        If a number is not finite and positive.

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
    >>> from drpo_core import MaskDRPO, token_loss_and_gradient
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> result = token_loss_and_gradient(MaskDRPO(delta=0.2), log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.loss.round(6), result.weight.round(6)
    (array([-1.775   , -1.      ,  0.708333]), array([-0.25,  1.  , -0.5 ]))
    """

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−A r + abs(A) abs(r − 1) (d² − δ²) / (2δ abs(d)) where diverging and outside, else −A r."""
        a, r, xp = tokens.advantages, tokens.ratio, tokens.xp
        delta = tokens.by_advantage(*self.region)
        outside = tokens.along_advantage(tokens.shift) > delta
        size = xp.where(outside, xp.abs(tokens.shift), delta)
        # μ (δ/μ)² = |r − 1| δ² / |d|, without dividing by μ
        penalty = xp.abs(a) * xp.abs(tokens.ratio_minus_one) * (size - delta) * (size + delta) / (2.0 * delta * size)
        return -a * r + xp.where(outside, penalty, 0.0)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """DRPO's weight where it is negative, 1 elsewhere; NaN where anything is NaN."""
        w = _smooth_weight(tokens, self.region)
        return tokens.xp.where(w >= 0.0, 1.0, w)


def _smooth_weight(tokens: Tokens, region: Bounds) -> Float[Array, "*tokens"]:
    delta = tokens.by_advantage(*region)
    return (delta - tokens.along_advantage(tokens.shift)) / delta
