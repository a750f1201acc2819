"""Value and gradient: against the formula, against each other, in every precision, in expectation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from drpo_core.modes import Mode
from drpo_core.modes.mode import is_whole_mode
from drpo_core.objectives import ASPO, CISPO, GPPO, PSPO
from drpo_core.testing import oracle
from drpo_core.testing.batch import unit_roundoff
from drpo_core.testing.checks._base import (
    DIFFERENCE_ROUNDINGS,
    JUMP,
    ROUNDINGS,
    check,
    exact_values,
    expect,
    is_smooth,
    needs_exact_gradient,
    needs_formula,
    needs_local,
    needs_objective,
    needs_ratio_form,
    scores,
    small_ratio,
    smooth,
    tokens,
    tolerance,
    with_dtypes,
)
from drpo_core.testing.checks.structure import close
from drpo_core.testing.frameworks import STEP
from drpo_core.testing.strategies import vocabularies

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy

    from drpo_core.testing.batch import BoolArray, FloatArray, TokenBatch, Vocabulary
    from drpo_core.testing.implementation import Evaluation, Implementation

__all__ = [
    "check_expected_gradient",
    "check_gradient_is_the_derivative_of_the_loss",
    "check_gradient_matches_the_formula",
    "check_homogeneous_in_the_advantage",
    "check_loss_matches_the_formula",
    "check_on_policy_gradient",
    "check_ratio_has_expectation_one",
    "check_rounding_error",
    "check_second_derivative",
    "check_zero_advantage_is_inert",
]

GRID = 2.0**16
"""Of log-probs to which steps are added, so that the sums are exact in float32."""


def reference_of(evaluation: Evaluation) -> oracle.References:
    """The oracle's values at the tokens an evaluation counts."""
    exact = exact_values(evaluation)
    # the edge of a smooth trust region is where w = 0
    smooth_edge = is_smooth(evaluation.implementation.objective)
    edge = np.abs(exact.weight) / np.maximum(exact.weight_scale, 1.0) if smooth_edge else exact.jump
    nearest = np.maximum(edge, unit_roundoff(evaluation.dtype)).min(where=evaluation.coefficients > 0.0, initial=1.0)
    scores["closeness to the boundary"] = max(scores.get("closeness to the boundary", 0.0), -float(np.log10(nearest)))
    return exact


@check("P3", needs=[needs_formula, needs_local])
def check_gradient_matches_the_formula(implementation: Implementation, batch: TokenBatch) -> None:
    """The gradient is −A r w / denominator at valid tokens, by the 50-digit reference, and 0 at masked ones.

    A loss value that looks right says nothing: a ratio that should be detached, k1 in place of k3 or a clip computed and
    not used change only the gradient (open-instruct #1269, NeMo-RL #2506, OpenRLHF #1309, rllm #81). The reference of an
    objective that the library does not have is the objective's own methods in float64.
    """
    result = implementation(batch)
    exact = reference_of(result)
    bound = tolerance(implementation) * result.coefficients * (1.0 + exact.gradient_scale)
    decided = exact.jump > JUMP * unit_roundoff(result.dtype)
    expect(
        result,
        "gradient",
        "close",
        exact.gradient * result.coefficients,
        bound=bound,
        where=decided,
        because="the gradient is −A r w / denominator",
    )


def _needs_loss_formula(implementation: Implementation) -> str | None:
    if implementation.form == "ratio" or isinstance(implementation.objective, (CISPO, GPPO)):
        return None
    return "score form: its value is a matter of convention"


@check("P3", needs=[needs_formula, needs_local, _needs_loss_formula])
def check_loss_matches_the_formula(implementation: Implementation, batch: TokenBatch) -> None:
    """The loss value is the objective's, reduced as declared.

    A wrong reduction or a missing term gives plausible curves (NeMo-RL #2958, TRL #3506).
    """
    result = implementation(batch)
    exact = reference_of(result)
    decided = exact.jump > JUMP * unit_roundoff(result.dtype)
    _expect_loss(result, exact, tolerance(implementation), decided)


