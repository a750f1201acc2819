"""How a check is declared, and how it says what it saw."""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from hypothesis import strategies as st

from drpo_core.modes.mode import is_whole_mode
from drpo_core.objectives import DRPO, SPO
from drpo_core.testing import oracle, own
from drpo_core.testing.batch import TokenBatch, unit_roundoff
from drpo_core.testing.frameworks import STEP
from drpo_core.testing.implementation import describe
from drpo_core.testing.snippet import snippet
from drpo_core.testing.strategies import LAYOUTS, REGIMES, token_batches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypothesis.strategies import SearchStrategy

    from drpo_core.testing.batch import BoolArray, FloatArray
    from drpo_core.testing.implementation import Evaluation, Implementation

__all__ = ["CHECKS", "Check", "CheckInfo", "PropertyViolated", "Requirement", "check", "expect", "scores", "tokens"]

Check: TypeAlias = Callable[["Implementation", Any], None]
Requirement: TypeAlias = "Callable[[Implementation], str | None]"
"""Of an implementation: None if it qualifies, else the reason why a check does not apply."""

CHECKS: dict[str, CheckInfo] = {}
"""Every check by name, in the order of its property."""

scores: dict[str, float] = {}
"""By label, what the nightly profile maximises, as seen since last cleared: the largest error of a quantity in units of its
bound, and the closeness to the boundary of the trust region, −log₁₀ of the relative distance."""

# roundings on the longest path from log π to the gradient, with the last-place errors of exp and expm1
ROUNDINGS = 16.0
DIFFERENCE_ROUNDINGS = 1.5 * ROUNDINGS
"""Of a central difference of fourth order, in units of a value's over its step: (8 + 8 + 1 + 1)/12."""
JUMP = 64.0
"""Roundings from a jump within which either side of it is accepted."""


