"""CISPO: the policy gradient with a clipped, detached importance ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.policy_gradient import truncated_weight
from drpo_core.objectives.reinforce import finite_log_prob
from drpo_core.objectives.thresholds import check_order, set_number
from drpo_core.tokens import inverse_ratio

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Float
    from drpo_core.tokens import Tokens

__all__ = ["CISPO"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CISPO:
    """CISPO: L = −sg(clip(r, c_low, c_high)) A log π, w = clip(r, c_low, c_high)/r, where sg is stop-gradient.

    Without c_low the clip is min(r, c_high), w = min(1, c_high/r), and the gradient is that of
    ``PolicyGradient(max_ratio=c_high)``; only the value of the loss differs. With c_low, w > 1 where r < c_low. A token
    with π = 0 has L = 0. The weight, but not the gradient, saturates at c_low e²⁰. There is no trust region.

    Parameters
    ----------
    max_ratio
        c_high > 0, the cap on the importance ratio. Below 1 it also scales on-policy gradients.
    min_ratio
        c_low, in (0, c_high]; None for no lower bound. Above 1 it also scales on-policy gradients.

    Raises
    ------
    TypeError
        If a bound is not a real number.
    ValueError
        If a bound is not finite and positive, or the lower one exceeds the upper one.

    Warnings
    --------
    The Array API has no stop-gradient, so differentiating the loss automatically gives another gradient: take the
    gradient from `drpo_core.token_loss_and_gradient`, or use an adapter.

    References
    ----------
    arXiv:2506.13585 (MiniMax-M1), eq. 4 and 5. The paper drops its lower bound, as TRL does; verl and SkyRL keep both.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import CISPO, token_loss_and_gradient
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> tokens = log_prob, behavior, np.array([1.0, 1.0, -1.0])
    >>> result = token_loss_and_gradient(CISPO(max_ratio=1.5), *tokens)
    >>> result.loss.round(6), result.weight.round(6)
    (array([ 1.039721,  1.609438, -0.601986]), array([0.75, 1.  , 1.  ]))
    >>> token_loss_and_gradient(CISPO(min_ratio=0.8, max_ratio=1.5), *tokens).weight.round(6)
    array([0.75, 1.  , 1.6 ])
    """

    max_ratio: float
    min_ratio: float | None = None

    def __post_init__(self) -> None:
        """Check the bounds and keep them as Python floats."""
        set_number(self, "max_ratio")
        if self.min_ratio is not None:
            set_number(self, "min_ratio")
            check_order("min_ratio", self.min_ratio, "max_ratio", self.max_ratio)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−clip(r, c_low, c_high) A log π."""
        return -self.ratio_weight(tokens) * tokens.advantages * finite_log_prob(tokens)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """min(1, c_high/r), and c_low/r where r < c_low."""
        capped = truncated_weight(tokens, self.max_ratio)
        if self.min_ratio is None:
            return capped
        raised = self.min_ratio * inverse_ratio(tokens.ratio, xp=tokens.xp)
        return tokens.xp.where(tokens.ratio < self.min_ratio, raised, capped)

    def ratio_weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """clip(r, c_low, c_high)."""
        r, xp = tokens.ratio, tokens.xp
        capped = xp.where(r > self.max_ratio, self.max_ratio, r)
        return capped if self.min_ratio is None else xp.where(r < self.min_ratio, self.min_ratio, capped)
