"""Running the checks: a report for a person, parametrised tests for pytest."""

from __future__ import annotations

import importlib
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import hypothesis
from hypothesis import given

from drpo_core.testing import profiles
from drpo_core.testing.checks import CHECKS, CheckInfo, PropertyViolated
from drpo_core.testing.checks._base import scores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from drpo_core.testing.implementation import Implementation

__all__ = ["CheckResult", "Report", "check_implementation", "parametrize_with_checks", "run_check"]

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"
EXPECTED_FAILURE, UNEXPECTED_PASS = "expected failure", "unexpected pass"


@dataclass(frozen=True)
class CheckResult:
    """What one check found.

    Parameters
    ----------
    check, property, statement
        Its name, ``"P1"`` to ``"P27"``, and what it states.
    status
        ``"passed"``, ``"failed"``, ``"not applicable"``, ``"expected failure"`` or ``"unexpected pass"``.
    reason
        Why it failed or does not apply; empty if it passed.
    counterexample
        The smallest case found that fails, as an expression; empty otherwise.
    snippet
        Source that reproduces the failure without the kit; empty otherwise.
    """

    check: str
    property: str
    statement: str
    status: str
    reason: str = ""
    counterexample: str = ""
    snippet: str = ""


@dataclass(frozen=True)
class Report:
    """What the checks found about one implementation."""

    implementation: Implementation
    results: tuple[CheckResult, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed and nothing passed that was expected to fail."""
        return not any(result.status in (FAILED, UNEXPECTED_PASS) for result in self.results)

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        """The failures."""
        return tuple(result for result in self.results if result.status == FAILED)

    def __str__(self) -> str:
        """A line a check, then each failure with its snippet."""
        width = max(len(result.check) for result in self.results)
        lines = [f"{self.implementation.name}"]
        for result in self.results:
            reason = f"  {result.reason}" if result.reason else ""
            lines.append(f"  {result.property:>3}  {result.check:<{width}}  {result.status}{reason}")
        counts = Counter(result.status for result in self.results)
        lines.append(", ".join(f"{number} {status}" for status, number in counts.items()))
        for result in self.failed:
            lines += ["", f"--- {result.property} {result.check}: {result.statement}", result.reason, "", result.snippet]
        return "\n".join(lines)


def run_check(
    info: CheckInfo,
    implementation: Implementation,
    settings: hypothesis.settings | str | None = None,
    *,
    examples: Sequence[Any] = (),
) -> CheckResult:
    """Search for a counterexample to one check and return what was found.

    Parameters
    ----------
    info
        From `CHECKS`.
    implementation
        What to check.
    settings
        Hypothesis settings or the name of a profile; see `drpo_core.testing.profiles`.
    examples
        Cases to try before others.

    Returns
    -------
    CheckResult
        Never raises for a failing implementation, whatever it raises itself.
    """
    described = (info.name, info.property, info.statement)
    reason = info.not_applicable(implementation)
    if reason is not None:
        return CheckResult(*described, NOT_APPLICABLE, reason)
    last: list[Any] = []
    try:
        _search(info, implementation, settings, examples, last)
    except PropertyViolated as violation:
        return CheckResult(*described, FAILED, violation.because, repr(last[-1]), violation.snippet)
    except Exception as error:  # noqa: BLE001 -- the function under test may raise anything; that is a finding
        where = traceback.extract_tb(error.__traceback__)[-1]
        why = f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]} ({where.name}, line {where.lineno})"
        return CheckResult(*described, FAILED, why, repr(last[-1]) if last else "")
    return CheckResult(*described, PASSED)


def check_implementation(
    implementation: Implementation,
    *,
    checks: Sequence[str] | None = None,
    settings: hypothesis.settings | str | None = None,
    expected_failures: Mapping[str, str] | None = None,
    examples: Mapping[str, Sequence[Any]] | None = None,
) -> Report:
    """Run every check on an implementation.

    Parameters
    ----------
    implementation
        From `from_function` or `from_core`.
    checks
        Names of checks or properties (``"P7"``); default: all.
    settings
        Hypothesis settings or the name of a profile (``"dev"``, ``"ci"``, ``"nightly"``); default: the environment
        variable ``DRPO_PROFILE``, else ``"dev"``.
    expected_failures
        Check or property → why it is known to fail. A check that passes, or a property of which every check passes, makes
        the report not ok.
    examples
        Check or property → cases to try before others, such as the counterexamples of the past.

    Returns
    -------
    Report
        Print it, or read its `results`.

    Raises
    ------
    ValueError
        If a name is not that of a check or a property.

    Examples
    --------
    >>> from drpo_core import DRPO
    >>> from drpo_core.testing import check_implementation, from_core
    >>> report = check_implementation(from_core(DRPO(delta=0.25)), checks=["P1", "P9"])
    >>> report.ok
    True
    """
    known, pinned = expected_failures or {}, examples or {}
    _refuse_unknown([*known, *pinned])
    results = [run_check(info, implementation, settings, examples=_about(info, pinned)) for info in select(checks)]
    return Report(implementation, tuple(as_expected(results, known)))


def as_expected(results: Sequence[CheckResult], expected: Mapping[str, str]) -> list[CheckResult]:
    """The results, given which checks and properties are expected to fail; of a property, at least one check must."""
    failing = {name for r in results if r.status == FAILED for name in (r.check, r.property)}

    def judged(result: CheckResult) -> CheckResult:
        key = result.check if result.check in expected else result.property
        if key in expected and result.status == FAILED:
            return replace(result, status=EXPECTED_FAILURE, reason=expected[key])
        if key in expected and result.status == PASSED and key not in failing:
            return replace(result, status=UNEXPECTED_PASS, reason=f"expected to fail: {expected[key]}")
        return result

    return [judged(result) for result in results]


def parametrize_with_checks(
    implementations: Sequence[Implementation],
    *,
    checks: Sequence[str] | None = None,
    settings: hypothesis.settings | str | None = None,
    expected_failures: Mapping[str, str] | None = None,
    examples: Mapping[str, Sequence[Any]] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn a test with one argument, `check`, into a test for every implementation and check.

    Parameters
    ----------
    implementations
        From `from_function` or `from_core`.
    checks
        Names of checks or properties; default: all.
    settings
        As for `check_implementation`.
    expected_failures
        Name of a check, a property or a test id (``"my_loss-check_…"``) → why it is known to fail. A check or test that
        passes is an error; of a property, which may have several checks, some may pass.
    examples
        Name of a check, a property or a test id → cases to try before others, such as the counterexamples of the past.

    Returns
    -------
    decorator
        Like ``pytest.mark.parametrize``. What does not apply is skipped with its reason.

    Raises
    ------
    ValueError
        If a name is not that of a check or a property.

    Examples
    --------
    A user's own test file, complete:

    >>> from drpo_core import DPPO
    >>> from drpo_core.testing import from_core, parametrize_with_checks
    >>> @parametrize_with_checks([from_core(DPPO(delta=0.25))])
    ... def test_my_loss(check):
    ...     check()
    """
    # pytest is the caller's: the extra `testing` does not bring it
    pytest = importlib.import_module("pytest")
    known, pinned = expected_failures or {}, examples or {}
    ids = {f"{implementation}-{name}" for implementation in implementations for name in CHECKS}
    _refuse_unknown([name for name in (*known, *pinned) if name not in ids])
    parameters = []
    for implementation in implementations:
        for info in select(checks):
            test_id = f"{implementation}-{info.name}"
            marks = []
            reason = info.not_applicable(implementation)
            expected = known.get(test_id, known.get(info.name, known.get(info.property)))
            if reason is not None:
                # a skip for good, decided by what the implementation declares. Not left out: a property that was not
                # checked must not look like one that passed
                marks.append(pytest.mark.skip(reason=f"not applicable: {reason}"))
            elif expected is not None:
                marks.append(pytest.mark.xfail(reason=expected, strict=test_id in known or info.name in known))
            cases = [*_about(info, pinned), *pinned.get(test_id, ())]
            parameters.append(pytest.param(_bound(info, implementation, settings, cases), id=test_id, marks=marks))
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]] = pytest.mark.parametrize("check", parameters)
    return decorator


