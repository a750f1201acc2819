"""What the pages show of the modes that frameworks name, made from the functions of `drpo_core.modes` and their docstrings."""

from __future__ import annotations

import inspect
import re
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from drpo_core import modes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import ModuleType

    from drpo_core.modes import Mode

FRAMEWORKS: tuple[str, ...] = tuple(name for name in modes.__all__ if inspect.isfunction(getattr(modes, name)))
"""The functions, one a framework, in the order of their names."""

_NEEDED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("verl", "dro"): {"dro_beta": 0.1},
    ("tinker", "dro"): {"beta": 0.1},
    ("skyrl", "kl_cov"): {"loss_reduction": None},
    ("ms_swift", "fipo"): {"delta": 4.0},
    ("nemo_rl", "sequence_level_importance_ratios"): {"token_level_loss": False},
}
"""Keys without a default that a name can do nothing without."""


class Row(NamedTuple):
    """A mode: the framework's function, its name or key, what it is called with, the value, and what differs."""

    framework: str
    name: str
    names: tuple[str, ...]
    keys: Mapping[str, Any]
    call: str
    mode: Mode
    differs: str


def module_of(framework: str) -> ModuleType:
    """The module of a framework's function."""
    return import_module(f"drpo_core.modes._{framework}")


def rows() -> Iterator[Row]:
    """The rows of all frameworks' tables, one a name."""
    for framework in FRAMEWORKS:
        for cell, differs in _documented(framework):
            for name in re.findall(r"``(.+?)``", cell) or ["none"]:
                yield _row(framework, name, differs)


def title(framework: str) -> str:
    """Which version it is, from the first line of the module's docstring."""
    return (inspect.getdoc(module_of(framework)) or "").partition("\n")[0].rstrip(".")


def table() -> list[str]:
    """Lines of Markdown."""
    head = ("framework", "call", "the value, at the framework's defaults", "what differs from the paper, or from ours")
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head))]
    for row in rows():
        value = f"`{row.mode!r}`".replace("|", r"\|")
        cells = (f"{{py:func}}`~drpo_core.modes.{row.framework}`", f"`{row.call}`", value, _markdown(row.differs) or "–")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def functions() -> list[str]:
    """Lines of Markdown: the reference of the functions."""
    documented = [f".. autofunction:: drpo_core.modes.{name}\n" for name in FRAMEWORKS]
    return ["```{eval-rst}", *documented, "```"]


def _row(framework: str, name: str, differs: str) -> Row:
    function = getattr(modes, framework)
    keys = dict(_NEEDED.get((framework, name), {}))
    names: tuple[str, ...] = (name,)
    if framework == "nemo_rl":
        # it has one loss, and keys say which
        names, keys = (), ({} if name == "none" else {name: True}) | keys
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mode = function(*names, **keys)
    given = (*map(repr, names), *(f"{key}={value!r}" for key, value in keys.items()))
    return Row(framework, name, names, keys, f"modes.{framework}({', '.join(given)})".replace("'", '"'), mode, differs)


def _documented(framework: str) -> Iterator[tuple[str, str]]:
    """First and last cell of each row of the table in a function's docstring."""
    lines = (inspect.getdoc(getattr(modes, framework)) or "").splitlines()
    rules = [number for number, line in enumerate(lines) if re.fullmatch(r"=+( +=+)+", line)]
    first, last = (match.span() for match in list(re.finditer("=+", lines[rules[0]]))[:: len(lines[rules[0]].split()) - 1])
    cells: list[tuple[str, str]] = []
    for line in lines[rules[1] + 1 : rules[2]]:
        name, differs = line[slice(*first)].strip(), line[last[0] :].strip()
        if name:
            cells.append((name, differs))
        else:
            cells[-1] = (cells[-1][0], f"{cells[-1][1]} {differs}".strip())
    return iter(cells)


def _markdown(text: str) -> str:
    return text.replace("``", "`").replace("|", r"\|")