@dataclass(frozen=True)
class CheckInfo:
    """A check and what is declared about it."""

    function: Check
    property: str
    cases: Callable[[Implementation], SearchStrategy[Any]]
    needs: tuple[Requirement, ...]

    @builtins.property  # `property` is a field here
    def name(self) -> str:
        """Of the function."""
        return self.function.__name__

    @builtins.property
    def statement(self) -> str:
        """First line of its docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    def not_applicable(self, implementation: Implementation) -> str | None:
        """Why the check says nothing about an implementation; None if it applies."""
        return next((reason for need in self.needs if (reason := need(implementation)) is not None), None)


class PropertyViolated(AssertionError):  # noqa: N818 -- it names the fact, as a test's failure does
    """A check failed. The message ends with a snippet that reproduces it without the kit.

    Attributes
    ----------
    because : str
        What is wrong, in a line.
    snippet : str
        Python source that raises `AssertionError`; empty if the implementation has no source.
    evaluations : tuple of Evaluation
        What was evaluated.
    check : str
        Name of the check.
    property : str
        Such as ``"P1"``.
    """

    def __init__(self, because: str, evaluations: tuple[Evaluation, ...], source: str) -> None:
        super().__init__(because)
        self.because, self.evaluations, self.snippet = because, evaluations, source
        self.check = self.property = "?"

    def __str__(self) -> str:
        """Everything a user needs to see."""
        reproduce = f"\n\nTo reproduce:\n\n{self.snippet}" if self.snippet else ""
        return f"{self.property} {self.check}: {self.because}{reproduce}"


def check(
    number: str, *, cases: Callable[[Implementation], SearchStrategy[Any]] | None = None, needs: Sequence[Requirement] = ()
) -> Callable[[Check], Check]:
    """Register a function of (implementation, case) that raises `PropertyViolated`.

    Parameters
    ----------
    number
        The property it checks, ``"P1"`` to ``"P27"``.
    cases
        Strategy of the cases for an implementation; default: any batch of tokens.
    needs
        What an implementation must be for the check to apply.
    """

    def register(function: Check) -> Check:
        @functools.wraps(function)
        def named(implementation: Implementation, case: Any) -> None:
            __tracebackhide__ = True
            try:
                function(implementation, case)
            except PropertyViolated as violation:
                violation.check, violation.property = function.__name__, number
                raise

        CHECKS[function.__name__] = CheckInfo(named, number, cases or tokens(), tuple(needs))
        return named

    return register


def tokens(
    *,
    regimes: Sequence[str] = REGIMES,
    layouts: Sequence[str] = LAYOUTS,
    square: bool = False,
    dtype: str | None = None,
    max_ulp: int = 4,
    empty_rows: bool = False,
    objective: Callable[[Implementation], object] = lambda implementation: implementation.objective,
) -> Callable[[Implementation], SearchStrategy[TokenBatch]]:
    """Cases that are batches suited to an implementation: its dtype, shape, masks and range of ℓ.

    Every sequence has a valid token unless `empty_rows`, so that a division by zero is one finding, not ten.
    """

    def cases(implementation: Implementation) -> SearchStrategy[TokenBatch]:
        shape = implementation.shape
        if square and shape is not None:
            shape = (4, 4)
        chosen = regimes
        if not implementation.exact_gradient:
            chosen = [regime for regime in regimes if regime != "near_boundary"] or ["head"]
        batches = token_batches(
            objective(implementation),
            dtype=dtype or implementation.dtypes[0],
            shape=shape,
            square=square,
            regimes=chosen,
            layouts=layouts if implementation.takes_mask else ["full"],
            max_abs_log_ratio=implementation.max_abs_log_ratio,
            max_ulp=max_ulp,
            others=implementation.others,
            one_advantage=not implementation.local,
        )
        if not empty_rows:
            batches = batches.map(_with_a_token_in_every_row)
        if implementation.exact_gradient:
            return batches
        return batches.map(lambda batch: away_from_kinks(implementation.objective, batch))

    return cases


def _with_a_token_in_every_row(batch: TokenBatch) -> TokenBatch:
    mask = batch.mask.copy()
    mask[:, 0] |= ~mask.any(axis=1)
    return batch.replace(mask=mask)


def with_dtypes(make: Callable[[str], Callable[[Implementation], SearchStrategy[Any]]]) -> Callable[[Implementation], Any]:
    """Pairs (dtype, case) over the dtypes of an implementation."""
    return lambda implementation: st.one_of(
        [st.tuples(st.just(dtype), make(dtype)(implementation)) for dtype in implementation.dtypes]
    )


def away_from_kinks(objective: object, batch: TokenBatch, margin: float = 2.0**-7) -> TokenBatch:
    """The batch with π = μ where a step in log π could cross from one smooth piece of the loss to another."""
    x, b, a = batch.log_prob, batch.behavior_log_prob, batch.advantages
    return batch.replace(log_prob=np.where(smooth(objective, batch, margin), x, np.where(a == 0.0, x, b)))


def smooth(objective: object, batch: TokenBatch, margin: float = 2.0**-7) -> BoolArray:
    """Whether the loss is smooth within a margin in log π."""
    x, b, a = batch.log_prob, batch.behavior_log_prob, batch.advantages
    below, above = (oracle.piece(objective, x + step, b, a) for step in (-margin, margin))
    result: BoolArray = below == above
    return result


def expect(
    evaluations: Evaluation | Sequence[Evaluation],
    quantity: str,
    relation: str,
    expected: FloatArray | float = 0.0,
    *,
    because: str,
    bound: FloatArray | float = 0.0,
    where: BoolArray | bool = True,
) -> None:
    """Compare what was evaluated with what the property requires.

    Parameters
    ----------
    evaluations
        One, or several whose scalar losses add up.
    quantity
        ``"loss"``, ``"gradient"`` or ``"weight"``.
    relation
        ``"equal"``, ``"close"`` (within `bound`), ``"at most"``, ``"at least"`` (up to `bound`), ``"finite"`` or
        ``"NaN"``.
    expected
        Of the quantity's shape, or a number.
    because
        The property, for the message.
    bound
        Largest allowed difference.
    where
        Which elements count.

    Raises
    ------
    PropertyViolated
        If an element is not as expected, or is NaN.
    """
    __tracebackhide__ = True
    several = tuple(evaluations) if isinstance(evaluations, (list, tuple)) else (cast("Evaluation", evaluations),)
    if len(several) > 1:
        observed = np.asarray(sum(e.loss.sum() for e in several))
    else:
        observed = np.asarray(getattr(several[0], quantity))
    blurred = relation in ("close", "at most", "at least") and len(several) == 1
    bound = bound + blur(several[0], quantity) if blurred else bound
    observed, wanted, allowed, counts = np.broadcast_arrays(observed, expected, bound, where)
    with np.errstate(all="ignore"):
        satisfied = {
            "equal": lambda: observed == wanted,
            "close": lambda: (np.abs(observed - wanted) <= allowed) | (observed == wanted),
            "at most": lambda: observed <= wanted + allowed,
            "at least": lambda: observed >= wanted - allowed,
            "finite": lambda: np.isfinite(observed),
            "NaN": lambda: np.isnan(observed),
        }[relation]()
        if relation == "close" and counts.any():
            error = np.where(counts & (allowed > 0.0), np.abs(observed - wanted) / allowed, 0.0).max()
            label = f"error of {quantity} / bound"
            scores[label] = max(scores.get(label, 0.0), float(error) if np.isfinite(error) else 0.0)
    if (satisfied | ~counts).all():
        return
    first = tuple(int(i) for i in np.argwhere(~satisfied & counts)[0])
    place = f" at {first}" if first else ""
    against = {"finite": "", "NaN": ", expected NaN", "equal": ", expected ", "close": ", expected "}
    against_it = against.get(relation, f", expected {relation} ")
    value = "" if relation in ("finite", "NaN") else f"{float(wanted[first])!r}"
    within = f" within {float(allowed[first]):.3g}" if np.any(allowed) else ""
    if len(several) == 1 and first and several[0].batch.shape == observed.shape:
        batch = several[0].batch
        x, b, a = (float(array[first]) for array in (batch.log_prob, batch.behavior_log_prob, batch.advantages))
        place += f" (log π {x!r}, log μ {b!r}, A {a!r})"
    message = f"{because}: {quantity} is {float(observed[first])!r}{against_it}{value}{within}{place}"
    raise PropertyViolated(
        message,
        several,
        snippet(several, quantity, relation, np.array(wanted), np.array(allowed), np.array(counts), message),
    )


def exact_values(evaluation: Evaluation) -> oracle.References:
    """The values of the oracle, or of an unknown objective's own methods, at the tokens an evaluation counts."""
    batch, objective = evaluation.batch, evaluation.implementation.objective
    references = oracle.references if oracle.knows(objective) else own.references
    return references(
        objective,
        batch.log_prob,
        batch.behavior_log_prob,
        batch.advantages,
        evaluation.coefficients > 0.0,
    )


