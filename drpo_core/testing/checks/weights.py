"""The gradient weight w: its bounds, sign, symmetries and limits.

Implementations that return no weight are given w = −gradient / (A r coefficient), so a loss with autodiff alone is held
to the same properties.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from drpo_core.objectives import (
    CISPO,
    DPPO,
    DRPO,
    IPO,
    OBJECTIVES,
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
from drpo_core.objectives.thresholds import VacuousTrustRegionWarning
from drpo_core.testing import oracle
from drpo_core.testing.batch import BoolArray, TokenBatch, unit_roundoff
from drpo_core.testing.checks._base import (
    JUMP,
    blur,
    bounds_of,
    check,
    expect,
    is_smooth,
    needs_analytic_gradient,
    needs_exact_gradient,
    needs_family,
    needs_instance,
    needs_local,
    needs_objective,
    slack,
    tokens,
    tolerance,
)
from drpo_core.testing.checks.gradient import reference_of
from drpo_core.testing.implementation import describe
from drpo_core.testing.oracle import SATURATION, references

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core.objectives import Objective
    from drpo_core.testing.batch import BoolArray, FloatArray
    from drpo_core.testing.implementation import Evaluation, Implementation

__all__ = [
    "check_boundary_is_kept",
    "check_clip_weight_is_an_indicator",
    "check_converging_and_diverging_weights",
    "check_limits_in_the_threshold",
    "check_probability_and_ratio_thresholds_correspond",
    "check_same_region_as_the_mask",
    "check_thresholds_follow_the_sign_of_the_advantage",
    "check_weight_bounds",
    "check_weight_is_continuous",
    "check_weight_sign_is_the_trust_region",
    "check_weight_symmetries",
]

_THRESHOLDED = tuple({family.objective: None for family in OBJECTIVES if family.measure is not None})
_BY_ADVANTAGE = tuple(kind for kind in _THRESHOLDED if kind is not IPO)
"""Whose threshold bounds diverging tokens alone."""


def _weighed(evaluation: Evaluation) -> BoolArray:
    """Where the weight is known and the ratio neither saturates nor underflows."""
    in_range = np.abs(evaluation.batch.log_ratio) < SATURATION
    return evaluation.weighed & (in_range if evaluation.returned_weight is None else True)


@check("P10", needs=[needs_objective, needs_local])
def check_weight_bounds(implementation: Implementation, batch: TokenBatch) -> None:
    """The weight is within its tight bounds, which are functions of μ, up to 4 ulp.

    DRPO, A > 0: 1 − (1 − μ)/δ ≤ w ≤ 1 + μ/δ. A missing μ (SPO's penalty under DRPO's name) is unbounded below.
    """
    result = implementation(batch)
    low, high = _tight_bounds(implementation.objective, batch)
    for relation, limit in (("at least", low), ("at most", high)):
        bound = slack(result) * (1.0 + np.abs(limit))
        because = "the weight is within its tight bounds"
        expect(result, "weight", relation, limit, bound=bound, where=_weighed(result), because=because)


@check("P11", needs=[needs_objective, needs_local, needs_instance(*_THRESHOLDED, IcePop)], cases=tokens(max_ulp=4096))
def check_weight_sign_is_the_trust_region(implementation: Implementation, batch: TokenBatch) -> None:
    """Tokens with w ≥ 0 (w > 0 where the weight is a mask) are exactly those that the trust region keeps.

    A clip that is computed and not used, an ε that is not forwarded, a dual clip applied to A > 0 change which tokens
    these are (rllm #81, slime #2247, tianshou #433). Tokens within rounding of the boundary are for other checks.
    """
    result = implementation(batch)
    exact = reference_of(result)
    known = _weighed(result) & (exact.jump > JUMP * unit_roundoff(result.dtype))
    if is_smooth(implementation.objective):
        known &= np.abs(exact.weight) > 16.0 * slack(result) * exact.weight_scale
    kept = exact.kept
    tiny = np.finfo(np.float64).tiny
    expect(result, "weight", "at least", tiny, where=known & kept, because="a token that the trust region keeps has w > 0")
    expect(result, "weight", "at most", 0.0, where=known & ~kept, because="a token outside the trust region has w ≤ 0")


_PARTNERS: dict[type, Callable[[Any], Objective]] = {
    DRPO: lambda o: DPPO(delta=o.delta, delta_low=o.delta_low, delta_high=o.delta_high),
    MaskDRPO: lambda o: DPPO(delta=o.delta, delta_low=o.delta_low, delta_high=o.delta_high),
    SPO: lambda o: PPOClip(eps=o.eps, eps_low=o.eps_low, eps_high=o.eps_high),
}


@check(
    "P11",
    needs=[needs_instance(*_PARTNERS), needs_family, needs_analytic_gradient],
    cases=tokens(regimes=["near_boundary", "head", "near_on_policy"], layouts=["full"]),
)
def check_same_region_as_the_mask(implementation: Implementation, batch: TokenBatch) -> None:
    """Where w ≥ 0: of DRPO ⇔ DPPO Binary-TV keeps, w ≥ 0 of SPO ⇔ ratio clipping keeps: to the last bit, at the boundary too.

    Written as 1 − x/δ rather than (δ − x)/δ, XLA's reciprocal multiply flipped 155 of 600 near-boundary tokens.
    """
    smooth_one = implementation(batch)
    partner = _quietly(lambda: _PARTNERS[type(implementation.objective)](implementation.objective))
    mask = implementation.of(partner)(batch)
    known = smooth_one.weighed & mask.weighed
    because = "w ≥ 0 exactly where the mask keeps the token"
    expect(smooth_one, "weight", "at least", 0.0, where=known & (mask.weight > 0.0), because=because)
    below = -np.finfo(np.float64).tiny
    expect(smooth_one, "weight", "at most", below, where=known & (mask.weight == 0.0), because=because)


# (log π, log μ) whose shift and ratio are exact in any library, because they are whole multiples of log 2
_LOG2 = float(np.log(2.0))
_EXACT_SHIFTS = {0.5: (0.0, -_LOG2), 0.25: (-_LOG2, -2.0 * _LOG2), 0.75: (0.0, -2.0 * _LOG2)}


def _exact_boundary(objective: Any) -> TokenBatch | None:
    """Tokens exactly on the boundary: A > 0, A < 0, or both; None if floating point has none."""
    region = oracle.thresholds(objective)
    if region is None:
        return None
    low, high = region
    points: list[tuple[float, ...]] = []
    if isinstance(objective, PPOClip):
        if high == 1.0:
            points.append((0.0, -_LOG2, 1.0))
        if low == 0.5:
            points.append((-_LOG2, 0.0, -1.0))
    else:
        if high in _EXACT_SHIFTS:
            points.append((*_EXACT_SHIFTS[high], 1.0))
        if low in _EXACT_SHIFTS:
            points.append((*reversed(_EXACT_SHIFTS[low]), -1.0))
    if not points:
        return None
    x, b, a = np.array(points).T[:, None, :]
    return TokenBatch(x, b, a, np.ones(x.shape, dtype=bool))


def _at_exact_boundary(implementation: Implementation) -> Implementation | None:
    objective = implementation.objective
    if _exact_boundary(objective) is not None:
        return implementation
    if implementation.family is None:
        return None
    if isinstance(objective, PPOClip):
        return implementation.of(PPOClip(eps_low=0.5, eps_high=1.0))
    if isinstance(objective, DPPO):
        return implementation.of(DPPO(delta_low=0.25, delta_high=0.5, max_ratio=objective.max_ratio))
    if isinstance(objective, IPO):
        return implementation.of(IPO(delta_low=0.25, delta_high=0.5, max_ratio=objective.max_ratio))
    return implementation.of(MaskDRPO(delta_low=0.25, delta_high=0.5))


def _needs_representable_boundary(implementation: Implementation) -> str | None:
    objective = implementation.objective
    if isinstance(objective, DPPO) and objective.divergence != "binary_tv":
        return "no token is exactly on the boundary of a KL"
    if not implementation.keeps_boundary:
        return "declared strict: a token exactly on the boundary is dropped"
    if _at_exact_boundary(implementation) is None:
        return "no token is exactly on this boundary in floating point; declare δ = 0.25, 0.5 or 0.75, ε_low = 0.5, ε_high = 1"
    return None


@check(
    "P11",
    needs=[needs_instance(PPOClip, DPPO, MaskDRPO, IPO), needs_exact_gradient, needs_local, _needs_representable_boundary],
    cases=tokens(regimes=["head"], layouts=["full"]),
)
def check_boundary_is_kept(implementation: Implementation, batch: TokenBatch) -> None:
    """A token exactly on the boundary is kept, as in every shipped implementation of DPPO and PPO.

    Strict comparisons give a mask that DRPO's w ≥ 0 no longer equals. The tokens have π and μ powers of 2.
    """
    subject = _at_exact_boundary(implementation)
    assert subject is not None
    edge = _exact_boundary(subject.objective)
    assert edge is not None
    on_edge = np.zeros(batch.shape, dtype=bool)
    changed = batch.map(np.copy)
    count = min(edge.shape[1], batch.shape[1])
    for index in range(count):
        for name in ("log_prob", "behavior_log_prob", "advantages"):
            getattr(changed, name)[0, index] = getattr(edge, name)[0, index]
        on_edge[0, index] = True
    result = subject(changed)
    ratio = np.exp(changed.log_ratio)
    cap = getattr(subject.objective, "max_ratio", None) or np.inf
    expected = -changed.advantages * np.minimum(ratio, cap) * result.coefficients
    bound = tolerance(implementation) * np.abs(expected)
    because = f"a token exactly on the boundary of {describe(subject.objective)} is kept"
    expect(result, "gradient", "close", expected, bound=bound, where=on_edge, because=because)


@check("P12", needs=[needs_objective, needs_local, needs_instance(PolicyGradient, *_BY_ADVANTAGE, unless_capped=True)])
def check_converging_and_diverging_weights(implementation: Implementation, batch: TokenBatch) -> None:
    """Converging tokens have w ≥ 1; diverging ones w ≤ 1, and strictly less where the weight is smooth.

    A flipped sign(A) or sign(r − 1) in the penalty, or a dual clip applied to the wrong side, breaks one of them.
    """
    result = implementation(batch)
    exact = reference_of(result)
    direction = np.sign(batch.advantages) * batch.log_ratio
    known = _weighed(result) & (exact.jump > JUMP * unit_roundoff(result.dtype))
    bound = slack(result) * (exact.weight_scale + np.abs(batch.log_ratio))
    expect(
        result, "weight", "at least", 1.0, bound=bound, where=known & (direction < 0.0), because="a converging token has w ≥ 1"
    )
    expect(
        result, "weight", "at most", 1.0, bound=bound, where=known & (direction > 0.0), because="a diverging token has w ≤ 1"
    )
    if is_smooth(implementation.objective):
        clearly = known & (np.abs(exact.weight - 1.0) > 4.0 * bound)
        sharper = np.where(direction > 0.0, "at most", "at least")
        for relation, margin in (("at most", -2.0 * bound), ("at least", 2.0 * bound)):
            because = f"a {'diverging' if relation == 'at most' else 'converging'} token has w ≠ 1"
            expect(result, "weight", relation, 1.0 + margin, where=clearly & (sharper == relation), because=because)


def _asymmetric(objective: Any) -> Any:
    """The objective itself if its thresholds differ, else a variant whose do."""
    low, high = oracle.thresholds(objective)  # type: ignore[misc]
    if low != high:
        return objective
    name = str(oracle.threshold_name(objective))
    return _quietly(lambda: replace(objective, **{name: None, f"{name}_low": 0.5 * low, f"{name}_high": high}))


def _between(objective: Any) -> Any:
    """The objective with one threshold, between the two."""
    asymmetric = _asymmetric(objective)
    low, high = oracle.thresholds(asymmetric)  # type: ignore[misc]
    name = str(oracle.threshold_name(objective))
    middle = {name: float(np.sqrt(low * high)), f"{name}_low": None, f"{name}_high": None}
    return _quietly(lambda: replace(asymmetric, **middle))


def _needs_asymmetric(implementation: Implementation) -> str | None:
    low, high = oracle.thresholds(implementation.objective) or (0.0, 0.0)
    if low != high or implementation.family is not None:
        return None
    return "its two thresholds are equal, and it implements no others (no family)"


@check(
    "P13",
    needs=[needs_objective, needs_local, needs_instance(*_BY_ADVANTAGE), _needs_asymmetric, needs_exact_gradient],
    cases=tokens(regimes=["near_boundary", "head"], objective=lambda i: _between(i.objective)),
)
def check_thresholds_follow_the_sign_of_the_advantage(implementation: Implementation, batch: TokenBatch) -> None:
    """δ_high (ε_high) governs A > 0 and δ_low (ε_low) governs A < 0.

    Swapped thresholds look right with equal ones and on most tokens; the tokens here lie between the two.
    """
    objective = _asymmetric(implementation.objective)
    subject = implementation if objective is implementation.objective else implementation.of(objective)
    result = subject(batch)
    exact = reference_of(result)
    bound = tolerance(implementation) * result.coefficients * (1.0 + exact.gradient_scale)
    decided = exact.jump > JUMP * unit_roundoff(result.dtype)
    because = "the high threshold governs A > 0, the low one A < 0"
    expect(result, "gradient", "close", exact.gradient * result.coefficients, bound=bound, where=decided, because=because)


def _needs_symmetric(implementation: Implementation) -> str | None:
    low, high = oracle.thresholds(implementation.objective) or (0.0, 0.0)
    if low == high or implementation.family is not None:
        return None
    return "its two thresholds differ, and it implements no others (no family)"


@check("P14", needs=[needs_local, needs_instance(DRPO, SPO), _needs_symmetric])
def check_weight_symmetries(implementation: Implementation, batch: TokenBatch) -> None:
    """w(A) + w(−A) = 2; for DRPO also w(π, μ) + w(μ, π) = 2.

    The penalty pulls as much as it pushes. A ratio in place of the shift keeps the first and breaks the second.
    """
    low, high = oracle.thresholds(implementation.objective)  # type: ignore[misc]
    subject = implementation
    if low != high:
        name = str(oracle.threshold_name(implementation.objective))
        symmetric = {name: high, f"{name}_low": None, f"{name}_high": None}
        subject = implementation.of(_quietly(lambda: replace(implementation.objective, **symmetric)))  # type: ignore[type-var]
    result = subject(batch)
    mirrored = [("−A", batch.replace(advantages=-batch.advantages))]
    if isinstance(implementation.objective, DRPO):
        swapped = batch.replace(log_prob=batch.behavior_log_prob, behavior_log_prob=batch.log_prob)
        mirrored.append(("π and μ exchanged", swapped))
    for what, other in mirrored:
        partner = subject(other)
        known = _weighed(result) & _weighed(partner) & (batch.advantages != 0.0)
        bound = 4.0 * (slack(result) + slack(partner)) * (1.0 + np.abs(partner.weight)) * (1.0 + np.abs(batch.log_ratio))
        bound = bound + blur(partner, "weight")
        because = f"the weights with A and with {what} add up to 2" if what == "−A" else f"with {what} the weights add up to 2"
        expect(result, "weight", "close", 2.0 - partner.weight, bound=bound, where=known, because=because)


@check("P15", needs=[needs_objective, needs_local, needs_instance(DRPO, SPO, DPPO, PPOClip, unless_capped=True)])
def check_probability_and_ratio_thresholds_correspond(implementation: Implementation, batch: TokenBatch) -> None:
    """DRPO(δ) is SPO with the token's own ε = δ/μ, and DPPO Binary-TV(δ) is ratio clipping with ε = δ/μ.

    The correspondence fails where μ is forgotten, squared, or taken from another policy than the ratio's.
    """
    objective = implementation.objective
    if isinstance(objective, DPPO) and objective.divergence != "binary_tv":
        return
    result = implementation(batch)
    mu = np.exp(batch.behavior_log_prob)
    own = bounds_of(objective, batch.advantages)
    in_region = _weighed(result) & (np.abs(batch.log_ratio) < SATURATION) & (batch.advantages != 0.0) & (mu > 1e-12)
    threshold = own / mu if isinstance(objective, (DRPO, DPPO)) else own * mu
    make: Callable[[float], object] = {
        DRPO: lambda t: SPO(eps=t),
        DPPO: lambda t: PPOClip(eps=t),
        SPO: lambda t: DRPO(delta=t),
        PPOClip: lambda t: DPPO(delta=t),
    }[type(objective)]
    expected, bound, decided = np.zeros(batch.shape), np.zeros(batch.shape), in_region.copy()
    for index in map(tuple, np.argwhere(in_region)):
        partner = _quietly(lambda index=index: make(float(threshold[index])))  # type: ignore[misc]
        exact = oracle.reference(
            partner, *(float(getattr(batch, n)[index]) for n in ("log_prob", "behavior_log_prob", "advantages"))
        )
        expected[index], bound[index] = exact.weight, 16.0 * slack(result)[index] * exact.weight_scale
        # the token's own ε is rounded, which matters to a mask near its boundary
        decided[index] = is_smooth(objective) or exact.jump > JUMP * unit_roundoff(result.dtype)
    because = "the weight is that of the ratio objective at ε = δ/μ"
    expect(result, "weight", "close", expected, bound=bound, where=decided, because=because)


_VAST, _MINUTE = 1e12, 1e-12


def _at_threshold(objective: Any, value: float) -> Objective:
    name = str(family_of(objective).threshold)
    changes: dict[str, Any] = {name: value}
    if oracle.threshold_name(objective) is not None:
        changes |= {f"{name}_low": None, f"{name}_high": None}
    changes |= {other: None for other in ("dual_clip", "min_ratio") if hasattr(objective, other)}
    limited: Objective = _quietly(lambda: replace(objective, **changes))
    return limited


@check(
    "P17",
    needs=[needs_objective, needs_local, needs_instance(*_THRESHOLDED, CISPO), needs_family],
    cases=tokens(regimes=["on_policy", "head", "tail", "near_certain", "near_on_policy", "far"]),
)
def check_limits_in_the_threshold(implementation: Implementation, batch: TokenBatch) -> None:
    """As the threshold grows the gradient becomes that of PG-IS; as it vanishes, that of the penalty or of the cap alone.

    A threshold that is accepted and not used has no limits (slime #2247: ε not forwarded).
    """
    objective = implementation.objective
    capped = getattr(objective, "max_ratio", None) if not isinstance(objective, CISPO) else None
    surrogate = PolicyGradient(max_ratio=capped)
    vast = implementation.of(_at_threshold(objective, _VAST))(batch)
    valid = vast.coefficients > 0.0
    tokens_of = (batch.log_prob, batch.behavior_log_prob, batch.advantages)
    unlimited = references(surrogate, *tokens_of, valid)
    # the penalty left over is of relative size (r − 1)/threshold
    bound = tolerance(implementation) * vast.coefficients * (1.0 + unlimited.gradient_scale)
    bound = bound + vast.coefficients * np.abs(unlimited.gradient) * np.exp(np.minimum(batch.log_ratio, 20.0)) / _VAST
    because = f"at a threshold of {_VAST:g} the gradient is that of the unregularised surrogate"
    expected = unlimited.gradient * vast.coefficients
    expect(vast, "gradient", "close", expected, bound=bound, where=valid, because=because)

    minute = implementation.of(_at_threshold(objective, _MINUTE))(batch)
    exact = reference_of(minute)
    bound = tolerance(implementation) * minute.coefficients * (_MINUTE + exact.gradient_scale)
    because = f"at a threshold of {_MINUTE:g} only the penalty, the cap or nothing diverging is left"
    decided = valid & (exact.jump > JUMP * unit_roundoff(minute.dtype)) & (np.abs(batch.log_ratio) > 1e-3)
    if isinstance(objective, CISPO):
        penalty_alone = -batch.advantages * np.minimum(_MINUTE, np.exp(np.minimum(batch.log_ratio, 20.0)))
    elif isinstance(objective, (PPOClip, DPPO)):
        penalty_alone = np.where(batch.advantages * batch.log_ratio > 0.0, 0.0, unlimited.gradient)
    elif isinstance(objective, IPO):
        penalty_alone = np.zeros(batch.shape)
    else:
        penalty_alone = exact.gradient
    where = decided & (np.exp(batch.behavior_log_prob) > 1e-6) & (np.exp(batch.log_prob) > 1e-6)
    expect(minute, "gradient", "close", penalty_alone * minute.coefficients, bound=bound, where=where, because=because)


@check(
    "P18",
    needs=[needs_instance(DRPO, SPO), needs_local, needs_objective],
    cases=tokens(regimes=["near_boundary", "head", "near_on_policy"], layouts=["full"]),
)
def check_weight_is_continuous(implementation: Implementation, batch: TokenBatch) -> None:
    """The weight vanishes where the shift (SPO: r − 1) reaches the threshold, and is Lipschitz with constant 1/threshold.

    What a smooth trust region promises over a mask: no jump, at the boundary or at r = 1.
    """
    objective = implementation.objective
    result = implementation(batch)
    exact = reference_of(result)
    bound = 16.0 * slack(result) * exact.weight_scale
    known = result.weighed & (batch.log_ratio < SATURATION)
    # within a few ulp of the boundary the weight is 0 up to rounding
    at_edge = known & (np.abs(exact.weight) < 64.0 * unit_roundoff(result.dtype))
    expect(result, "weight", "close", 0.0, bound=bound, where=at_edge, because="the weight vanishes at the boundary")
    # any two values of π for the same μ and A: here, those of neighbouring tokens
    farthest, b = 0.9 * min(SATURATION, implementation.max_abs_log_ratio), batch.behavior_log_prob
    other = np.clip(np.roll(batch.log_prob, 1, axis=-1), b - farthest, b + farthest)
    neighbour = implementation(batch.replace(log_prob=np.minimum(other, 0.0)))
    x, y = batch.log_prob, neighbour.batch.log_prob
    moved = np.abs(np.exp(x) - np.exp(y)) if isinstance(objective, DRPO) else np.abs(np.exp(x - b) - np.exp(y - b))
    change = moved / bounds_of(objective, batch.advantages)
    rounding = 16.0 * (slack(result) * exact.weight_scale + slack(neighbour) * reference_of(neighbour).weight_scale)
    known &= neighbour.weighed & (batch.advantages != 0.0)
    because = "the weight changes by at most the change of π (SPO: r) over the threshold"
    expect(
        result,
        "weight",
        "close",
        neighbour.weight,
        bound=change + rounding + blur(neighbour, "weight"),
        where=known,
        because=because,
    )


@check("P19", needs=[needs_objective, needs_local, needs_instance(PPOClip, DPPO, IcePop, IPO)])
def check_clip_weight_is_an_indicator(implementation: Implementation, batch: TokenBatch) -> None:
    """The weight of a clip or mask is 0 or 1 (or min(1, c/r) with a cap): M² = M, and M is not differentiated.

    A mask left in the graph, or a clip of the ratio where the loss should be clipped, gives weights in between.
    """
    result = implementation(batch)
    objective = implementation.objective
    cap = np.inf if isinstance(objective, IcePop) else getattr(objective, "max_ratio", None) or np.inf
    ratio = np.exp(np.minimum(batch.log_ratio, SATURATION))
    kept = np.minimum(1.0, cap / ratio)
    # at a tie autodiff may halve the gradient
    known = _weighed(result) & (reference_of(result).jump > JUMP * unit_roundoff(result.dtype))
    nearest = np.where(np.abs(result.weight) < 0.5 * kept, 0.0, kept)
    bound = 4.0 * slack(result) * (1.0 + np.abs(batch.log_ratio))
    because = "the weight of a mask is 0 or 1 (times a truncation)"
    expect(result, "weight", "close", nearest, bound=bound, where=known, because=because)
    dropped = known & (nearest == 0.0)
    because = "a dropped token has a gradient of exactly 0"
    if implementation.exact_gradient:
        expect(result, "gradient", "equal", 0.0, where=dropped, because=because)


def _tight_bounds(  # noqa: PLR0911 -- one case an objective
    objective: Any, batch: TokenBatch
) -> tuple[FloatArray, FloatArray]:
    """Infimum and supremum of w over π, for the token's μ and sign of A."""
    mu, a = np.exp(batch.behavior_log_prob), batch.advantages
    largest_ratio = np.minimum(1.0 / mu, np.exp(SATURATION))
    one, zero = np.ones(batch.shape), np.zeros(batch.shape)
    match objective:
        case PolicyGradient(max_ratio=None):
            return one, one
        case PolicyGradient(max_ratio=c) | CISPO(max_ratio=c, min_ratio=None):
            return np.minimum(1.0, c / largest_ratio), one
        case CISPO(max_ratio=c, min_ratio=lowest):
            return np.minimum(1.0, c / largest_ratio), np.maximum(1.0, lowest * np.exp(SATURATION) * one)
        case SAPO():
            return zero, one
        case PPOClip() | DPPO() | IcePop() | IPO():
            return zero, one
        case Reinforce() | TOPR():
            untruncated = isinstance(objective, Reinforce) | (a > 0.0)
            return 1.0 / largest_ratio, np.where(untruncated, np.exp(SATURATION), 1.0)
    bound = bounds_of(objective, a)
    # how far the shift or r − 1 can go in the direction of A, and against it
    if isinstance(objective, SPO):
        along, against = np.where(a > 0.0, largest_ratio - 1.0, 1.0), np.where(a > 0.0, 1.0, largest_ratio - 1.0)
    else:
        along, against = np.where(a > 0.0, 1.0 - mu, mu), np.where(a > 0.0, mu, 1.0 - mu)
    low, high = 1.0 - along / bound, 1.0 + against / bound
    if isinstance(objective, MaskDRPO):
        low, high = np.minimum(low, 1.0), one
    return np.where(a == 0.0, 1.0, low), np.where(a == 0.0, 1.0, high)


def _quietly(make: Callable[[], Any]) -> Any:
    """Build an objective whose threshold may be vacuous: here that is the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VacuousTrustRegionWarning)
        return make()