def select(names: Sequence[str] | None) -> list[CheckInfo]:
    """The checks of some names or properties, all by default."""
    if names is None:
        return list(CHECKS.values())
    _refuse_unknown(names)
    return [info for info in CHECKS.values() if info.name in names or info.property in names]


def _about(info: CheckInfo, pinned: Mapping[str, Sequence[Any]]) -> list[Any]:
    """The examples for a check."""
    return [*pinned.get(info.property, ()), *pinned.get(info.name, ())]


def _bound(
    info: CheckInfo, implementation: Implementation, settings: hypothesis.settings | str | None, examples: Sequence[Any]
) -> Callable[[], None]:
    def check() -> None:
        __tracebackhide__ = True
        _search(info, implementation, settings, examples, [])

    return check


def _search(
    info: CheckInfo,
    implementation: Implementation,
    settings: hypothesis.settings | str | None,
    examples: Sequence[Any],
    last: list[Any],
) -> None:
    """Let Hypothesis look for a case that fails; the exception that leaves is that of the smallest."""
    chosen = profiles.settings_for(settings, cost=implementation.cost)
    aiming = hypothesis.Phase.target in chosen.phases

    def property_holds(case: Any) -> None:
        __tracebackhide__ = True
        last[:] = [case]
        scores.clear()
        info.function(implementation, case)
        if aiming:
            for label, score in scores.items():
                hypothesis.target(score, label=label)

    # otherwise all checks would share one entry of the example database
    property_holds._hypothesis_internal_add_digest = f"{info.name} {implementation.name}".encode()  # type: ignore[attr-defined]  # noqa: SLF001
    searched = given(info.cases(implementation))(property_holds)
    for case in reversed(examples):
        searched = hypothesis.example(case)(searched)
    hypothesis.settings(chosen)(searched)()


def _refuse_unknown(names: Sequence[str]) -> None:
    valid = set(CHECKS) | {info.property for info in CHECKS.values()}
    unknown = sorted(set(names) - valid)
    if unknown:
        msg = f"checks: expected names of checks or properties (P1 to P27), got {', '.join(unknown)}"
        raise ValueError(msg)