def blur(evaluation: Evaluation, quantity: str) -> FloatArray:
    """What rounding of the loss does to a gradient that is taken by its differences, or to a weight derived from one.

    A reduced loss is rounded to its own size, whichever token moves.
    """
    implementation, batch = evaluation.implementation, evaluation.batch
    if implementation.exact_gradient or quantity == "loss":
        return np.zeros(())
    with np.errstate(all="ignore"):
        ratio = np.exp(np.minimum(batch.log_ratio, oracle.SATURATION))
        unweighted = np.abs(batch.advantages) * ratio * evaluation.coefficients
        size = unweighted
        if oracle.knows(implementation.objective):
            exact = exact_values(evaluation)
            # log π + step is rounded as well
            size = evaluation.coefficients * (exact.loss_scale + np.abs(batch.log_prob) * exact.gradient_scale)
        rounding = DIFFERENCE_ROUNDINGS * unit_roundoff(evaluation.dtype) / STEP
        error = rounding * (size if implementation.reduction == "none" else size.sum())
        result: FloatArray = np.asarray(
            error if quantity == "gradient" else error / np.where(unweighted > 0.0, unweighted, np.nan)
        )
        return result


# What implementations must be, for a check to apply.


def needs_mask(implementation: Implementation) -> str | None:
    """It takes a mask."""
    return None if implementation.takes_mask else "takes no mask"


