"""DPPO (Divergence Proximal Policy Optimization): a mask on the divergence between π and μ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drpo_core import divergence as divergences
from drpo_core import policy_gradient
from drpo_core.ratio import Tokens
from drpo_core.thresholds import Bounds, bounds, cap, kept, warn_if_vacuous, within

if TYPE_CHECKING:
    from drpo_core.types import Array, Bool, Float, Namespace

__all__ = ["dppo_loss", "dppo_weight"]

BINARY_TV, BINARY_KL, PER_TOKEN = "binary_tv", "binary_kl", "per_token"


def dppo_loss(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    delta: float | None = None,
    delta_low: float | None = None,
    delta_high: float | None = None,
    divergence: str | Float[Array, "*tokens"] = BINARY_TV,
    max_ratio: float | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """DPPO loss: L = −A r M, where M drops diverging tokens whose divergence exceeds δ.

    M = 0 where A (r − 1) > 0 and D > δ, else 1, on the boundary too. M is not differentiated. With `max_ratio` = c a
    kept token has the truncated surrogate of `drpo_core.policy_gradient_loss`.

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    delta
        δ > 0, in the divergence's unit: a difference of probabilities for Binary TV, nats for KL. No default.
    delta_low, delta_high
        Instead of `delta`: δ_high governs A > 0, δ_low governs A < 0.
    divergence
        ``"binary_tv"`` for D = abs(π − μ), ``"binary_kl"`` for the Bernoulli KL(μ‖π) in nats, or an array of any
        per-token divergence (such as `drpo_core.top_k_tv`), of the tokens' shape.
    max_ratio
        c > 0, the largest importance ratio a gradient is multiplied with; None for no truncation.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        L per token, of the inputs' shape, to be minimised after a reduction.

    Raises
    ------
    TypeError
        If an array is not real floating-point, or the threshold is missing, doubled or not a number.
    ValueError
        If the shapes differ, the threshold is not finite and positive, or the divergence's name is unknown.

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
    >>> from drpo_core import dppo_loss
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> dppo_loss(log_prob, behavior, np.array([1.0, 1.0, -1.0]), delta_low=0.4, delta_high=0.2).round(6)
    array([ 0. , -1. ,  0.5])
    """
    kind, measured = (divergence, None) if isinstance(divergence, str) else (PER_TOKEN, divergence)
    tokens = Tokens.checked(log_prob, behavior_log_prob, advantages, divergence=measured, xp=xp)
    return loss(tokens, *check(delta, delta_low, delta_high, kind, max_ratio))


def dppo_weight(
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    delta: float | None = None,
    delta_low: float | None = None,
    delta_high: float | None = None,
    divergence: str | Float[Array, "*tokens"] = BINARY_TV,
    max_ratio: float | None = None,
    xp: Namespace | None = None,
) -> Float[Array, "*tokens"]:
    """Gradient weight of DPPO: w = M, or M min(1, c/r) with `max_ratio` = c.

    M = 0 where A (r − 1) > 0 and D > δ, else 1, on the boundary too. A NaN drops its token.

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        Only `log_prob` is meant to be differentiated.
    delta
        δ > 0, in the divergence's unit: a difference of probabilities for Binary TV, nats for KL. No default.
    delta_low, delta_high
        Instead of `delta`: δ_high governs A > 0, δ_low governs A < 0.
    divergence
        ``"binary_tv"`` for D = abs(π − μ), ``"binary_kl"`` for the Bernoulli KL(μ‖π) in nats, or an array of any
        per-token divergence (such as `drpo_core.top_k_tv`), of the tokens' shape.
    max_ratio
        c > 0, the largest importance ratio a gradient is multiplied with; None for no truncation.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    array
        w per token, of the inputs' shape, dimensionless.

    Raises
    ------
    TypeError
        If an array is not real floating-point, or the threshold is missing, doubled or not a number.
    ValueError
        If the shapes differ, the threshold is not finite and positive, or the divergence's name is unknown.

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
    >>> from drpo_core import dppo_weight
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> dppo_weight(log_prob, behavior, np.array([1.0, 1.0, -1.0]), delta_low=0.4, delta_high=0.2)
    array([0., 1., 1.])
    """
    kind, measured = (divergence, None) if isinstance(divergence, str) else (PER_TOKEN, divergence)
    tokens = Tokens.checked(log_prob, behavior_log_prob, advantages, divergence=measured, xp=xp)
    return weight(tokens, *check(delta, delta_low, delta_high, kind, max_ratio))


def inside(tokens: Tokens, delta: Bounds, divergence: str) -> Bool[Array, "*tokens"]:
    """D ≤ δ_high where r ≥ 1, D ≤ δ_low where r < 1."""
    if divergence == BINARY_TV:
        return within(tokens.shift, delta)
    if divergence == BINARY_KL:
        measured = divergences.binary_kl_of(tokens)
    elif tokens.divergence is None:
        msg = "divergence: expected an array, because this DPPO objective has divergence='per_token', got None"
        raise TypeError(msg)
    else:
        measured = tokens.divergence
    return (measured <= delta.high) & (tokens.log_ratio >= 0.0) | (measured <= delta.low) & (tokens.log_ratio < 0.0)


def loss(tokens: Tokens, delta: Bounds, divergence: str, max_ratio: float | None) -> Float[Array, "*tokens"]:
    """The surrogate where kept, else 0."""
    keep = kept(tokens, inside(tokens, delta, divergence))
    return tokens.xp.where(keep, policy_gradient.loss(tokens, max_ratio), 0.0)


def weight(tokens: Tokens, delta: Bounds, divergence: str, max_ratio: float | None) -> Float[Array, "*tokens"]:
    """The surrogate's weight where kept, else 0."""
    keep = kept(tokens, inside(tokens, delta, divergence))
    return tokens.xp.where(keep, policy_gradient.weight(tokens, max_ratio), 0.0)


def check(
    delta: float | None,
    low: float | None,
    high: float | None,
    divergence: str,
    max_ratio: float | None,
    *,
    stacklevel: int = 4,
) -> tuple[Bounds, str, float | None]:
    """The checked hyper-parameters, in the order `loss` and `weight` take them."""
    region = bounds("delta", delta, low, high)
    if divergence not in (BINARY_TV, BINARY_KL, PER_TOKEN):
        msg = f"divergence: expected 'binary_tv', 'binary_kl' or per-token divergences, got {divergence!r}"
        raise ValueError(msg)
    if divergence == BINARY_TV:
        warn_if_vacuous("DPPO", region, stacklevel=stacklevel)
    return region, divergence, None if max_ratio is None else cap("max_ratio", max_ratio)
