"""Run the examples of README.md and of docs: what a page prints is what the library returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sybil import Example, Region, Sybil
from sybil.evaluators.doctest import DocTestEvaluator
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract import DocTestStringParser
from sybil.parsers.myst import CodeBlockParser

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sybil import Document

# they import frameworks and Sphinx, which live in environments of their own: see noxfile.py; or are a package of their own
collect_ignore_glob = [
    "adapters/*/integrations/*.py",
    "docs/integrations/*.py",
    "docs/_ext/*.py",
    "docs/conf.py",
    "studies/study/*.py",
]

PYTHON = CodeBlockParser("python", PythonEvaluator())
PYCON = CodeBlockParser("pycon", PythonEvaluator())
SESSION = DocTestStringParser(DocTestEvaluator())


def page(document: Document) -> Iterable[Region]:
    """All ```python and ```pycon blocks of a page as one test: they share names, so no runner may split or shuffle them."""
    regions = list(PYTHON(document))
    for block in PYCON(document):
        for example in SESSION(block.parsed, document.path):
            example.adjust(block, block.parsed)
            regions.append(example)
    if regions:
        yield Region(0, len(document.text), sorted(regions, key=lambda region: region.start), run)


def run(whole: Example) -> None:
    """Evaluate a page's examples in order, in one namespace; the first failure names its line."""
    for region in whole.parsed:
        before = whole.document.text[: region.start]
        line, column = before.count("\n") + 1, region.start - before.rfind("\n")
        Example(whole.document, line, column, region, whole.namespace).evaluate()


pytest_collect_file = Sybil(parsers=[page], patterns=["README.md", "docs/*.md", "docs/**/*.md"]).pytest()
