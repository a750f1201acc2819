"""ASPO (Asymmetric Importance Sampling Policy Optimization): the inverse ratio for positive advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.policy_gradient import truncated_loss, truncated_weight
from drpo_core.objectives.thresholds import Bounds, kept, set_number, set_thresholds, sides, within
from drpo_core.tokens import inverse_ratio

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float
    from drpo_core.tokens import Tokens

__all__ = ["ASPO"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ASPO:
    """ASPO: where A > 0, r w = min(1/r, c) for r ≤ 1 + ε_high, else 0; where A < 0, PPO clipping, w = 1 for r ≥ 1 − ε_low.

    Flipping the ratio of positive advantages pulls hardest on the tokens that have become rare, where r itself would pull
    least. L is the function whose derivative in log π is −A r w: for A > 0, L = A/r, continued below r = 1/c along
    A c (1 − log(c r)), and constant beyond 1 + ε_high; for A < 0, L = −A max(r, 1 − ε_low). With `dual_clip` = c', the
    source's soft dual clip, r w = min(r, c') for A < 0, and L = −A c' (1 + log(r/c')) beyond. 1/r saturates at e²⁰.
    There is no trust region.

    Parameters
    ----------
    eps
        ε > 0, dimensionless: the largest abs(r − 1) of a token that still moves away from μ.
    eps_low, eps_high
        Instead of `eps`: ε_high governs A > 0, ε_low governs A < 0.
    max_ratio
        c > 1, the largest 1/r that a gradient with A > 0 is multiplied with; None for no cap.
    dual_clip
        c' > 1, the largest r that a gradient with A < 0 is multiplied with; None for no cap.

    Raises
    ------
    TypeError
        If the threshold is missing or doubled, or anything is not a real number.
    ValueError
        If a number is not finite and in its range.

    References
    ----------
    arXiv:2510.06062 (Wang et al.). Its released code caps both signs, at c = c' = 3, and keeps the gradient beyond.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import token_loss_and_gradient
    >>> from drpo_core.objectives import ASPO
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.1]), np.log([0.25, 0.4, 0.8])
    >>> result = token_loss_and_gradient(ASPO(eps=0.2, max_ratio=3.0), log_prob, behavior, np.ones(3))
    >>> result.weight.round(6), result.gradient.round(6)
    (array([ 0.,  4., 24.]), array([ 0., -2., -3.]))
    """

    eps: float | None = None
    eps_low: float | None = None
    eps_high: float | None = None
    max_ratio: float | None = None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        set_thresholds(self, "eps")
        for cap in ("max_ratio", "dual_clip"):
            if getattr(self, cap) is not None:
                set_number(self, cap, above=1.0)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """A/r where A ≥ 0, −A r where A < 0, or their continuations beyond the caps; constant where clipped."""
        a, xp, keep = tokens.advantages, tokens.xp, self._keeps(tokens)
        low, high = self._region
        inverse, c = inverse_ratio(tokens), self.max_ratio
        if c is not None:
            beyond = inverse > c
            inverse = xp.where(beyond, c * (1.0 + xp.log(xp.where(beyond, inverse / c, 1.0))), inverse)
        positive = a * xp.where(keep, inverse, 1.0 / (1.0 + high))
        negative = xp.where(keep, truncated_loss(tokens, self.dual_clip), -a * (1.0 - low))
        return xp.where(a < 0.0, negative, positive)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """min(1/r, c)/r where A ≥ 0, else 1, or min(1, c'/r); 0 where clipped."""
        flipped = self._capped(tokens) * inverse_ratio(tokens)
        chosen = tokens.xp.where(tokens.advantages < 0.0, truncated_weight(tokens, self.dual_clip), flipped)
        return tokens.xp.where(self._keeps(tokens), chosen, 0.0)

    def ratio_weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """R w: min(1/r, c) where A ≥ 0, else r, or min(r, c'); 0 where clipped."""
        r, c, where = tokens.ratio, self.dual_clip, tokens.xp.where
        truncated = r if c is None else where(r > c, c, r)
        return where(self._keeps(tokens), where(tokens.advantages < 0.0, truncated, self._capped(tokens)), 0.0)

    @property
    def _region(self) -> Bounds:
        return sides(self.eps, self.eps_low, self.eps_high)

    def _keeps(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        return kept(tokens, within(tokens.ratio_minus_one, self._region))

    def _capped(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """min(1/r, c)."""
        inverse, c = inverse_ratio(tokens), self.max_ratio
        return inverse if c is None else tokens.xp.where(inverse > c, c, inverse)
