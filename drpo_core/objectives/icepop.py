"""IcePop: a mask that keeps the importance ratio between two bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.thresholds import check_order, set_number

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float
    from drpo_core.tokens import Tokens

__all__ = ["IcePop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IcePop:
    """IcePop: L = −A r M, w = M, where the mask M drops every token whose ratio is outside c_low ≤ r ≤ c_high.

    Unlike a clip it drops converging tokens too, whatever the sign of A. The boundary is kept; a NaN drops its token. M
    is not differentiated. The trust region is c_low ≤ r ≤ c_high. Also known as masked importance sampling (MIS) and,
    in either direction, as DIS.

    Parameters
    ----------
    min_ratio
        c_low > 0, the smallest ratio that is kept. Above 1 it drops on-policy tokens. No default: prime-rl had 0.5, 0.2.
    max_ratio
        c_high ≥ c_low, the largest ratio that is kept. Below 1 it drops on-policy tokens. No default: IcePop has 5.

    Raises
    ------
    TypeError
        If a bound is missing or not a real number.
    ValueError
        If a bound is not finite and positive, or the lower one exceeds the upper one.

    References
    ----------
    arXiv:2510.18855 (Ring-1T) and Zhao et al., Small leak can sink a great ship: boost RL training on MoE with IcePop
    (2025), on π_old/μ; prime-rl on π/μ.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import token_loss_and_gradient
    >>> from drpo_core.objectives import IcePop
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.1]), np.log([0.25, 0.2, 0.4])
    >>> result = token_loss_and_gradient(IcePop(min_ratio=0.5, max_ratio=5.0), log_prob, behavior, np.ones(3))
    >>> result.loss.round(6), result.weight
    (array([-2., -1.,  0.]), array([1., 1., 0.]))
    """

    min_ratio: float
    max_ratio: float

    def __post_init__(self) -> None:
        """Check the bounds and keep them as Python floats."""
        set_number(self, "min_ratio")
        set_number(self, "max_ratio")
        check_order("min_ratio", self.min_ratio, "max_ratio", self.max_ratio)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """c_low ≤ r ≤ c_high; False where r is NaN."""
        return (tokens.ratio >= self.min_ratio) & (tokens.ratio <= self.max_ratio)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−A r inside, else 0."""
        return tokens.xp.where(self._kept(tokens), -tokens.advantages * tokens.ratio, 0.0)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """1 inside, else 0."""
        return tokens.indicator(self._kept(tokens))

    def _kept(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        return self.inside(tokens) & (tokens.advantages == tokens.advantages)
