"""PSPO (Probability Smoothing Policy Optimisation): the surrogate of a policy mixed with the behaviour policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.thresholds import set_number

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Float
    from drpo_core.tokens import Tokens

__all__ = ["PSPO"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PSPO:
    """PSPO: L = −A ((1 − α) r + α), the surrogate of the policy (1 − α) π + α μ; w = 1 − α.

    The gradient is that of PG-IS times 1 − α, on-policy too: a smaller step, which an optimiser that normalises its
    gradient, such as Adam, undoes. The ratio of the mixture is at least α, and it moves 1 − α times as far from 1 as r.
    Nothing is clipped, and there is no trust region.

    Parameters
    ----------
    alpha
        α in (0, 1), dimensionless: the share of the behaviour policy. The paper uses 0.1.

    Raises
    ------
    TypeError
        If α is not a real number.
    ValueError
        If α is not between 0 and 1.

    References
    ----------
    arXiv:2509.21282 (Dwyer et al., A Soft Trust-Region via Probability Smoothing for LLM RL).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import token_loss_and_gradient
    >>> from drpo_core.objectives import PSPO
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> result = token_loss_and_gradient(PSPO(alpha=0.1), log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.loss.round(6), result.weight.round(6)
    (array([-1.9 , -1.  ,  0.55]), array([0.9, 0.9, 0.9]))
    """

    alpha: float

    def __post_init__(self) -> None:
        """Check α and keep it as a Python float."""
        set_number(self, "alpha")
        if not self.alpha < 1.0:
            msg = f"alpha: expected a finite number between 0 and 1, got {self.alpha!r}"
            raise ValueError(msg)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−A ((1 − α) r + α)."""
        return -tokens.advantages * ((1.0 - self.alpha) * tokens.ratio + self.alpha)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """1 − α."""
        return (1.0 - self.alpha) * tokens.xp.ones_like(tokens.ratio)
