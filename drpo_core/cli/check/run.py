"""Chooses the checks and runs them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import numpy as np
from rich.console import Console
from rich.progress import Progress

from drpo_core.cli.check.wrapping import About
from drpo_core.cli.usage import UsageError, pairs
from drpo_core.testing.batch import literal
from drpo_core.testing.checks import CHECKS
from drpo_core.testing.implementation import Implementation
from drpo_core.testing.profiles import settings_for
from drpo_core.testing.runner import CheckResult, as_expected, run_check, select

__all__ = ["Chosen", "ok", "run"]

NIGHTLY = 10_000
"""Examples of a profile from which on it remembers failures in a database."""


@dataclass(frozen=True)
class Chosen:
    """The checks to run, which of them are known to fail and why, and the settings for an implementation of some cost."""

    checks: tuple[str, ...]
    expected: dict[str, str]
    settings: Callable[[float], Any]

    @staticmethod
    def parse(selected: list[str], expected: list[str], profile: str | None) -> "Chosen":
        """Parse the flags."""

        def settings(cost: float) -> Any:
            chosen = settings_for(profile, cost=cost)
            # only the nightly profile remembers: a command should leave no folder behind where it is run
            return chosen if chosen.max_examples >= NIGHTLY else hypothesis.settings(chosen, database=None)

        known = {_as_property(name): reason for name, reason in pairs("--expect-failure", expected).items()}
        names = [_as_property(name) for name in selected]
        try:
            settings(1.0)
            select(list(known))
            checks = tuple(info.name for info in select(names or None))
        except ValueError as error:
            flag, _, text = str(error).partition(": ")
            msg = f"{'--profile' if flag == 'profile' else '--property, --expect-failure'}: {text}"
            raise UsageError(msg) from error
        return Chosen(checks, known, settings)


def _as_property(name: str) -> str:
    return name.upper() if re.fullmatch(r"[pP]\d+", name) else name


def run(implementation: Implementation, about: About, chosen: Chosen) -> list[CheckResult]:
    """Run each check in turn, under a progress bar."""
    settings = chosen.settings(implementation.cost)
    console = Console(stderr=True)
    results: list[CheckResult] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking", total=len(chosen.checks))
        for name in chosen.checks:
            progress.update(task, description=name)
            about.last, about.error = {}, ""
            results.append(_completed(run_check(CHECKS[name], implementation, settings), implementation, about))
            progress.advance(task)
    return as_expected(results, chosen.expected)


def _completed(result: CheckResult, implementation: Implementation, about: About) -> CheckResult:
    """Add the user's own line if the loss raised, and a snippet where the kit has none."""
    if result.status != "failed" or result.snippet:
        return result
    return replace(result, reason=about.error or result.reason, snippet=_last_call_source(implementation, about))


def _last_call_source(implementation: Implementation, about: About) -> str:
    """Return Python source of the call that raised."""
    source = implementation.source
    if source is None or not about.error:
        return ""
    lines = ["import numpy as np", "", source.function, ""]
    arrays = [f"    {name!r}: {literal(v) if isinstance(v, np.ndarray) else repr(v)}," for name, v in about.last.items()]
    batch = ["batch = {", *arrays, "}"]
    return "\n".join([*lines, source.evaluate, "", *batch, "evaluate(function, **batch)"]) + "\n"


def ok(results: Sequence[CheckResult]) -> bool:
    """Return whether nothing failed, and nothing passed that was expected to fail."""
    return not any(result.status in ("failed", "unexpected pass") for result in results)
