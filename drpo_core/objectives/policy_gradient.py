"""Unregularised surrogate (PG-IS), optionally with a truncated importance ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.thresholds import set_number

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Float
    from drpo_core.tokens import Tokens

__all__ = ["PolicyGradient", "truncated_loss", "truncated_weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """Unregularised surrogate (PG-IS): L = −A r, w = 1; or truncated at `max_ratio` = c, w = min(1, c/r).

    With a cap c, L = −A r where r ≤ c and L = −A c (1 + log(r/c)) beyond: the function whose derivative in log π is
    −A min(r, c), the gradient of truncated importance sampling. It continues −A r smoothly as c → ∞.
    There is no trust region.

    Parameters
    ----------
    max_ratio
        c > 0, the largest importance ratio a gradient is multiplied with; None for no truncation. Below 1 it also
        scales on-policy gradients.

    Raises
    ------
    TypeError
        If the cap is not a real number.
    ValueError
        If the cap is not finite and positive.

    References
    ----------
    Off-policy policy gradient with importance sampling; truncation as DPPO's (arXiv:2602.04879).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PolicyGradient, token_loss_and_gradient
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> result = token_loss_and_gradient(PolicyGradient(max_ratio=1.5), log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.loss.round(6), result.weight.round(6)
    (array([-1.931523, -1.      ,  0.5     ]), array([0.75, 1.  , 1.  ]))
    """

    max_ratio: float | None = None

    def __post_init__(self) -> None:
        """Check the cap and keep it as a Python float."""
        if self.max_ratio is not None:
            set_number(self, "max_ratio")

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−A r, or its truncated form."""
        return truncated_loss(tokens, self.max_ratio)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """1, or min(1, c/r)."""
        return truncated_weight(tokens, self.max_ratio)


def truncated_loss(tokens: Tokens, c: float | None) -> Float[Array, "*tokens"]:
    """−A r, continued along −A c (1 + log(r/c)) beyond r = c."""
    a, r, xp = tokens.advantages, tokens.ratio, tokens.xp
    if c is None:
        return -a * r
    beyond = r > c
    return xp.where(beyond, -a * c * (1.0 + xp.log(xp.where(beyond, r / c, 1.0))), -a * r)


def truncated_weight(tokens: Tokens, c: float | None) -> Float[Array, "*tokens"]:
    """min(1, c/r), without dividing by zero."""
    r, xp = tokens.ratio, tokens.xp
    if c is None:
        return xp.ones_like(r)
    # selected, because torch divides a number by way of a reciprocal, and c/c would not be 1
    beyond = r > c
    return xp.where(beyond, c / xp.where(beyond, r, c), 1.0)
