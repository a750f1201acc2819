"""Make `provers` importable, and print the statements with their provers and times when the proofs are what was asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Attach each proof's statement, the first line of its docstring "prover: statement", to its report."""
    for item in items:
        document = getattr(getattr(item, "function", None), "__doc__", None)
        if HERE in item.path.parents and document:
            item.user_properties.append(("statement", document.strip().splitlines()[0]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line a proof."""
    if not any("proofs" in argument for argument in config.invocation_params.args):
        return
    terminalreporter.section("proofs")
    for report in terminalreporter.stats.get("passed", []):
        for _, statement in report.user_properties if report.when == "call" else ():
            terminalreporter.write_line(f"{report.duration:6.2f} s  {statement}  [{report.nodeid.rpartition('/')[2]}]")
