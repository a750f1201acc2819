"""REINFORCE: the policy gradient without the importance ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.tokens import inverse_ratio

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Float
    from drpo_core.tokens import Tokens

__all__ = ["Reinforce", "finite_log_prob"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reinforce:
    """REINFORCE: L = −A log π, w = 1/r, so r w = 1 and the gradient is −A whatever the ratio.

    μ enters neither loss nor gradient: what it sampled is treated as if π had. L is a function whose derivative in log π
    is the gradient. A token with π = 0 has L = 0 and the gradient −A. The weight, but not the gradient, saturates at e²⁰.
    There is no trust region.

    References
    ----------
    Williams, Simple statistical gradient-following algorithms for connectionist reinforcement learning (1992), eq. 4; as
    GPG arXiv:2504.02546, verl's `gpg`.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import token_loss_and_gradient
    >>> from drpo_core.objectives import Reinforce
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> result = token_loss_and_gradient(Reinforce(), log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.loss.round(6), result.gradient, result.weight.round(6)
    (array([ 0.693147,  1.609438, -1.203973]), array([-1., -1.,  1.]), array([0.5, 1. , 2. ]))
    """

    counts_ratio = False

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−A log π; NaN where anything is."""
        return -tokens.advantages * self.ratio_weight(tokens) * finite_log_prob(tokens)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """1/r, at most e²⁰."""
        return inverse_ratio(tokens.ratio, xp=tokens.xp)

    def ratio_weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """1; NaN where the ratio is."""
        r, xp = tokens.ratio, tokens.xp
        return xp.where(r == r, xp.ones_like(r), r)


def finite_log_prob(tokens: Tokens) -> Float[Array, "*tokens"]:
    """Log π; 0 where π = 0, because 0·(−inf) is a NaN."""
    return tokens.xp.where(tokens.log_prob == -tokens.xp.inf, 0.0, tokens.log_prob)
