"""GPPO (Gradient-Preserving Clipping Policy Optimization): clipped tokens keep the gradient of their bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.ppo import clipped_loss
from drpo_core.objectives.thresholds import Bounds, set_number, set_thresholds, sides
from drpo_core.tokens import inverse_ratio

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float
    from drpo_core.tokens import Tokens

__all__ = ["GPPO"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPPO:
    """GPPO: L = max(−A r, −A clip(r, 1 − ε_low, 1 + ε_high)), with the gradient of −A b r/sg(r) where clipped to b.

    So r w = 1 + ε_high where A > 0 and r > 1 + ε_high, r w = 1 − ε_low where A < 0 and r < 1 − ε_low, and w = 1
    elsewhere: a token that clipping would drop pulls as hard as it does at the bound. w is continuous in r, is below 1
    beyond the upper bound and above 1 below the lower one. With `dual_clip` = c, w = 0 where A < 0 and r > c (there
    L ≤ −A c). There is no trust region.

    Parameters
    ----------
    eps
        ε > 0, dimensionless: the abs(r − 1) beyond which a diverging token's gradient no longer follows r.
    eps_low, eps_high
        Instead of `eps`: ε_high governs A > 0, ε_low governs A < 0. With ε_low ≥ 1 no token is clipped from below.
    dual_clip
        c > 1, the largest ratio with a gradient where A < 0; None for no dual clip.

    Raises
    ------
    TypeError
        If the threshold is missing or doubled, or anything is not a real number.
    ValueError
        If a number is not finite and in its range.

    Warnings
    --------
    The value is that of clipping, a constant where the gradient is not 0. The Array API has no stop-gradient, so take
    the gradient from `drpo_core.token_loss_and_gradient`, or use an adapter.

    References
    ----------
    arXiv:2508.07629 (Su et al., Klear-Reasoner); dual clip, as its released code has it: arXiv:1912.09729, eq. 5.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import token_loss_and_gradient
    >>> from drpo_core.objectives import GPPO
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> result = token_loss_and_gradient(GPPO(eps=0.2), log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.loss.round(6), result.weight.round(6), result.gradient.round(6)
    (array([-1.2, -1. ,  0.8]), array([0.6, 1. , 1.6]), array([-1.2, -1. ,  0.8]))
    """

    eps: float | None = None
    eps_low: float | None = None
    eps_high: float | None = None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        set_thresholds(self, "eps")
        if self.dual_clip is not None:
            set_number(self, "dual_clip", above=1.0)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """The value of clipping."""
        return clipped_loss(tokens, self._region, self.dual_clip)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """b/r where the ratio is clipped to b, else 1; 0 beyond a dual clip."""
        return self._select(tokens, inverse_ratio(tokens), tokens.xp.ones_like(tokens.ratio))

    def ratio_weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """R w: b where the ratio is clipped to b, else r; 0 beyond a dual clip."""
        return self._select(tokens, 1.0, tokens.ratio)

    @property
    def _region(self) -> Bounds:
        return sides(self.eps, self.eps_low, self.eps_high)

    def _select(self, tokens: Tokens, clipped: Array | float, unclipped: Array) -> Float[Array, "*tokens"]:
        """`clipped` times the bound beyond it, else `unclipped`; NaN where that is."""
        a, excess, where = tokens.advantages, tokens.ratio_minus_one, tokens.xp.where
        low, high = self._region
        above: Bool[Array, "*tokens"] = (a > 0.0) & (excess > high)
        below: Bool[Array, "*tokens"] = (a < 0.0) & (excess < -low)
        selected = where(above, (1.0 + high) * clipped, where(below, (1.0 - low) * clipped, unclipped))
        if self.dual_clip is None:
            return selected
        return where((a < 0.0) & (tokens.ratio > self.dual_clip), 0.0, selected)