@check("P3", needs=[needs_objective, needs_ratio_form, needs_local, needs_exact_gradient])
def check_gradient_is_the_derivative_of_the_loss(implementation: Implementation, batch: TokenBatch) -> None:
    """Ratio forms, away from kinks: the gradient is the central difference of the implementation's own loss."""
    batch = _on_grid(batch)
    result = implementation(batch)
    exact = reference_of(result)
    smooth_here = _steppable(result, exact)
    # one direction for all tokens at once: P4 has them independent, and signs keep them from cancelling
    rows, columns = np.indices(batch.shape)
    direction = np.where(smooth_here, np.where((rows + columns) % 2 == 0, 1.0, -1.0), 0.0)
    slope = _slope(lambda x: implementation(batch.replace(log_prob=x)).loss, batch.log_prob, direction)
    scale = result.coefficients * (exact.gradient_scale + exact.loss_scale)
    limit = _difference_limit(implementation)
    because = "the gradient is the derivative of the loss"
    if implementation.reduction == "none":
        bound = limit * (1.0 + scale)
        expect(result, "gradient", "close", slope * direction, bound=bound, where=direction != 0.0, because=because)
        return
    directional = float((result.gradient * direction).sum())
    difference = abs(directional - float(slope))
    if not difference <= limit * (1.0 + scale.sum()):
        # name the tokens: the whole gradient is known from the loss alone
        expected = np.where(direction != 0.0, exact.gradient * result.coefficients, result.gradient)
        expect(result, "gradient", "close", expected, bound=limit * (1.0 + scale) / scale.size, because=because)
        expect(result, "gradient", "equal", np.nan, because=f"{because}; along ±1 it is {float(slope)!r}, not {directional!r}")


def _needs_second_order(implementation: Implementation) -> str | None:
    if implementation.second_order == "unknown":
        return "declares nothing about second derivatives (second_order)"
    return None if implementation.derivative is not None else "its gradient is not taken by autodiff"


@check("P3", needs=[_needs_second_order, needs_objective, needs_local, needs_exact_gradient])
def check_second_derivative(implementation: Implementation, batch: TokenBatch) -> None:
    """Differentiating the gradient gives its derivative, or an error where that is what is declared: never a wrong number.

    A detached coefficient or a custom rule that is not differentiable gives a plausible 0, which second-order methods and
    Hessian diagnostics take for curvature.
    """
    assert implementation.derivative is not None
    if implementation.second_order == "error":
        try:
            result = implementation.derivative(batch)
        except RuntimeError:
            # the refusal that was declared, so the check passes; a framework's "not implemented" is a RuntimeError too
            return
        expect(result, "gradient", "NaN", because="a second derivative is refused, as declared")
        return
    batch = _on_grid(batch)
    first = implementation(batch)
    exact = reference_of(first)
    result = implementation.derivative(batch)
    slope = _slope(lambda x: implementation(batch.replace(log_prob=x)).gradient, batch.log_prob, np.ones(batch.shape))
    expect(
        result,
        "gradient",
        "close",
        slope,
        bound=_difference_limit(implementation) * first.coefficients * (1.0 + exact.gradient_scale + exact.loss_scale),
        where=_steppable(first, exact),
        because="the second derivative is the derivative of the gradient",
    )


def _on_grid(batch: TokenBatch) -> TokenBatch:
    return batch.replace(log_prob=np.rint(batch.log_prob * GRID) / GRID)


def _steppable(evaluation: Evaluation, exact: oracle.References) -> BoolArray:
    """Where two steps to either side stay below log π = 0, on one smooth piece, and short of the saturated ratio."""
    batch, objective = evaluation.batch, evaluation.implementation.objective
    decided = exact.jump > JUMP * unit_roundoff(evaluation.dtype)
    below_one = batch.log_prob <= -2.0 * STEP
    unsaturated = batch.log_ratio < oracle.SATURATION - 1.0
    if isinstance(objective, ASPO):
        unsaturated &= batch.log_ratio > 1.0 - oracle.SATURATION
    return decided & below_one & smooth(objective, batch, 3.0 * STEP) & unsaturated


def _slope(function: Callable[[FloatArray], FloatArray], x: FloatArray, direction: FloatArray) -> FloatArray:
    """Derivative of a function along a direction, by central differences of fourth order."""
    far, near, back, far_back = (function(x + k * STEP * direction) for k in (2.0, 1.0, -1.0, -2.0))
    return (8.0 * (near - back) - (far - far_back)) / (12.0 * STEP)


def _difference_limit(implementation: Implementation) -> float:
    """What `_slope` may be off, relative to the terms: its own error, or the rounding of its values over its step."""
    rounding = DIFFERENCE_ROUNDINGS * unit_roundoff(implementation.dtypes[0]) / STEP
    return max(1e-8, tolerance(implementation), rounding)


def _capped_below_one(implementation: Implementation) -> str | None:
    if is_whole_mode(implementation.objective):
        return "P25 is about modes"
    if isinstance(implementation.objective, PSPO):
        return "it scales every gradient by 1 − α"
    low, high = (getattr(implementation.objective, name, None) for name in ("min_ratio", "max_ratio"))
    if low is not None and low >= 1.0:
        return "its lower bound on the ratio is at least 1, so r = 1 is raised"
    return None if high is None or high > 1.0 else "its cap on the ratio is at most 1, so r = 1 is capped"


