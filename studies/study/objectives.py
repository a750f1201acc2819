"""The penalties that the paper compares with DRPO's, as objectives.

A penalty P(r, μ) on the sampled token gives the weight w = 1 − s(A) P'/δ with P' = ∂P/∂r. With `by_advantage` the loss is
−A r + |A| P/δ and s(A) = sign(A) (docs/derivations/alternatives.md, K1). Without, the loss is −A r + P/δ and s(A) = 1/A (K8).
The gradient is −A r w, so where A = 0 the penalty acts only on advantages that passed through `nonzero`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core import Tokens

Array = Any


def _side(t: Tokens) -> Array:
    one = t.xp.ones_like(t.log_ratio)
    return t.xp.where(t.log_ratio > 0.0, one, t.xp.where(t.log_ratio < 0.0, -one, 0.0 * t.log_ratio))


# name → (P, P') of a token. The expectations of P under μ: ½Σ(π−μ)², ½χ², KL(μ‖π), ≈ KL, KL(μ‖π) and TV
PENALTIES: dict[str, tuple[Callable[[Tokens], Array], Callable[[Tokens], Array]]] = {
    "l2": (lambda t: 0.5 * t.ratio_minus_one * t.shift, lambda t: t.shift),
    "chi2": (lambda t: 0.5 * t.ratio_minus_one * t.ratio_minus_one, lambda t: t.ratio_minus_one),
    "k1": (lambda t: -t.log_ratio, lambda t: -1.0 / t.ratio),
    "k2": (lambda t: 0.5 * t.log_ratio * t.log_ratio, lambda t: t.log_ratio / t.ratio),
    "k3": (lambda t: t.ratio_minus_one - t.log_ratio, lambda t: t.ratio_minus_one / t.ratio),
    "tv": (lambda t: 0.5 * t.xp.abs(t.ratio_minus_one), lambda t: 0.5 * _side(t)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalised:
    """The surrogate with a penalty on the sampled token: L = −A r + s P/δ, w = 1 − sign(A) P'/δ or 1 − P'/(δ A).

    Parameters
    ----------
    penalty
        A name in `PENALTIES`.
    delta
        δ > 0: the smaller, the stronger the penalty.
    by_advantage
        Whether |A| scales the penalty. If not, w is undefined where A = 0 and set to 1 there; pass the advantages
        through `nonzero` to keep the penalty.
    """

    penalty: str
    delta: float
    by_advantage: bool = True

    def __post_init__(self) -> None:
        """Check the hyper-parameters."""
        if self.penalty not in PENALTIES:
            msg = f"penalty: expected one of {', '.join(PENALTIES)}, got {self.penalty!r}"
            raise ValueError(msg)
        if not self.delta > 0.0:
            msg = f"delta: expected a number > 0, got {self.delta!r}"
            raise ValueError(msg)

    def loss(self, tokens: Tokens) -> Array:
        """−A r + |A| P/δ, or −A r + P/δ."""
        value, _ = PENALTIES[self.penalty]
        scale = tokens.xp.abs(tokens.advantages) if self.by_advantage else 1.0
        return -tokens.advantages * tokens.ratio + scale * value(tokens) / self.delta

    def weight(self, tokens: Tokens) -> Array:
        """1 − sign(A) P'/δ, or 1 − P'/(δ A)."""
        xp, a = tokens.xp, tokens.advantages
        _, margin = PENALTIES[self.penalty]
        if self.by_advantage:
            return 1.0 - tokens.along_advantage(margin(tokens)) / self.delta
        none = a == 0.0
        return 1.0 - xp.where(none, 0.0, margin(tokens) / (self.delta * xp.where(none, 1.0, a)))

    def inside(self, tokens: Tokens) -> Array:
        """Where the weight is not negative whatever the sign of A: |P'| ≤ δ, or ≤ δ |A|."""
        _, margin = PENALTIES[self.penalty]
        bound = self.delta if self.by_advantage else self.delta * tokens.xp.abs(tokens.advantages)
        return tokens.xp.abs(margin(tokens)) <= bound


SMALL = 1e-6
"""An advantage so small that its surrogate does not matter."""


def nonzero(objective: object, advantages: Array) -> Array:
    """The advantages, with `SMALL` in place of 0 if the objective's penalty is to act there."""
    if isinstance(objective, Penalised) and not objective.by_advantage:
        return advantages + SMALL * (advantages == 0.0)
    return advantages
