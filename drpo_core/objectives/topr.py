"""TOPR (Tapered Off-Policy REINFORCE): no ratio where A > 0, a truncated one where A < 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.policy_gradient import truncated_loss, truncated_weight
from drpo_core.objectives.reinforce import finite_log_prob
from drpo_core.tokens import inverse_ratio

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Float
    from drpo_core.tokens import Tokens

__all__ = ["TOPR"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TOPR:
    """TOPR: r w = 1 where A > 0, as REINFORCE; r w = min(1, r) where A < 0, the surrogate truncated at r = 1.

    L = −A log π where A > 0; where A < 0, L = −A r up to r = 1 and −A (1 + log r) beyond. Both are functions whose
    derivative in log π is −A r w; the two are not of one scale. A rare token with A > 0 is pulled up as hard as any
    other, one with A < 0 is let go. A token with π = 0 has L = 0. The weight, but not the gradient, saturates at e²⁰.
    There is no trust region.

    References
    ----------
    arXiv:2503.14286 (Le Roux et al., Tapered Off-Policy REINFORCE), where r is the ratio of the whole sequence and A its
    reward.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import token_loss_and_gradient
    >>> from drpo_core.objectives import TOPR
    >>> log_prob, behavior = np.log([0.2, 0.2, 0.8]), np.log([0.4, 0.4, 0.4])
    >>> result = token_loss_and_gradient(TOPR(), log_prob, behavior, np.array([1.0, -1.0, -1.0]))
    >>> result.loss.round(6), result.gradient.round(6), result.weight.round(6)
    (array([1.609438, 0.5     , 1.693147]), array([-1. ,  0.5,  1. ]), array([2. , 1. , 0.5]))
    """

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−A log π where A > 0, else the surrogate truncated at 1; NaN where anything is."""
        score = -tokens.advantages * self.ratio_weight(tokens) * finite_log_prob(tokens)
        return tokens.xp.where(tokens.advantages > 0.0, score, truncated_loss(tokens, 1.0))

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """1/r, at most e²⁰, where A > 0, else min(1, 1/r)."""
        inverse = inverse_ratio(tokens.ratio, xp=tokens.xp)
        return tokens.xp.where(tokens.advantages > 0.0, inverse, truncated_weight(tokens, 1.0))

    def ratio_weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """1 where A > 0, else min(1, r); NaN where the ratio is."""
        r, xp = tokens.ratio, tokens.xp
        one = (r > 1.0) | (tokens.advantages > 0.0) & (r == r)
        return xp.where(one, xp.ones_like(r), r)
