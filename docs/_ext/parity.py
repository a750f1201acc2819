"""What comparing named modes with the frameworks' own functions found: docs/data/parity, which nox -s parity writes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import named_modes

DATA = Path(__file__).parents[1] / "data" / "parity"


@cache
def results() -> dict[str, dict[str, Any]]:
    """What was found, by framework."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(DATA.glob("*.json"))}


@cache
def found() -> dict[tuple[str, str], dict[str, Any]]:
    """What was found, by framework and name of a mode."""
    return {(framework, each["name"]): each for framework, result in results().items() for each in result["modes"]}


def table() -> list[str]:
    """Lines of Markdown, one a mode that a framework names, compared or not."""
    head = ("framework", "mode", "compared", "settings", "cases", "loss", "gradient", "empty sequence")
    lines = _head(head)
    for row in named_modes.rows():
        each = found().get((row.framework, row.name))
        measured = ("not compared", *["–"] * 5) if each is None else _cells(each)
        # a formula is of no release
        release = f" {results()[row.framework]['release']}" if measured[0] == "ran" else ""
        lines.append("| " + " | ".join((_linked(row.framework) + release, f"`{row.call}`", *measured)) + " |")
    return lines


def summary() -> str:
    """How many modes were compared, and how."""
    compared = [each["compared"] for each in found().values()]
    cases = sum(each["cases"] for each in found().values())
    return (
        f"Of {len(list(named_modes.rows()))} modes {compared.count('ran')} were compared with the framework's function, "
        f"{compared.count('formula')} with a formula, in {cases:,} cases."
    )


def functions() -> list[str]:
    """Lines of Markdown, one a framework: what of it ran, and where."""
    lines = _head(("framework", "what is run", "with", "placeholders for"))
    for framework, result in results().items():
        packages = ", ".join(f"{name} {number}" for name, number in result["packages"].items())
        placeholders = ", ".join(f"`{name}`" for name in result["placeholders"]) or "–"
        lines.append(f"| {_linked(framework)} {result['release']} | {result['function']} | {packages} | {placeholders} |")
    return lines


def _linked(framework: str) -> str:
    return f"{{py:func}}`~drpo_core.modes.{framework}`"


def _head(names: tuple[str, ...]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (names, ("---",) * len(names))]


def _cells(each: dict[str, Any]) -> tuple[str, ...]:
    numbers = ("own value" if number is None else f"{number:.0e}" for number in (each["loss"], each["gradient"]))
    return each["compared"], str(each["settings"]), str(each["cases"]), *numbers, " or ".join(each["empty"])
