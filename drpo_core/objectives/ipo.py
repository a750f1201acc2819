"""IPO: a mask on the probability shift in either direction, with a truncated importance ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.policy_gradient import truncated_loss, truncated_weight
from drpo_core.objectives.thresholds import Bounds, set_number, set_thresholds, sides, warn_if_vacuous, within

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float
    from drpo_core.tokens import Tokens

__all__ = ["IPO"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IPO:
    """IPO: L = −A r M, w = M, where the mask M drops every token with abs(π − μ) > δ, converging ones too.

    It is DPPO Binary-TV without regard to the sign of A. The boundary is kept; a NaN drops its token. M is not
    differentiated. With `max_ratio` = c a kept token has the truncated surrogate of `drpo_core.PolicyGradient`,
    w = M min(1, c/r). The trust region is −δ_low ≤ π − μ ≤ δ_high.

    Parameters
    ----------
    delta
        δ > 0, a difference of probabilities. No default: prime-rl has 0.3, and had 0.1.
    delta_low, delta_high
        Instead of `delta`: δ_high governs π > μ, δ_low governs π < μ, whatever the sign of A.
    max_ratio
        c > 0, the largest importance ratio a gradient is multiplied with; None for no truncation. prime-rl has 10⁴.

    Raises
    ------
    TypeError
        If the threshold is missing or doubled, or anything is not a real number.
    ValueError
        If a number is not finite and positive.

    Warns
    -----
    VacuousTrustRegionWarning
        If δ ≥ 1, which abs(π − μ) never exceeds.

    References
    ----------
    prime-rl, its default loss. Not the preference loss of the same name.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import token_loss_and_gradient
    >>> from drpo_core.objectives import IPO
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.9]), np.log([0.25, 0.2, 0.5])
    >>> result = token_loss_and_gradient(IPO(delta=0.3), log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.loss.round(6), result.weight
    (array([-2., -1.,  0.]), array([1., 1., 0.]))
    """

    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        set_thresholds(self, "delta")
        if self.max_ratio is not None:
            set_number(self, "max_ratio")
        warn_if_vacuous(self.region, "IPO")

    @property
    def region(self) -> Bounds:
        """(δ_low, δ_high)."""
        return sides(self.delta, self.delta_low, self.delta_high)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """−δ_low ≤ π − μ ≤ δ_high, the region of DPPO Binary-TV."""
        return within(tokens.shift, self.region)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """The surrogate inside, else 0."""
        return tokens.xp.where(self._kept(tokens), truncated_loss(tokens, self.max_ratio), 0.0)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """The surrogate's weight inside, else 0."""
        return tokens.xp.where(self._kept(tokens), truncated_weight(tokens, self.max_ratio), 0.0)

    def _kept(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        return self.inside(tokens) & (tokens.advantages == tokens.advantages)
