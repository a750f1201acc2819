"""CISPO: the policy gradient with a clipped, detached importance ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.policy_gradient import score, truncated_weight
from drpo_core.objectives.thresholds import set_number

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Float
    from drpo_core.tokens import Tokens

__all__ = ["CISPO"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CISPO:
    """CISPO: L = −sg(min(r, c)) A log π, w = min(1, c/r), where sg is stop-gradient.

    Its gradient is that of ``PolicyGradient(max_ratio=c)``; only the value of the loss differs. A token with π = 0 has
    L = 0. There is no trust region.

    Parameters
    ----------
    max_ratio
        c > 0, the cap on the importance ratio. Below 1 it also scales on-policy gradients.

    Raises
    ------
    TypeError
        If the cap is not a real number.
    ValueError
        If the cap is not finite and positive.

    Warnings
    --------
    The Array API has no stop-gradient, so differentiating the loss automatically gives another gradient: take the
    gradient from `drpo_core.token_loss_and_gradient`, or use an adapter.

    References
    ----------
    arXiv:2506.13585 (MiniMax-M1), eq. 4 and 5, without its lower bound.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import CISPO, token_loss_and_gradient
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> result = token_loss_and_gradient(CISPO(max_ratio=1.5), log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.loss.round(6), result.weight.round(6)
    (array([ 1.039721,  1.609438, -0.601986]), array([0.75, 1.  , 1.  ]))
    """

    max_ratio: float

    def __post_init__(self) -> None:
        """Check the cap and keep it as a Python float."""
        set_number(self, "max_ratio")

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−min(r, c) A log π."""
        c, r = self.max_ratio, tokens.ratio
        return -tokens.xp.where(r > c, c, r) * tokens.advantages * score(tokens)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """min(1, c/r)."""
        return truncated_weight(tokens, self.max_ratio)
