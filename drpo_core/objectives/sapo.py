"""SAPO (Soft Adaptive Policy Optimization): a sigmoid of the importance ratio in the place of a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.objectives.thresholds import set_number

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Float
    from drpo_core.tokens import Tokens

__all__ = ["SAPO"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SAPO:
    """SAPO: L = −A (4/τ) σ(τ(r − 1)), w = 4σ(1 − σ) = sech²(τ(r − 1)/2), where σ is the logistic function.

    w is 1 at r = 1 and falls to either side, for converging tokens as for diverging ones: 0 < w ≤ 1, and r w → 0 as
    r → ∞. L is a function whose derivative in log π is −A r w; on-policy its value is −2A/τ. There is no trust region.

    Parameters
    ----------
    tau_positive, tau_negative
        τ > 0 of tokens with A ≥ 0 and with A < 0, in units of 1/(r − 1): w = 0.42 at abs(r − 1) = 2/τ. No default: the
        paper and verl have τ = 1 and 1.05.

    Raises
    ------
    TypeError
        If a τ is missing or not a real number.
    ValueError
        If a τ is not finite and positive.

    References
    ----------
    arXiv:2511.20347 (Gao et al., Soft Adaptive Policy Optimization); verl's `sapo`.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import token_loss_and_gradient
    >>> from drpo_core.objectives import SAPO
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> sapo = SAPO(tau_positive=1.0, tau_negative=1.05)
    >>> result = token_loss_and_gradient(sapo, log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.loss.round(6), result.weight.round(6)
    (array([-2.924234, -2.      ,  1.415938]), array([0.786448, 1.      , 0.93414 ]))
    """

    tau_positive: float
    tau_negative: float

    def __post_init__(self) -> None:
        """Check both τ and keep them as Python floats."""
        set_number(self, "tau_positive")
        set_number(self, "tau_negative")

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−A (4/τ) σ(x) with x = τ(r − 1)."""
        x, decay = self._decay(tokens)
        sigma = tokens.xp.where(x < 0.0, decay, 1.0) / (1.0 + decay)
        return -tokens.advantages * sigma * tokens.by_advantage(4.0 / self.tau_negative, 4.0 / self.tau_positive)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """4 σ(x) σ(−x) = 4 e^−abs(x) / (1 + e^−abs(x))²."""
        _, decay = self._decay(tokens)
        return 4.0 * decay / ((1.0 + decay) * (1.0 + decay))

    def _decay(self, tokens: Tokens) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
        """X = τ(r − 1) and e^−abs(x), which can't overflow."""
        x = tokens.by_advantage(self.tau_negative, self.tau_positive) * tokens.ratio_minus_one
        # not xp.abs, whose derivative at r = 1 is 0
        return x, tokens.xp.exp(tokens.xp.where(x < 0.0, x, -x))