def needs_objective(implementation: Implementation) -> str | None:
    """It claims an objective that the oracle has a formula for."""
    if implementation.objective is None:
        return "claims no objective, so there is no formula to compare with"
    if is_whole_mode(implementation.objective):
        return "about objectives; P25 to P27 are about modes"
    known = oracle.knows(implementation.objective)
    return None if known else f"the oracle has no formula for {describe(implementation.objective)}"


def needs_formula(implementation: Implementation) -> str | None:
    """It claims an objective that the oracle has a formula for, or whose own methods take a token."""
    reason = needs_objective(implementation)
    objective = implementation.objective
    return None if objective is not None and not is_whole_mode(objective) and own.evaluates(objective) else reason


def needs_exact_gradient(implementation: Implementation) -> str | None:
    """Its gradient is not a finite difference."""
    return None if implementation.exact_gradient else "its gradient is a finite difference, too coarse for this"


def needs_local(implementation: Implementation) -> str | None:
    """Its tokens don't influence each other."""
    return None if implementation.local else "declared not local: a token's gradient may depend on its sequence"


def needs_ratio_form(implementation: Implementation) -> str | None:
    """Its gradient is the derivative of its value."""
    return None if implementation.form == "ratio" else "score form: its gradient is not the derivative of its value"


def needs_family(implementation: Implementation) -> str | None:
    """It can be built for other objectives."""
    return None if implementation.family is not None else "implements fixed thresholds (no family), and this relates several"


def needs_divergences(implementation: Implementation) -> str | None:
    """It has divergences."""
    return None if implementation.divergences else "declares no divergences"


def needs_instance(*types: type, unless_capped: bool = False) -> Requirement:
    """It claims one of some objectives; optionally without a cap on the ratio."""
    names = ", ".join(t.__name__ for t in types)

    def need(implementation: Implementation) -> str | None:
        objective = implementation.objective
        if not isinstance(objective, types):
            return f"only about {names}"
        capped = getattr(objective, "max_ratio", None) or getattr(objective, "dual_clip", None)
        return "its weight is also capped by the ratio" if unless_capped and capped is not None else None

    return need


def tolerance(implementation: Implementation) -> float:
    """Relative tolerance in float64, which is also the absolute one."""
    roundoff = unit_roundoff(implementation.dtypes[0])
    return max(1e-9 if implementation.exact_gradient else 1e-6, 256.0 * roundoff)


def needs_analytic_gradient(implementation: Implementation) -> str | None:
    """Its gradient is its own formula, or it returns a weight."""
    return None if implementation.gradient == "analytic" else "its gradient is not analytic: cancellation hides the last bits"


def slack(evaluation: Evaluation) -> FloatArray:
    """What rounding may do to a weight of 1: 4 ulp if it was returned, more if derived from the gradient."""
    roundoff, batch = unit_roundoff(evaluation.dtype), evaluation.batch
    if evaluation.returned_weight is not None:
        return np.full(batch.shape, 8.0 * roundoff)
    if evaluation.implementation.gradient == "analytic":
        return np.full(batch.shape, 64.0 * roundoff)
    relative = 64.0 * roundoff if evaluation.implementation.exact_gradient else 1e-6
    result: FloatArray = relative * small_ratio(batch)
    return result


def small_ratio(batch: TokenBatch) -> FloatArray:
    """max(1, 1/r): what an error of u abs(A) in the gradient is relative to abs(A) r."""
    result: FloatArray = np.exp(np.maximum(-batch.log_ratio, 0.0))
    return result


def bounds_of(objective: object, advantages: FloatArray) -> FloatArray:
    """The threshold that governs each token."""
    region = oracle.thresholds(objective)
    if region is None:
        msg = f"{objective!r} has no threshold"
        raise TypeError(msg)
    return np.where(advantages < 0.0, *region)


def is_smooth(objective: object) -> bool:
    """Whether the weight is continuous, so that its sign, not its vanishing, marks the boundary."""
    return isinstance(objective, (DRPO, SPO))
