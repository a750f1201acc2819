"""How many lines of code modes, objectives and corrections are: without docstrings, comments and blank lines."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from statistics import median
from typing import TYPE_CHECKING, Any

import named_modes

from drpo_core import anchors, corrections, objectives, penalties

if TYPE_CHECKING:
    from types import ModuleType

_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of(source: str) -> int:
    """The lines of code of a piece of source."""
    text = textwrap.dedent(source)
    documented = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {number for token in tokens if token.type not in _NO_CODE for number in range(token.start[0], token.end[0] + 1)}
    return len(code - documented)


def table() -> list[str]:
    """Lines of Markdown, one a kind of part."""
    lines = ["| | how many | lines of code, median | least | most |", "|---|---|---|---|---|"]
    for name, counts in (
        ("a mode: the function that its name leads to", _modes()),
        ("a framework: all of its file, over the modes in it", _frameworks()),
        ("an objective: the class with its formulas", _classes(objectives, "weight")),
        ("a correction", _classes(corrections, "factor")),
        ("an anchor", _classes(anchors, "log_prob")),
        ("a penalty", _classes(penalties, "value_and_gradient")),
    ):
        lines.append(f"| {name} | {len(counts)} | {median(counts):.0f} | {min(counts):.0f} | {max(counts):.0f} |")
    return lines


def _modes() -> list[int]:
    found = []
    for row in named_modes.rows():
        module: Any = named_modes.module_of(row.framework)
        losses = getattr(module, "LOSSES", {row.name: getattr(module, "_clipped", None)})
        found.append(lines_of(inspect.getsource(losses[row.name])))
    return found


def _frameworks() -> list[float]:
    names = [row.framework for row in named_modes.rows()]
    return [
        lines_of(inspect.getsource(named_modes.module_of(framework))) / names.count(framework)
        for framework in named_modes.FRAMEWORKS
    ]


def _classes(room: ModuleType, method: str) -> list[int]:
    kinds = {kind for kind in (getattr(room, name) for name in room.__all__) if dataclasses.is_dataclass(kind)}
    return [lines_of(inspect.getsource(kind)) for kind in kinds if hasattr(kind, method)]
