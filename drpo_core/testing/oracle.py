"""Scalar reference of every objective in 50-digit arithmetic, written from the papers; it shares no code with the core.

A float64, float32 or bfloat16 input is an exact number here, so a difference from the reference is the implementation's
own rounding. Besides the values the reference states, for each, the magnitude that its rounding errors scale with
(the sum of its terms' magnitudes times their condition numbers), and how far the token is from the nearest jump.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import mpmath
import numpy as np

from drpo_core.objectives import (
    CISPO,
    DPPO,
    DRPO,
    IPO,
    SAPO,
    SPO,
    TOPR,
    IcePop,
    MaskDRPO,
    PolicyGradient,
    PPOClip,
    Reinforce,
    family_of,
)

if TYPE_CHECKING:
    from drpo_core.testing.batch import BoolArray, FloatArray

__all__ = [
    "Reference",
    "References",
    "binary_kl",
    "binary_tv",
    "expected_gradient",
    "full_kl",
    "full_tv",
    "knows",
    "piece",
    "reference",
    "references",
    "shift",
    "threshold_name",
    "thresholds",
]

_MP = mpmath.mp.clone()
_MP.dps = 50

# not the table, which may have an objective that has no case below
_KNOWN = (PolicyGradient, PPOClip, CISPO, SPO, DRPO, MaskDRPO, Reinforce, SAPO, IcePop, IPO, TOPR)

SATURATION = 20  # nats: the ratio is e^min(ℓ, 20)


class Reference(NamedTuple):
    """One token, correctly rounded to float64 from 50 digits.

    `loss`, `weight` and `gradient` are L, w and ∂L/∂log π = −A r w; `*_scale` the magnitude their rounding errors scale
    with. `kept` says whether the token's gradient may move π away from μ (w ≥ 0). `jump` is the distance to the nearest
    discontinuity of L or w, relative to the magnitude of what is compared there (so in units of u it counts roundings).
    """

    loss: float
    weight: float
    gradient: float
    loss_scale: float
    weight_scale: float
    gradient_scale: float
    kept: bool
    jump: float


@dataclass(frozen=True)
class References:
    """References of a batch, as arrays of its shape; masked tokens have zeros and are kept."""

    loss: FloatArray
    weight: FloatArray
    gradient: FloatArray
    loss_scale: FloatArray
    weight_scale: FloatArray
    gradient_scale: FloatArray
    kept: BoolArray
    jump: FloatArray


def knows(objective: object) -> bool:
    """Whether the oracle has a formula for an objective; not for a subclass, which may have another."""
    if type(objective) is DPPO:
        return objective.divergence in ("binary_tv", "binary_kl")
    return type(objective) in _KNOWN


def threshold_name(objective: object) -> str | None:
    """The parameter that bounds an objective's trust region: the table's, or ``delta`` or ``eps`` of another objective."""
    family = family_of(objective)
    if family.measure is not None:
        return family.threshold
    return next((name for name in ("delta", "eps") if hasattr(objective, name)), None)


def thresholds(objective: Any) -> tuple[float, float] | None:
    """(low, high) of an objective with a trust region; None if it has none."""
    name = threshold_name(objective)
    if name is None:
        return None
    value = getattr(objective, name)
    return (getattr(objective, f"{name}_low"), getattr(objective, f"{name}_high")) if value is None else (value, value)


def references(
    objective: object, log_prob: FloatArray, behavior_log_prob: FloatArray, advantages: FloatArray, mask: BoolArray
) -> References:
    """`reference` of every token that the mask selects."""
    tokens = np.broadcast_arrays(log_prob, behavior_log_prob, advantages, mask)
    inert = Reference(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, kept=True, jump=np.inf)
    rows = [
        reference(objective, float(x), float(b), float(a)) if counts else inert
        for x, b, a, counts in zip(*(t.ravel() for t in tokens), strict=True)
    ]
    columns = np.array(rows, dtype=np.float64).reshape(-1, len(Reference._fields)).T
    shaped: dict[str, Any] = dict(zip(Reference._fields, (c.reshape(tokens[0].shape) for c in columns), strict=True))
    return References(**shaped | {"kept": shaped["kept"] > 0.0})


@lru_cache(maxsize=1 << 18)
def reference(  # noqa: C901, PLR0912, PLR0915 -- one case an objective reads like the table of the papers
    objective: object, log_prob: float, behavior_log_prob: float, advantage: float
) -> Reference:
    """One token under one objective.

    Parameters
    ----------
    objective
        An objective of `drpo_core`; only its hyper-parameters are read.
    log_prob, behavior_log_prob, advantage
        log π, log μ (nats) and A, finite.

    Returns
    -------
    Reference
        Loss, weight and gradient, what their errors scale with, and the distance to the nearest jump.

    Raises
    ------
    TypeError
        If the oracle has no formula for the objective.

    Examples
    --------
    >>> import math
    >>> from drpo_core import DRPO
    >>> from drpo_core.testing.oracle import reference
    >>> reference(DRPO(delta=0.5), math.log(0.5), math.log(0.25), 1.0).weight
    0.5
    """
    x, b, a = _MP.mpf(log_prob), _MP.mpf(behavior_log_prob), _MP.mpf(advantage)
    ell = x - b
    r = _MP.exp(min(ell, SATURATION))
    pi, mu = _MP.exp(x), _MP.exp(b)
    d, sign, size = pi - mu, _MP.sign(a), abs(a)
    excess = r - 1
    regions = thresholds(objective)
    bound: Any = None if regions is None else _MP.mpf(regions[0] if a < 0 else regions[1])
    jump: Any = _MP.inf
    kept: Any = True
    # r w and the magnitude of its terms, where the product with the saturated weight is another number
    factor: Any = None
    factor_scale: Any = None
    weight_slope: Any = None

    match objective:
        case PolicyGradient(max_ratio=c):
            loss, weight = _truncated(a, r, c)
            terms = abs(loss)
        case CISPO(max_ratio=c, min_ratio=low):
            factor = min(r, c) if low is None else max(min(r, c), low)
            loss, weight = -factor * a * _finite(x), factor * _inverse(r) if r < (low or 0) else min(1, c / r)
            terms = abs(loss)
            factor_scale = factor
        case PPOClip(dual_clip=c):
            kept = sign * excess <= bound
            clipped = r if kept else 1 + sign * bound
            jump = abs(sign * excess - bound) / (1 + bound)
            if c is not None and a < 0:
                jump = min(jump, abs(r - c) / c)
                if r > c:
                    kept, clipped = False, _MP.mpf(c)
            loss, weight = -a * clipped, _MP.mpf(int(kept))
            terms = abs(loss)
        case SPO():
            penalty = size * excess**2 / (2 * bound)
            loss, weight = -a * r + penalty, 1 - sign * excess / bound
            terms = size * r + penalty
            kept = weight >= 0
        case DPPO(divergence=kind, max_ratio=c):
            measured = abs(d) if kind == "binary_tv" else binary_kl(x, b)
            rounding = max(pi, mu, bound) if kind == "binary_tv" else 1 + bound + mu * (abs(x) + abs(b))
            if sign * ell > 0:
                kept = measured <= bound
                # log π = 0 is a rounded number, whose KL is a matter of convention
                jump = 0 if kind == "binary_kl" and x >= 0 else abs(measured - bound) / rounding
            surrogate, truncated = _truncated(a, r, c)
            loss, weight = (surrogate, truncated) if kept else (_MP.mpf(0), _MP.mpf(0))
            terms = abs(loss)
        case DRPO():
            penalty = size * excess * d / (2 * bound)
            loss, weight = -a * r + penalty, 1 - sign * d / bound
            terms = size * r + penalty
            kept = weight >= 0
        case MaskDRPO():
            kept = sign * d <= bound
            jump = abs(sign * d - bound) / max(pi, mu, bound)
            # μ (δ/μ)² with the saturated ratio: μ = d/(r − 1)
            outside = 0 if kept else size * abs(excess) * (d * d - bound * bound) / (2 * bound * abs(d))
            loss, weight = -a * r + outside, _MP.mpf(1) if kept else 1 - sign * d / bound
            terms = size * r + (0 if kept else size * abs(excess) * (d * d + bound * bound) / (2 * bound * abs(d)))
        case Reinforce():
            loss, weight = -a * _finite(x), _inverse(r)
            terms, factor, factor_scale = abs(loss), _MP.mpf(1), _MP.mpf(1)
        case SAPO(tau_positive=positive, tau_negative=negative):
            tau = _MP.mpf(negative if a < 0 else positive)
            sigma = 1 / (1 + _MP.exp(-tau * excess))
            loss, weight = -a * 4 / tau * sigma, 4 * sigma * _MP.exp(-tau * excess) * sigma
            terms = abs(loss) + size * weight * (r + abs(excess))
            # ∂w/∂ℓ is not of the size of w − 1
            weight_slope = weight * (1 + tau * (r + abs(excess)))
        case IcePop(min_ratio=low, max_ratio=high):
            kept = low <= r <= high
            jump = min(abs(r - low) / low, abs(r - high) / high)
            loss, weight = (-a * r, _MP.mpf(1)) if kept else (_MP.mpf(0), _MP.mpf(0))
            terms = abs(loss)
        case IPO(max_ratio=c):
            # the bound on the side of the shift, not of the advantage
            own = _MP.mpf(regions[1] if d > 0 else regions[0])  # type: ignore[index]
            kept = abs(d) <= own
            jump = abs(abs(d) - own) / max(pi, mu, own)
            loss, weight = _truncated(a, r, c) if kept else (_MP.mpf(0), _MP.mpf(0))
            terms = abs(loss)
        case TOPR():
            if a > 0:
                loss, weight, factor = -a * _finite(x), _inverse(r), _MP.mpf(1)
            else:
                loss, weight = _truncated(a, r, 1.0)
                factor = min(r, 1)
            terms, factor_scale = abs(loss), factor
        case _:
            msg = f"the oracle has no formula for {objective!r}"
            raise TypeError(msg)

    # ℓ is rounded once, which moves e^ℓ by a relative u|ℓ|
    condition = 1 + abs(ell)
    weight_scale = 1 + (abs(weight - 1) if weight_slope is None else weight_slope) * condition
    factor = r * weight if factor is None else factor
    factor_scale = r * weight_scale if factor_scale is None else factor_scale
    gradient = -a * factor
    return Reference(
        loss=float(loss),
        weight=float(weight),
        gradient=float(gradient),
        loss_scale=float(terms * condition),
        weight_scale=float(weight_scale),
        gradient_scale=float(size * condition * factor_scale) if weight != 0 else 0.0,
        kept=bool(kept),
        jump=float(jump),
    )


def shift(log_prob: float, behavior_log_prob: float) -> float:
    """Probability shift d = π − μ."""
    return float(_MP.exp(_MP.mpf(log_prob)) - _MP.exp(_MP.mpf(behavior_log_prob)))


def binary_tv(log_prob: float, behavior_log_prob: float) -> Any:
    """Binary TV = abs(π − μ)."""
    return abs(_MP.exp(_MP.mpf(log_prob)) - _MP.exp(_MP.mpf(behavior_log_prob)))


def binary_kl(log_prob: Any, behavior_log_prob: Any) -> Any:
    """Binary KL(μ‖π) = μ log(μ/π) + (1 − μ) log((1 − μ)/(1 − π)), in nats."""
    x, b = _MP.mpf(log_prob), _MP.mpf(behavior_log_prob)
    pi, mu = _MP.exp(x), _MP.exp(b)
    if mu == 1:
        return mu * (b - x)
    if pi == 1:
        return _MP.inf
    return mu * (b - x) + (1 - mu) * (_MP.log1p(-mu) - _MP.log1p(-pi))


def full_tv(log_prob: FloatArray, behavior_log_prob: FloatArray) -> float:
    """TV = ½ Σ abs(π − μ) of one state, over its whole vocabulary."""
    return float(sum(binary_tv(x, b) for x, b in zip(log_prob.tolist(), behavior_log_prob.tolist(), strict=True)) / 2)


def full_kl(log_prob: FloatArray, behavior_log_prob: FloatArray) -> float:
    """KL(μ‖π) of one state, over its whole vocabulary, corrected for what the rounded probabilities lack to 1."""
    total = _MP.mpf(0)
    for x, b in zip(log_prob.tolist(), behavior_log_prob.tolist(), strict=True):
        p, q = _MP.exp(_MP.mpf(x)), _MP.exp(_MP.mpf(b))
        total += q * (_MP.mpf(b) - _MP.mpf(x)) + p - q
    return float(total)


def expected_gradient(  # noqa: C901, PLR0912 -- as above
    objective: object, log_prob: FloatArray, behavior_log_prob: FloatArray, advantages: FloatArray
) -> FloatArray:
    """Gradient of the expected objective in the logits of π, for one state, in its population form.

    Stated in π and μ, without ratios: PG-IS −Σ A π; DRPO −Σ A π + Σ abs(A)(π − μ)²/(2δ), an advantage-weighted ℓ₂²; SPO
    with (π − μ)²/(2εμ), an advantage-weighted χ²; the masked surrogates −Σ A π M with M a constant; the score forms
    −Σ μ sg(min(r, c)) A log π.
    """
    slopes = []
    for x, b, a in zip(log_prob.tolist(), behavior_log_prob.tolist(), advantages.tolist(), strict=True):
        pi, mu, advantage = _MP.exp(_MP.mpf(x)), _MP.exp(_MP.mpf(b)), _MP.mpf(a)
        regions = thresholds(objective)
        bound: Any = None if regions is None else _MP.mpf(regions[0] if a < 0 else regions[1])
        d = pi - mu
        away = _MP.sign(advantage) * d
        match objective:
            case DRPO():
                slope = -advantage + abs(advantage) * d / bound
            case SPO():
                slope = -advantage + abs(advantage) * d / (bound * mu)
            case MaskDRPO():
                slope = -advantage + (abs(advantage) * d / bound if away > bound else 0)
            case PPOClip(dual_clip=c):
                dropped = away > bound * mu or (c is not None and a < 0 and pi > c * mu)
                slope = _MP.mpf(0) if dropped else -advantage
            case DPPO(divergence=kind, max_ratio=c):
                measured = abs(d) if kind == "binary_tv" else binary_kl(x, b)
                slope = _MP.mpf(0) if away > 0 and measured > bound else -advantage * _cap(c, mu / pi)
            case PolicyGradient(max_ratio=c) | CISPO(max_ratio=c, min_ratio=None):
                slope = -advantage * _cap(c, mu / pi)
            case CISPO(max_ratio=c, min_ratio=low):
                slope = -advantage * max(_cap(c, mu / pi), low * mu / pi)
            case SAPO(tau_positive=positive, tau_negative=negative):
                slope = -advantage * _MP.sech((negative if a < 0 else positive) * d / (2 * mu)) ** 2
            case Reinforce():
                slope = -advantage * mu / pi
            case IcePop(min_ratio=low, max_ratio=high):
                slope = -advantage if low * mu <= pi <= high * mu else _MP.mpf(0)
            case IPO(max_ratio=c):
                inside = -regions[0] <= d <= regions[1]  # type: ignore[index]
                slope = -advantage * _cap(c, mu / pi) if inside else _MP.mpf(0)
            case TOPR():
                slope = -advantage * (mu / pi if advantage > 0 else min(1, mu / pi))
            case _:
                msg = f"the oracle has no formula for {objective!r}"
                raise TypeError(msg)
        slopes.append((pi, slope))
    mean = sum(pi * slope for pi, slope in slopes)
    return np.array([float(pi * (slope - mean)) for pi, slope in slopes])


def _truncated(a: Any, r: Any, c: float | None) -> tuple[Any, Any]:
    """−A r, continued beyond r = c along the function whose derivative in log π is −A c; and min(1, c/r)."""
    if c is None or r <= c:
        return -a * r, _MP.mpf(1)
    return -a * c * (1 + _MP.log(r / c)), c / r


def _inverse(r: Any) -> Any:
    """min(1/r, e²⁰)."""
    return 1 / max(r, _MP.exp(-SATURATION))


def _finite(x: Any) -> Any:
    """Log π, and 0 where π = 0."""
    return _MP.mpf(0) if x == -_MP.inf else x


def _cap(c: float | None, inverse_ratio: Any) -> Any:
    return 1 if c is None else min(1, c * inverse_ratio)


def piece(objective: object, log_prob: FloatArray, behavior_log_prob: FloatArray, advantages: FloatArray) -> FloatArray:
    """Number of the smooth piece of the loss that each token is on, in plain float64.

    Only for asking whether two inputs a finite step apart are on the same piece.
    """
    ell = log_prob - behavior_log_prob
    with np.errstate(all="ignore"):
        ratio, pi, mu = np.exp(np.minimum(ell, SATURATION)), np.exp(log_prob), np.exp(behavior_log_prob)
        side = np.sign(advantages)
        number = (ell > SATURATION).astype(np.float64)
        cap = getattr(objective, "max_ratio", None) or getattr(objective, "dual_clip", None)
        if cap is not None:
            number += 2.0 * (ratio > cap)
        floor = getattr(objective, "min_ratio", None)
        if floor is not None:
            number += 8.0 * (ratio < floor)
        if isinstance(objective, TOPR):
            number += 2.0 * (ratio > 1.0)
        region = thresholds(objective)
        if region is None or isinstance(objective, (DRPO, SPO)):
            return number
        bound = np.where(advantages < 0.0, *region)
        if isinstance(objective, IPO):
            outside = (pi - mu > region[1]) | (mu - pi > region[0])
        elif isinstance(objective, PPOClip):
            outside = side * (ratio - 1.0) > bound
        elif isinstance(objective, DPPO) and objective.divergence == "binary_kl":
            kl = -mu * ell + (1.0 - mu) * (np.log1p(-mu) - np.log1p(-pi))
            # beyond π = 1 the formula ends; a NaN there must not count as a piece of its own
            outside = (side * ell > 0.0) & ~(kl <= bound)
        else:
            outside = side * (pi - mu) > bound
        result: FloatArray = number + 4.0 * outside
    return result
