"""What the derivations claim, and what checks each claim: read from the pages, the proofs and the verification kit."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import drpo_core
from drpo_core import objectives

DOCS = Path(__file__).parents[1]
PROOFS = DOCS.parent / "tests" / "proofs"
CITATION = re.compile(r"`(test_\w+\.py::test_\w+)`")
LABEL = re.compile(r"\*\*([A-Z]\d+)\.\*\*")
FILE = re.compile(r"\]\(\.\./\.\./(drpo_core/[\w/]+\.py)\)")
PROPERTY = re.compile(r"\bP(\d+)\b")


@dataclass(frozen=True)
class Proof:
    """A function of tests/proofs: where it is, who proves what, and what of the core it runs."""

    name: str
    line: int
    statement: str
    runs: tuple[str, ...]

    @property
    def prover(self) -> str:
        """The first word of the statement: z3, SymPy, iv, enumeration and so on."""
        return self.statement.partition(":")[0]


@dataclass(frozen=True)
class Claim:
    """A numbered claim of a page, with the proofs and the properties it cites."""

    page: str
    label: str
    text: str
    proofs: tuple[str, ...]
    properties: tuple[int, ...]
    files: tuple[str, ...]

    @property
    def implemented_by(self) -> tuple[str, ...]:
        """Public classes and functions that the proofs run; else the files of the core that the page is about."""
        names = dict.fromkeys(name for proof in self.proofs for run in proofs()[proof].runs for name in _public(run))
        return tuple(names) or self.files


@cache
def proofs() -> dict[str, Proof]:
    """All proofs, by the name that pages cite: ``test_drpo.py::test_gradient``."""
    found = {}
    for path in sorted(PROOFS.glob("test_*.py")):
        if path.name == "test_citations.py":  # the tests of the citations themselves
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        runs = _runs(tree)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                name = f"{path.name}::{node.name}"
                statement = (ast.get_docstring(node) or "").partition("\n")[0]
                found[name] = Proof(name, node.lineno, statement, runs[node.name])
    return found


def _runs(tree: ast.Module) -> dict[str, tuple[str, ...]]:
    """What of drpo_core each name of a file needs, itself or through other names of the file: ``DRPO``, ``k3_of``."""
    imported = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("drpo_core")
        for alias in node.names
    }
    needs = {
        defined: [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
        for node in tree.body
        for defined in _defined(node)
    }

    def closure(name: str, seen: dict[str, None]) -> dict[str, None]:
        if name not in seen:
            seen[name] = None
            for needed in needs.get(name, []):
                closure(needed, seen)
        return seen

    return {name: tuple(imported[needed] for needed in closure(name, {}) if needed in imported) for name in needs}


def _defined(node: ast.stmt) -> list[str]:
    """Names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]


def _public(name: str) -> list[str]:
    """The public names of what a proof runs: ``k3_of`` is the kernel of `k3`, and the table stands for every class."""
    if name == "OBJECTIVES":
        return list(dict.fromkeys(family.objective.__name__ for family in objectives.OBJECTIVES))
    return [candidate for candidate in (name, name.removesuffix("_of")) if candidate in drpo_core.__all__]


def claims(page: Path) -> list[Claim]:
    """The claims of a page, in order; a claim ends where the next, or a heading, begins."""
    text = page.read_text(encoding="utf-8")
    files = tuple(dict.fromkeys(FILE.findall(text)))
    parts = LABEL.split(text)
    found = []
    for label, rest in zip(parts[1::2], parts[2::2], strict=True):
        body, *_ = re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)
        numbers = tuple(dict.fromkeys(int(number) for number in PROPERTY.findall(body)))
        found.append(Claim(page.stem, label, body.strip(), tuple(dict.fromkeys(CITATION.findall(body))), numbers, files))
    return found


def pages() -> list[Path]:
    """The pages that make claims."""
    every = sorted((DOCS / "derivations").glob("*.md"))
    return [page for page in every if LABEL.search(page.read_text(encoding="utf-8"))]
