"""UP: the plain policy gradient for positive advantages, clipping for negative ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.ppo import clip_keeps, clipped_loss
from drpo_core.objectives.reinforce import finite_log_prob
from drpo_core.objectives.thresholds import Bounds, set_number
from drpo_core.tokens import inverse_ratio

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Float
    from drpo_core.tokens import Tokens

__all__ = ["UP"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UP:
    """UP: where A > 0, L = −A log π and r w = 1; where A < 0, PPO clipping, L = −A max(r, 1 − ε_low).

    A token with a positive advantage is neither weighed nor clipped by its ratio: w = 1/r, so its pull does not fade as
    its probability falls. For A < 0, w = 0 where r < 1 − ε_low or, with `dual_clip` = c, r > c; else w = 1. Computed as
    min(1/r, e²⁰), w is finite where r underflows; the gradient, −A, needs no ratio. A token with A > 0 and π = 0 has
    L = 0. There is no trust region.

    Parameters
    ----------
    eps_low
        ε_low > 0, dimensionless: the largest 1 − r of a token with A < 0 that still moves away from μ. At 1 or more
        nothing is clipped.
    dual_clip
        c > 1, the largest ratio with a gradient where A < 0; None for no dual clip.

    Raises
    ------
    TypeError
        If a threshold is missing or not a real number.
    ValueError
        If a number is not finite and in its range.

    References
    ----------
    arXiv:2607.06987.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import token_loss_and_gradient
    >>> from drpo_core.objectives import UP
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.4, 0.6])
    >>> result = token_loss_and_gradient(UP(eps_low=0.2), log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.weight.round(6), result.gradient.round(6)
    (array([0.5, 2. , 0. ]), array([-1., -1.,  0.]))
    """

    eps_low: float
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep them as Python floats."""
        set_number(self, "eps_low")
        if self.dual_clip is not None:
            set_number(self, "dual_clip", above=1.0)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−A log π where A ≥ 0, else the value of clipping."""
        a = tokens.advantages
        return tokens.xp.where(a < 0.0, clipped_loss(tokens, self._region, self.dual_clip), -a * finite_log_prob(tokens))

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """1/r where A ≥ 0, else 1 where kept and 0 where clipped."""
        clip = tokens.indicator(clip_keeps(tokens, self._region, self.dual_clip))
        return tokens.xp.where(tokens.advantages < 0.0, clip, inverse_ratio(tokens))

    def ratio_weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """R w: 1 where A ≥ 0, else r where kept and 0 where clipped; NaN where r is."""
        r, xp = tokens.ratio, tokens.xp
        clip = xp.where(clip_keeps(tokens, self._region, self.dual_clip), r, 0.0)
        return xp.where(tokens.advantages < 0.0, clip, xp.where(r == r, xp.ones_like(r), r))

    @property
    def _region(self) -> Bounds:
        """Of A < 0; the other sign is not clipped."""
        return Bounds(self.eps_low, self.eps_low)
