"""The results of `drpo check` as text and as JSON."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from drpo_core import __version__
from drpo_core.cli.check.run import ok
from drpo_core.cli.check.wrapping import About
from drpo_core.testing.implementation import Implementation, describe
from drpo_core.testing.runner import CheckResult

__all__ = ["as_dict", "show"]

STATUSES = ("passed", "failed", "not applicable", "expected failure", "unexpected pass")
STYLES = dict(zip(STATUSES, ("green", "bold red", "dim", "yellow", "bold red"), strict=True))


def as_dict(target: str, implementation: Implementation, about: About, results: Sequence[CheckResult]) -> dict[str, Any]:
    """Return the report in the types of JSON."""
    counts = Counter(result.status for result in results)
    return {
        "version": 1,
        "drpo_core": __version__,
        "target": target,
        "declared": {
            "framework": about.framework,
            "objective": None if implementation.objective is None else describe(implementation.objective),
            "form": implementation.form,
            "reduction": implementation.reduction,
            "dtypes": list(implementation.dtypes),
            # JSON has no infinity
            "max_log_ratio": implementation.max_abs_log_ratio if np.isfinite(implementation.max_abs_log_ratio) else None,
            "keeps_boundary": implementation.keeps_boundary,
            "local": implementation.local,
            "takes_mask": implementation.takes_mask,
            "takes_normalizer": implementation.takes_normalizer,
            "takes_segment_ids": implementation.takes_packed,
        },
        "ok": ok(results),
        "counts": {status: counts[status] for status in STATUSES},
        "results": [
            {
                name: getattr(result, name)
                for name in ("property", "check", "statement", "status", "reason", "counterexample", "snippet")
            }
            for result in results
        ],
    }


def show(target: str, implementation: Implementation, about: About, results: Sequence[CheckResult], *, snippets: bool) -> None:
    """Print the report."""
    console = Console(highlight=False)

    def line(*parts: str | tuple[str, str]) -> None:
        # soft_wrap: a report that is piped or copied must not gain line breaks
        console.print(Text.assemble(*parts), soft_wrap=True)

    claim = "no objective" if implementation.objective is None else describe(implementation.objective)
    framework = f"{about.framework}, " if about.framework else ""
    line((target, "bold"), f": {framework}{claim}, {implementation.form} form, reduction {implementation.reduction}")
    line()
    width = max(len(result.check) for result in results)
    for result in results:
        why = f": {result.reason}" if result.reason and result.status != "failed" else ""
        line(f"{result.property:<3}  {result.check:<{width}}  ", (result.status, STYLES[result.status]), (why, "dim"))
    for result in (result for result in results if result.status == "failed"):
        line()
        line((f"{result.property} {result.check}", "bold red"))
        line(f"  states:         {result.statement}")
        line(f"  found:          {result.reason}")
        if result.counterexample:
            line(f"  counterexample: {result.counterexample}")
        if snippets and result.snippet:
            line()
            line(f"# reproduces {result.property} {result.check}")
            line(result.snippet.rstrip())
            line(f"# end of {result.check}")
    line()
    if implementation.objective is None:
        line(("no objective was declared: only properties of any policy loss were checked", "dim"))
    failures = [result.reason for result in results if result.status == "failed"]
    if len(failures) > 1 and len(set(failures)) == 1 and failures[0].startswith("raised"):
        line(
            f"every failure is one and the same error: is {about.framework} the framework, and is each argument what it takes?"
        )
    counts = Counter(result.status for result in results)
    line(", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status] or status in STATUSES[:3]))
