"""Ratio clipping with bounds of each token's own: functions of the probability μ that it was sampled with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from drpo_core.objectives.thresholds import check_order, kept, set_number

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float
    from drpo_core.tokens import Tokens

__all__ = ["ChiSquareBounds", "DCPOBounds", "KLBounds", "RIPOBounds", "TVBounds", "TokenBounds", "TokenwiseClip"]

NEWTON_STEPS = 6
"""After them the root is exact to rounding in float64, from a start that is at most twice too large."""


class TokenBounds(Protocol):
    """Bounds 1 − a(μ) ≤ r ≤ 1 + b(μ): a small frozen value, hashable, because an objective must be."""

    def largest(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """b(μ) where r ≥ 1, a(μ) where r < 1: the largest abs(r − 1) on the token's own side."""
        ...

    def __hash__(self) -> int:
        """Of its numbers."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenwiseClip:
    """Token-wise clipping: L = max(−A r, −A clip(r, 1 − a(μ), 1 + b(μ))); w = 0 where clipped, else 1.

    w = 0 where A > 0 and r > 1 + b(μ), and where A < 0 and r < 1 − a(μ); otherwise w = 1, on the boundary too. The trust
    region is 1 − a(μ) ≤ r ≤ 1 + b(μ). A NaN drops its token. μ is the probability that the ratio is taken against.

    Parameters
    ----------
    bounds
        a and b, one of `RIPOBounds`, `DCPOBounds`, `ChiSquareBounds`, `KLBounds` and `TVBounds`, or an object of yours
        with the method ``largest(tokens)``, which returns b(μ) where r ≥ 1 and a(μ) where r < 1.

    Raises
    ------
    TypeError
        If the bounds have no method `largest`.

    References
    ----------
    arXiv:1707.06347 (PPO), eq. 7, with the bounds of RIPO, DCPO (arXiv:2509.02333) or BandPO (arXiv:2603.04918).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import token_loss_and_gradient
    >>> from drpo_core.objectives import DCPOBounds, TokenwiseClip
    >>> dcpo = TokenwiseClip(bounds=DCPOBounds(eps_low=0.16, eps_high=0.2))
    >>> rare_and_common = np.log([0.03, 0.9]), np.log([0.01, 0.7])
    >>> token_loss_and_gradient(dcpo, *rare_and_common, np.ones(2)).weight
    array([1., 0.])
    """

    bounds: TokenBounds

    def __post_init__(self) -> None:
        """Check that the bounds are some."""
        if isinstance(self.bounds, type) or not callable(getattr(self.bounds, "largest", None)):
            got = self.bounds.__name__ if isinstance(self.bounds, type) else type(self.bounds).__name__
            msg = f"bounds: expected an instance such as KLBounds(delta=0.05), got {got}"
            raise TypeError(msg)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """−a(μ) ≤ r − 1 ≤ b(μ)."""
        return tokens.xp.abs(tokens.ratio_minus_one) <= self.bounds.largest(tokens)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """−A r where the gradient is kept, else −A times the ratio it is clipped to."""
        largest, excess, where = self.bounds.largest(tokens), tokens.ratio_minus_one, tokens.xp.where
        keep = kept(tokens, tokens.xp.abs(excess) <= largest)
        return -tokens.advantages * where(keep, tokens.ratio, 1.0 + where(excess < 0.0, -largest, largest))

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """1 where kept, else 0."""
        return tokens.indicator(kept(tokens, self.inside(tokens)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RIPOBounds:
    """a(μ) = b(μ) = √(δ/μ), no less than `min_eps` and no more than `max_eps`.

    Parameters
    ----------
    delta
        δ > 0, the largest μ (r − 1)².
    min_eps, max_eps
        The least and the most that abs(r − 1) may be; dimensionless, > 0.

    Raises
    ------
    TypeError
        If anything is not a real number.
    ValueError
        If a number is not finite and positive, or the least is more than the most.
    """

    delta: float
    min_eps: float = 0.5
    max_eps: float = 10.0

    def __post_init__(self) -> None:
        """Check the numbers and keep them as Python floats."""
        for name in ("delta", "min_eps", "max_eps"):
            set_number(self, name)
        check_order("min_eps", self.min_eps, "max_eps", self.max_eps)

    def largest(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """√(δ/μ) within its limits."""
        where = tokens.xp.where
        eps = tokens.xp.sqrt(self.delta * _inverse_probability(tokens))
        return where(eps < self.min_eps, self.min_eps, where(eps > self.max_eps, self.max_eps, eps))


@dataclass(frozen=True, slots=True, kw_only=True)
class DCPOBounds:
    """1 − a = ½ + ½ √max(1 − 4 ε_low/μ, 0) and 1 + b = ½ + ½ √(1 + 4 ε_high/μ), no more than `max_ratio`.

    They are where abs(r − 1) r μ, the change of the probability times the ratio, reaches ε. Below μ = 4 ε_low it does
    not, and the lower bound is ½.

    Parameters
    ----------
    eps_low, eps_high
        ε > 0, differences of probabilities: ε_low bounds r from below, ε_high from above.
    max_ratio
        The most that the upper bound may be, > 1.

    Raises
    ------
    TypeError
        If anything is not a real number.
    ValueError
        If a number is not finite and in its range.
    """

    eps_low: float
    eps_high: float
    max_ratio: float = 10.0

    def __post_init__(self) -> None:
        """Check the numbers and keep them as Python floats."""
        set_number(self, "eps_low")
        set_number(self, "eps_high")
        set_number(self, "max_ratio", above=1.0)

    def largest(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """s/(2 (1 + √(1 ± s))) of s = 4 ε/μ, which is ½ abs(1 − √(1 ± s)) without cancellation."""
        xp, up = tokens.xp, _is_up(tokens)
        inverse = 4.0 * _inverse_probability(tokens)
        high, low = self.eps_high * inverse, self.eps_low * inverse
        low = xp.where(low > 1.0, 1.0, low)
        distance = xp.where(up, high, low) / (2.0 * (1.0 + xp.sqrt(xp.where(up, 1.0 + high, 1.0 - low))))
        most = self.max_ratio - 1.0
        return xp.where(up & (distance > most), most, distance)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChiSquareBounds:
    """a(μ) = b(μ) = √(δ (1 − μ)/μ): where the χ² divergence of the two Bernoulli distributions reaches δ.

    Parameters
    ----------
    delta
        δ > 0, the largest μ (r − 1)² / (1 − μ); dimensionless.

    Raises
    ------
    TypeError
        If δ is not a real number.
    ValueError
        If δ is not finite and positive.
    """

    delta: float

    def __post_init__(self) -> None:
        """Check δ and keep it as a Python float."""
        set_number(self, "delta")

    def largest(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """√(δ (1 − μ)/μ)."""
        rest = -tokens.xp.expm1(tokens.behavior_log_prob)
        return tokens.xp.sqrt(self.delta * rest * _inverse_probability(tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class TVBounds:
    """a(μ) = b(μ) = δ/μ: where abs(π − μ) reaches δ, as in `drpo_core.DPPO` with its Binary TV.

    Parameters
    ----------
    delta
        δ > 0, a difference of probabilities.

    Raises
    ------
    TypeError
        If δ is not a real number.
    ValueError
        If δ is not finite and positive.
    """

    delta: float

    def __post_init__(self) -> None:
        """Check δ and keep it as a Python float."""
        set_number(self, "delta")

    def largest(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """δ/μ."""
        return self.delta * _inverse_probability(tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class KLBounds:
    """Where the Bernoulli KL(μ‖π) reaches δ: the two roots r of μ f(r) + (1 − μ) f((1 − μ r)/(1 − μ)) = δ.

    f(u) = u − 1 − log u. Both roots exist for every 0 < μ < 1 and δ > 0. They are found by six Newton steps, without a
    branch, to rounding.

    Parameters
    ----------
    delta
        δ > 0, nats.

    Raises
    ------
    TypeError
        If δ is not a real number.
    ValueError
        If δ is not finite and positive.
    """

    delta: float

    def __post_init__(self) -> None:
        """Check δ and keep it as a Python float."""
        set_number(self, "delta")

    def largest(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """The outcome that loses probability shrinks by e^−v, where v − q log(1 + (e^v − 1)/q) = δ; q of the other's is μ.

        Upwards that is the rest, and q = μ; downwards the token itself, and q = 1 − μ. The left side is convex and
        increasing in v, so Newton's steps from above the root descend to it.
        """
        xp, up, delta = tokens.xp, _is_up(tokens), self.delta
        mu, rest = xp.exp(tokens.behavior_log_prob), -xp.expm1(tokens.behavior_log_prob)
        q, p = _at_least_tiny(xp.where(up, mu, rest), tokens), _at_least_tiny(xp.where(up, rest, mu), tokens)
        v = _at_most_40(delta / p * (1.0 + xp.sqrt(1.0 + 2.0 * q * p / delta)), tokens)
        for _ in range(NEWTON_STEPS):
            x = xp.expm1(v)
            v = _at_most_40(v - (v - q * xp.log1p(x / q) - delta) * (x + q) / (p * x), tokens)
        shrunk = -xp.expm1(-v)
        return xp.where(up, rest * _inverse_probability(tokens), 1.0) * shrunk


def _is_up(tokens: Tokens) -> Bool[Array, "*tokens"]:
    """Whether r ≥ 1."""
    return tokens.ratio_minus_one >= 0.0


def _inverse_probability(tokens: Tokens) -> Float[Array, "*tokens"]:
    """1/μ, saturated at e⁶⁰: a bound that large is beyond every ratio, which saturates at e²⁰."""
    exponent = -tokens.behavior_log_prob
    return tokens.xp.exp(tokens.xp.where(exponent > 60.0, 60.0, exponent))


def _at_least_tiny(probability: Array, tokens: Tokens) -> Array:
    """max(p, e⁻⁴⁰), so that nothing is divided by 0."""
    return tokens.xp.where(probability < 4.248354255291589e-18, 4.248354255291589e-18, probability)


def _at_most_40(v: Array, tokens: Tokens) -> Array:
    """min(v, 40): beyond it 1 − e^−v is 1, in float64 too."""
    return tokens.xp.where(v > 40.0, 40.0, v)
