"""PPO / GRPO ratio clipping, with separate low and high thresholds and optional dual clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.thresholds import Bounds, kept, set_number, set_thresholds, sides, within

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float
    from drpo_core.tokens import Tokens

__all__ = ["PPOClip", "clip_keeps", "clipped_loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOClip:
    """PPO / GRPO ratio clipping: L = max(−A r, −A clip(r, 1 − ε_low, 1 + ε_high)); w = 0 where clipped, else 1.

    w = 0 where A > 0 and r > 1 + ε_high, where A < 0 and r < 1 − ε_low, and, with `dual_clip` = c, where A < 0 and
    r > c (there L ≤ −A c); otherwise w = 1, on the boundary too. The trust region is 1 − ε_low ≤ r ≤ 1 + ε_high.

    Parameters
    ----------
    eps
        ε > 0, dimensionless: the largest abs(r − 1) of a token that still moves away from μ.
    eps_low, eps_high
        Instead of `eps`: ε_high governs A > 0, ε_low governs A < 0.
    dual_clip
        c > 1, the largest ratio with a gradient where A < 0; None for no dual clip.

    Raises
    ------
    TypeError
        If the threshold is missing or doubled, or anything is not a real number.
    ValueError
        If a number is not finite and in its range.

    References
    ----------
    arXiv:1707.06347 (PPO), eq. 7; arXiv:2402.03300 (GRPO), eq. 3; ε_low ≠ ε_high: arXiv:2503.14476 (DAPO), eq. 10;
    dual clip: arXiv:1912.09729, eq. 5.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PPOClip, token_loss_and_gradient
    >>> clip_higher = PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0)
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> result = token_loss_and_gradient(PPOClip(eps=0.2), log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.loss.round(6), result.weight
    (array([-1.2, -1. ,  0.8]), array([0., 1., 0.]))
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

    @property
    def region(self) -> Bounds:
        """(ε_low, ε_high)."""
        return sides(self.eps, self.eps_low, self.eps_high)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """−ε_low ≤ r − 1 ≤ ε_high."""
        return within(tokens.ratio_minus_one, self.region)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−A r where the gradient is kept, else −A times the ratio it is clipped to."""
        return clipped_loss(tokens, self.region, self.dual_clip)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """1 where kept, else 0."""
        return tokens.indicator(clip_keeps(tokens, self.region, self.dual_clip))


def clipped_loss(tokens: Tokens, region: Bounds, dual_clip: float | None) -> Float[Array, "*tokens"]:
    """−A r where the gradient is kept, else −A times the ratio it is clipped to."""
    low, high = region
    bound = tokens.by_advantage(1.0 - low, 1.0 + high)
    kept_inside = kept(tokens, within(tokens.ratio_minus_one, region))
    clipped = tokens.xp.where(kept_inside, tokens.ratio, bound)
    if dual_clip is not None:
        clipped = tokens.xp.where(_beyond(tokens, dual_clip), dual_clip, clipped)
    return -tokens.advantages * clipped


def clip_keeps(tokens: Tokens, region: Bounds, dual_clip: float | None) -> Bool[Array, "*tokens"]:
    """True unless clipping, or dual clip, drops the token; False where anything is NaN."""
    keep = kept(tokens, within(tokens.ratio_minus_one, region))
    return keep if dual_clip is None else keep & ~_beyond(tokens, dual_clip)


def _beyond(tokens: Tokens, dual_clip: float) -> Bool[Array, "*tokens"]:
    return (tokens.advantages < 0.0) & (tokens.ratio > dual_clip)