@check("P9", needs=[_capped_below_one], cases=tokens(regimes=["on_policy", "head", "tail", "near_certain"]))
def check_on_policy_gradient(implementation: Implementation, batch: TokenBatch) -> None:
    """Where π = μ, every objective's gradient is −A / denominator.

    A wrong temperature, log-probs of another token or a renormalised sampler show as a ratio that is not 1 on-policy
    (TRL #4159, prime-rl #697, TRL #6789).
    """
    result = implementation(batch.replace(log_prob=batch.behavior_log_prob))
    expected = -batch.advantages * result.coefficients
    bound = (16.0 * unit_roundoff(result.dtype) if implementation.exact_gradient else 1e-6) * np.abs(expected)
    expect(result, "gradient", "close", expected, bound=bound, because="on-policy the gradient is −A / denominator")


def _needs_no_penalties(implementation: Implementation) -> str | None:
    penalised = isinstance(implementation.objective, Mode) and implementation.objective.penalties
    return "penalties act whatever the advantages are" if penalised else None


@check("P16", needs=[_needs_no_penalties])
def check_homogeneous_in_the_advantage(implementation: Implementation, batch: TokenBatch) -> None:
    """Loss and gradient are positively homogeneous of degree 1 in A.

    A penalty without abs(A) is not (the ℓ₂² ablation), nor is a KL term added to every token (prime-rl's default).
    """
    before = implementation(batch)
    for factor in (0.5, 4.0):
        after = implementation(batch.replace(advantages=factor * batch.advantages))
        because = f"{factor:g} A gives {factor:g} times"
        close(after, "gradient", factor * before.gradient, because=f"{because} the gradient")
        close(after, "loss", factor * before.loss, because=f"{because} the loss")


@check("P16", needs=[_needs_no_penalties])
def check_zero_advantage_is_inert(implementation: Implementation, batch: TokenBatch) -> None:
    """A token with A = 0 has a gradient of exactly 0, and a batch of them a loss of 0."""
    result = implementation(batch.replace(advantages=np.zeros(batch.shape)))
    expect(result, "gradient", "equal", 0.0, because="A = 0 gives no gradient")
    expect(result, "loss", "equal", 0.0, because="A = 0 gives no loss")


@check(
    "P20",
    needs=[needs_objective, needs_local, needs_exact_gradient],
    cases=with_dtypes(lambda dtype: tokens(dtype=dtype, layouts=["full"])),
)
def check_rounding_error(implementation: Implementation, case: tuple[str, TokenBatch]) -> None:
    """In every dtype, value, weight and gradient are within C·u·cond of the 50-digit reference of the same inputs.

    bf16 log-probs and exp(log π) − exp(log μ) near on-policy lose every digit (OpenRLHF #634, slime #245). u is the unit
    roundoff of the arithmetic (float32 for bfloat16 inputs), cond the sum of the terms' magnitudes times their condition
    numbers in ℓ, C = 16 roundings; a bfloat16 gradient may be rounded once more.
    """
    dtype, batch = case
    result = implementation(batch, dtype=dtype)
    exact = reference_of(result)
    arithmetic = unit_roundoff("float32" if dtype == "bfloat16" else dtype)
    decided = exact.jump > JUMP * arithmetic
    tiny = 2.0**-120 if arithmetic > 1e-10 else 0.0  # where float32 underflows
    # a reduced loss multiplies the rounded per-token gradient by its cotangent, and rounds again
    last = (1.01 if implementation.reduction == "none" else 2.01) * unit_roundoff(dtype) if dtype == "bfloat16" else 0.0
    magnified = 1.0 if implementation.gradient == "analytic" else small_ratio(batch)
    expect(
        result,
        "gradient",
        "close",
        exact.gradient * result.coefficients,
        bound=result.coefficients
        * (ROUNDINGS * arithmetic * exact.gradient_scale * magnified + last * np.abs(exact.gradient) + tiny),
        where=decided,
        because=f"in {dtype} the gradient is within {ROUNDINGS:g} u cond",
    )
    if result.returned_weight is not None:
        expect(
            result,
            "weight",
            "close",
            exact.weight,
            bound=ROUNDINGS * arithmetic * exact.weight_scale,
            where=decided & (result.coefficients > 0.0),
            because=f"in {dtype} the weight is within {ROUNDINGS:g} u cond",
        )
    if _needs_loss_formula(implementation) is None:
        tokens_summed = 1.0 if implementation.reduction == "none" else float(batch.mask.size)
        _expect_loss(result, exact, ROUNDINGS * arithmetic * tokens_summed, decided, tiny=tiny, relative=True)


