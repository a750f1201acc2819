"""SPO (Simple Policy Optimization): a smooth penalty on the importance ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.thresholds import Bounds, set_thresholds, sides, within

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float
    from drpo_core.tokens import Tokens

__all__ = ["SPO"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SPO:
    """SPO: L = −A r + abs(A) (r − 1)² / (2ε), w = 1 − sign(A)(r − 1)/ε, the smooth counterpart of ratio clipping.

    The penalty keeps pulling a token back once it is outside abs(r − 1) ≤ ε, where clipping only stops pushing.
    w ≥ 0 exactly where PPO clipping at the same ε keeps the token. The trust region is 1 − ε_low ≤ r ≤ 1 + ε_high.

    Parameters
    ----------
    eps
        ε > 0, dimensionless: the abs(r − 1) at which the gradient vanishes and turns back.
    eps_low, eps_high
        Instead of `eps`: ε_high governs A > 0, ε_low governs A < 0.

    Raises
    ------
    TypeError
        If the threshold is missing or doubled, or not a real number.
    ValueError
        If a number is not finite and positive.

    References
    ----------
    arXiv:2401.16025 (Xie et al., Simple Policy Optimization).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import SPO, token_loss_and_gradient
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> result = token_loss_and_gradient(SPO(eps=0.5), log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.loss.round(6), result.weight.round(6)
    (array([-1.  , -1.  ,  0.75]), array([-1.,  1.,  0.]))
    """

    eps: float | None = None
    eps_low: float | None = None
    eps_high: float | None = None

    def __post_init__(self) -> None:
        """Check the threshold and keep it as a Python float."""
        set_thresholds(self, "eps")

    @property
    def region(self) -> Bounds:
        """(ε_low, ε_high)."""
        return sides(self.eps, self.eps_low, self.eps_high)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """−ε_low ≤ r − 1 ≤ ε_high."""
        return within(tokens.ratio_minus_one, self.region)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−A r + abs(A) (r − 1)² / (2ε)."""
        a, r, excess = tokens.advantages, tokens.ratio, tokens.ratio_minus_one
        half_inverse = tokens.by_advantage(*self.region.each(lambda eps: 0.5 / eps))
        return -a * r + tokens.xp.abs(a) * excess * excess * half_inverse

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """(ε − sign(A)(r − 1)) / ε."""
        eps = tokens.by_advantage(*self.region)
        return (eps - tokens.along_advantage(tokens.ratio_minus_one)) / eps
