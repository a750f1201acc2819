"""Divergences between π and μ, where an implementation declares them, and the regions they draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from drpo_core.objectives import DPPO
from drpo_core.testing import oracle
from drpo_core.testing.checks._base import (
    PropertyViolated,
    check,
    expect,
    needs_divergences,
    needs_exact_gradient,
    needs_local,
    tokens,
)
from drpo_core.testing.checks.gradient import reference_of
from drpo_core.testing.strategies import vocabularies

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from drpo_core.testing.batch import BoolArray, FloatArray, TokenBatch, Vocabulary
    from drpo_core.testing.implementation import Implementation

__all__ = [
    "check_divergence_inequalities",
    "check_divergences_are_ordered",
    "check_kl_region_is_within_a_tv_region",
    "check_top_k_reaches_the_full_divergence",
]

_ROUNDING = 1e-12
"""Absolute, of sums of a few probabilities in float64."""


def _cases(implementation: Implementation) -> SearchStrategy[Vocabulary]:
    return vocabularies() if implementation.shape is None else vocabularies(states=2, size=6)


@check("P21", needs=[needs_divergences], cases=_cases)
def check_divergences_are_ordered(implementation: Implementation, case: Vocabulary) -> None:
    """Binary ≤ Top-K ≤ full, for TV and KL, and Top-K is non-decreasing in K.

    Holds only if the sampled token is forced into the K: 234 of 19,648 draws violated it otherwise.
    """
    for kind in ("tv", "kl"):
        full = implementation.divergences[f"full_{kind}"](case.log_prob, case.behavior_log_prob)
        previous, previous_name = _sampled(implementation, f"binary_{kind}", case), f"binary {kind}"
        rounding = _ROUNDING + 1e-9 * full
        for k in range(1, case.log_prob.shape[1] - 1):
            current = _top_k(implementation, f"top_k_{kind}", case, k)
            _require(previous <= current + rounding, f"{previous_name} ≤ top-{k} {kind}, got {previous} > {current}", case)
            previous, previous_name = current, f"top-{k} {kind}"
        _require(previous <= full + rounding, f"{previous_name} ≤ full {kind}, got {previous} > {full}", case)


@check("P21", needs=[needs_divergences], cases=_cases)
def check_top_k_reaches_the_full_divergence(implementation: Implementation, case: Vocabulary) -> None:
    """Top-K with K ≥ V − 1 is the full divergence, which is that of the 50-digit reference."""
    size = case.log_prob.shape[1]
    for kind, full_reference in (("tv", oracle.full_tv), ("kl", oracle.full_kl)):
        exact = np.array([full_reference(x, b) for x, b in zip(case.log_prob, case.behavior_log_prob, strict=True)])
        full = implementation.divergences[f"full_{kind}"](case.log_prob, case.behavior_log_prob)
        rounding = _ROUNDING + 1e-9 * exact
        _require(np.abs(full - exact) <= rounding, f"full {kind} is {exact}, got {full}", case)
        for k in {max(1, size - 1), size}:
            current = _top_k(implementation, f"top_k_{kind}", case, k)
            _require(np.abs(current - full) <= rounding, f"top-{k} {kind} of {size} is {full}, got {current}", case)


@check("P22", needs=[needs_divergences], cases=_cases)
def check_divergence_inequalities(implementation: Implementation, case: Vocabulary) -> None:
    """Pinsker, KL ≥ 2 TV², and Bretagnolle–Huber, TV ≤ √(1 − e^−KL), for Binary, Top-K and full divergences."""
    k = max(1, case.log_prob.shape[1] // 2)
    pairs = {
        "binary": [_sampled(implementation, f"binary_{kind}", case) for kind in ("tv", "kl")],
        f"top-{k}": [_top_k(implementation, f"top_k_{kind}", case, k) for kind in ("tv", "kl")],
        "full": [implementation.divergences[f"full_{kind}"](case.log_prob, case.behavior_log_prob) for kind in ("tv", "kl")],
    }
    for name, (tv, kl) in pairs.items():
        _require((tv >= 0.0) & (tv <= 1.0 + _ROUNDING), f"0 ≤ {name} TV ≤ 1: {tv}", case)
        _require(kl >= 2.0 * tv**2 - _ROUNDING, f"{name}: KL ≥ 2 TV²: KL {kl}, TV {tv}", case)
        _require(tv**2 <= -np.expm1(-kl) + _ROUNDING, f"{name}: TV ≤ √(1 − e^−KL): KL {kl}, TV {tv}", case)


def _needs_binary_kl(implementation: Implementation) -> str | None:
    objective = implementation.objective
    if isinstance(objective, DPPO) and objective.divergence == "binary_kl":
        return None
    return "only about DPPO Binary-KL"


@check("P22", needs=[_needs_binary_kl, needs_local, needs_exact_gradient], cases=tokens(max_ulp=4096))
def check_kl_region_is_within_a_tv_region(implementation: Implementation, batch: TokenBatch) -> None:
    """A diverging token that Binary-KL(δ) keeps has abs(π − μ) ≤ √(δ/2), so Binary-TV at δ_TV ≥ √(δ/2) keeps it too.

    An offset of 1e-8 inside the logarithms lets tokens with π → 1 through (KL 1.44 where it is 2.32).
    """
    result = implementation(batch)
    region = oracle.thresholds(implementation.objective)
    assert region is not None
    delta = np.where(batch.advantages < 0.0, *region)
    shift = np.abs(np.exp(batch.log_prob) - np.exp(batch.behavior_log_prob))
    beyond = (batch.advantages * batch.log_ratio > 0.0) & (shift > np.sqrt(0.5 * delta) * (1.0 + 1e-9))
    because = "a diverging token with abs(π − μ) > √(δ/2) is dropped by Binary-KL(δ)"
    expect(result, "gradient", "equal", 0.0, where=beyond & (~reference_of(result).kept), because=because)


def _sampled(implementation: Implementation, name: str, case: Vocabulary) -> FloatArray:
    rows = np.arange(case.log_prob.shape[0])
    return implementation.divergences[name](case.log_prob[rows, case.sampled], case.behavior_log_prob[rows, case.sampled])


def _top_k(implementation: Implementation, name: str, case: Vocabulary, k: int) -> FloatArray:
    rows = np.arange(case.log_prob.shape[0])
    ids = np.argsort(-case.behavior_log_prob, axis=1, kind="stable")[:, :k]
    return implementation.divergences[name](
        case.log_prob[rows, case.sampled],
        case.behavior_log_prob[rows, case.sampled],
        top_k_log_prob=np.take_along_axis(case.log_prob, ids, 1),
        top_k_behavior_log_prob=np.take_along_axis(case.behavior_log_prob, ids, 1),
        sampled_in_top_k=(ids == case.sampled[:, None]).any(axis=1),
    )


def _require(holds: BoolArray, because: str, case: Vocabulary) -> None:
    if not np.all(holds):
        source = f"import numpy as np\n\nfrom drpo_core.testing import Vocabulary\n\ncase = {case!r}\n"
        raise PropertyViolated(because, (), source)