def _small_vocabularies(implementation: Implementation) -> SearchStrategy[Vocabulary]:
    states, size = implementation.shape or (None, None)
    return vocabularies(states=states, size=size)


@check("P23", needs=[needs_objective, needs_local], cases=_small_vocabularies)
def check_expected_gradient(implementation: Implementation, case: Vocabulary) -> None:
    """Over an enumerated vocabulary, the gradient expected under μ is that of the expected objective, in the logits of π.

    The right side is stated in π and μ without ratios (DRPO: −Σ A π + Σ abs(A)(π − μ)²/(2δ)), so a forgotten importance
    ratio, a k1 that is 0 in expectation or a forward KL in place of a reverse one can't agree (open-instruct #1269,
    NeMo-RL #3297, TRL #5619). Logit gradients sum to 0.
    """
    batch = case.batch()
    result = implementation(batch)
    pi, mu = np.exp(batch.log_prob), np.exp(batch.behavior_log_prob)
    exact = reference_of(result)
    limit = 10.0 * tolerance(implementation)
    for state in range(batch.shape[0]):
        if (exact.jump[state] < 1e-6).any() or not (
            implementation.exact_gradient or smooth(implementation.objective, batch)[state].all()
        ):
            continue
        per_token = result.gradient[state] / result.coefficients[state]
        weighted = mu[state] * per_token
        in_logits = weighted - weighted.sum() * pi[state]
        expected = oracle.expected_gradient(
            implementation.objective, batch.log_prob[state], batch.behavior_log_prob[state], batch.advantages[state]
        )
        scale = 1.0 + (mu[state] * exact.gradient_scale[state]).sum()
        because = f"the gradient expected under μ in state {state} is that of the expected objective"
        if not (np.abs(in_logits - expected) <= limit * scale).all() or not abs(in_logits.sum()) <= limit * scale:
            wanted = np.where(
                np.arange(batch.shape[0])[:, None] == state, exact.gradient * result.coefficients, result.gradient
            )
            expect(result, "gradient", "close", wanted, bound=limit * result.coefficients, because=because)
            expect(result, "gradient", "equal", np.nan, because=f"{because}: {in_logits.tolist()}, not {expected.tolist()}")


@check("P23", needs=[needs_objective, needs_local], cases=_small_vocabularies)
def check_ratio_has_expectation_one(implementation: Implementation, case: Vocabulary) -> None:
    """E_μ[r] = 1 over an enumerated vocabulary, for the ratio that the gradient −A r w implies.

    Ratios of a truncated or re-tempered sampler have expectation "kept mass" instead (TRL #6789, verl #6240).
    """
    batch = case.batch()
    result = implementation(batch)
    exact = reference_of(result)
    usable = (np.abs(exact.weight) > 1e-2) & (exact.jump > 1e-6)
    if not implementation.exact_gradient:
        usable &= smooth(implementation.objective, batch)
    with np.errstate(all="ignore"):
        ratio = -result.gradient / (batch.advantages * exact.weight * result.coefficients)
    mu = np.exp(batch.behavior_log_prob)
    mean = (mu * ratio).sum(axis=1)
    limit = 1e3 * tolerance(implementation)
    wrong = usable.all(axis=1) & ~(np.abs(mean - 1.0) <= limit)
    expected = np.where(wrong[:, None], exact.gradient * result.coefficients, result.gradient)
    bound = limit * result.coefficients * (np.abs(exact.gradient) + mu)
    if wrong.any():
        because = f"E_μ[r] is {mean[wrong].tolist()[0]!r} where the vocabulary is enumerated, not 1"
        expect(result, "gradient", "close", expected, bound=bound, because=because)
        expect(result, "gradient", "equal", np.nan, because=because)


def _expect_loss(
    result: Evaluation,
    exact: oracle.References,
    limit: float,
    decided: BoolArray,
    *,
    tiny: float = 0.0,
    relative: bool = False,
) -> None:
    """The loss is the reference's, per token or reduced; `relative`: to the terms' magnitudes alone."""
    floor = tiny if relative else limit
    because = "the loss is the objective's"
    if result.implementation.reduction == "none":
        bound = limit * exact.loss_scale + floor
        expect(result, "loss", "close", exact.loss, bound=bound, where=decided, because=because)
    elif decided.all():
        coefficients = result.coefficients
        bound = limit * (coefficients * exact.loss_scale).sum() + floor
        expect(result, "loss", "close", np.asarray((coefficients * exact.loss).sum()), bound=bound, because=because)
