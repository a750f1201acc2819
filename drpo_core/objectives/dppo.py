"""DPPO (Divergence Proximal Policy Optimization): a mask on the divergence between π and μ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_core.divergence import binary_kl_of
from drpo_core.objectives.policy_gradient import truncated_loss, truncated_weight
from drpo_core.objectives.thresholds import Bounds, kept, set_number, set_thresholds, sides, warn_if_vacuous, within

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Bool, Float
    from drpo_core.tokens import Tokens

__all__ = ["DPPO"]

DIVERGENCES = ("binary_tv", "binary_kl", "per_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class DPPO:
    """DPPO: L = −A r M, w = M, where the mask M drops diverging tokens whose divergence D exceeds δ.

    M = 0 where A (r − 1) > 0 and D > δ, else 1, on the boundary too; a NaN drops its token. M is not differentiated.
    With `max_ratio` = c a kept token has the truncated surrogate of `drpo_core.PolicyGradient`, w = M min(1, c/r).
    The trust region is D ≤ δ_high where r ≥ 1 and D ≤ δ_low where r < 1.

    Parameters
    ----------
    delta
        δ > 0, in the divergence's unit: a difference of probabilities for Binary TV, nats for KL. No default.
    delta_low, delta_high
        Instead of `delta`: δ_high governs A > 0, δ_low governs A < 0.
    divergence
        ``"binary_tv"`` for D = abs(π − μ), ``"binary_kl"`` for the Bernoulli KL(μ‖π) in nats, or ``"per_token"`` for
        a divergence that the caller measures (such as `drpo_core.top_k_tv`) and passes as ``divergence=`` with the
        tokens.
    max_ratio
        c > 0, the largest importance ratio a gradient is multiplied with; None for no truncation.

    Raises
    ------
    TypeError
        If the threshold is missing or doubled, or anything is not a real number.
    ValueError
        If a number is not finite and positive, or the divergence is not one of the three.

    Warns
    -----
    VacuousTrustRegionWarning
        If δ ≥ 1 with Binary TV, which never exceeds 1.

    References
    ----------
    arXiv:2602.04879 (Qi et al., Rethinking the Trust Region in LLM RL).

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import DPPO, token_loss_and_gradient
    >>> binary_tv, binary_kl = DPPO(delta_low=0.4, delta_high=0.2), DPPO(delta=0.05, divergence="binary_kl")
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> result = token_loss_and_gradient(binary_tv, log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.loss.round(6), result.weight
    (array([ 0. , -1. ,  0.5]), array([0., 1., 1.]))
    """

    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None
    divergence: str = "binary_tv"
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        """Check the hyper-parameters and keep the numbers as Python floats."""
        set_thresholds(self, "delta")
        given: object = self.divergence
        if not isinstance(given, str) or given not in DIVERGENCES:
            got = repr(given) if isinstance(given, str) else type(given).__name__
            msg = f"divergence: expected 'binary_tv', 'binary_kl' or 'per_token', got {got}"
            raise ValueError(msg)
        if self.max_ratio is not None:
            set_number(self, "max_ratio")
        if self.divergence == "binary_tv":
            warn_if_vacuous(self.region, "DPPO")

    @property
    def region(self) -> Bounds:
        """(δ_low, δ_high)."""
        return sides(self.delta, self.delta_low, self.delta_high)

    def inside(self, tokens: Tokens) -> Bool[Array, "*tokens"]:
        """D ≤ δ_high where r ≥ 1, D ≤ δ_low where r < 1."""
        if self.divergence == "binary_tv":
            return within(tokens.shift, self.region)
        measured = binary_kl_of(tokens) if self.divergence == "binary_kl" else tokens.divergence
        if measured is None:
            msg = "divergence: expected an array, because this DPPO objective has divergence='per_token', got None"
            raise TypeError(msg)
        low, high = self.region
        return (measured <= high) & (tokens.log_ratio >= 0.0) | (measured <= low) & (tokens.log_ratio < 0.0)

    def loss(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """The surrogate where kept, else 0."""
        return tokens.xp.where(kept(tokens, self.inside(tokens)), truncated_loss(tokens, self.max_ratio), 0.0)

    def weight(self, tokens: Tokens) -> Float[Array, "*tokens"]:
        """The surrogate's weight where kept, else 0."""
        return tokens.xp.where(kept(tokens, self.inside(tokens)), truncated_weight(tokens, self.max_ratio), 0.0)
