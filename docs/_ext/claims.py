"""What the derivations claim, and what checks each claim: read from the pages, the proofs and the verification kit."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import drpo_core

DOCS = Path(__file__).parents[1]
PROOFS = DOCS.parent / "tests" / "proofs"
CITATION = re.compile(r"`(test_\w+\.py::test_\w+)`")
LABEL = re.compile(r"\*\*([A-Z]\d+)\.\*\*")
FILE = re.compile(r"\]\(\.\./\.\./(drpo_core/\w+\.py)\)")
PROPERTY = re.compile(r"\bP(\d+)\b")


@dataclass(frozen=True)
class Proof:
    """A function of tests/proofs: where it is, who proves what, and which modules of the core it runs."""

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
        """Public functions whose kernels the proofs run; else the files of the core that the page is about."""
        names = dict.fromkeys(name for proof in self.proofs for kernel in proofs()[proof].runs for name in _public(kernel))
        return tuple(names) or self.files


@cache
def proofs() -> dict[str, Proof]:
    """All proofs, by the name that pages cite: ``test_drpo.py::test_gradient``."""
    found = {}
    for path in sorted(PROOFS.glob("test_*.py")):
        if path.name == "test_citations.py":  # the tests of the citations themselves
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = _imports(tree)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                name = f"{path.name}::{node.name}"
                statement = (ast.get_docstring(node) or "").partition("\n")[0]
                found[name] = Proof(name, node.lineno, statement, _runs(node, imported))
    return found


def _imports(tree: ast.Module) -> dict[str, str]:
    """Names that a file of proofs has from drpo_core, with where they come from."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("drpo_core")
        for alias in node.names
    }


def _runs(node: ast.FunctionDef, imported: dict[str, str]) -> tuple[str, ...]:
    """What of drpo_core the function names: ``drpo.weight``, ``divergence.k3_of``, ``dppo``."""
    used = {}
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in imported:
            used[f"{imported[part.value.id]}.{part.attr}"] = None
        elif isinstance(part, ast.Name) and part.id in imported:
            used[imported[part.id]] = None
    return tuple(name.removeprefix("drpo_core.") for name in used)


def _public(kernel: str) -> list[str]:
    """The public names of a kernel: ``drpo.mask_weight`` is mask_drpo_weight's, ``divergence.k3_of`` is k3's."""
    module, _, name = kernel.partition(".")
    family = {"ppo": "ppo_clip"}.get(module, module)
    candidates = (
        name,
        name.removesuffix("_of"),
        f"mask_{family}_{name[5:]}" if name.startswith("mask_") else f"{family}_{name}",
    )
    return [candidate for candidate in candidates if candidate in drpo_core.__all__]


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
