"""Links that GitHub can't make: from a claim to its proof, its property and the source that it is about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import claims
from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx import addnodes

import drpo_core
from drpo_core.testing import CHECKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sphinx.application import Sphinx

ROOT = claims.DOCS.parent
LABEL = re.compile(r"[A-Z]\d+\.")
CLAIM = re.compile(r"(\w+):([A-Z]\d+)")
INNER = re.compile(r"drpo_core\.(?:advantages|diagnostics|reduction)\.(.+)")
SOURCES: set[Path] = set()


def link(app: Sphinx, doctree: nodes.document) -> None:
    """Make a page's citations links, and its claims and properties targets."""
    page = app.env.docname

    def reference(target: str, anchor: str, *children: nodes.Node, css: str = "proof") -> nodes.reference:
        uri = app.builder.get_relative_uri(page, target) + (f"#{anchor}" if anchor else "")
        return nodes.reference("", "", *children, internal=True, refuri=uri, classes=[css])

    for node in list(doctree.findall(nodes.literal)):
        found = (
            None
            if isinstance(node.parent, nodes.reference | addnodes.download_reference)
            else _destination(node.astext(), page)
        )
        if found is not None:
            target, anchor, css = found
            shown = nodes.Text(node.astext().partition(":")[2]) if css == "claim-link" else node.deepcopy()
            node.replace_self(reference(target, anchor, shown, css=css))
    for node in list(doctree.findall(addnodes.download_reference)):
        path = (Path(app.srcdir) / page).parent.joinpath(node["reftarget"]).resolve()
        if path.suffix == ".py" and path.is_relative_to(ROOT):
            node.replace_self(reference(_source(path), "", *(child.deepcopy() for child in node.children), css="source"))
    if page.startswith("derivations/"):
        _claims(doctree, reference)
    if page == "verify":
        _properties(doctree)
    # a page of source links back to every name of its file under one prefix, that of the first
    for signature in doctree.findall(addnodes.desc_signature):
        signature["ids"] += [f"drpo_core.{found[1]}" for anchor in signature["ids"] if (found := INNER.fullmatch(anchor))]


def _destination(text: str, page: str) -> tuple[str, str, str] | None:
    """Page, anchor and kind of what a piece of code names: a proof, a check, a claim, a public function, a file."""
    if text in claims.proofs():
        return _source(claims.PROOFS / text.partition("::")[0]), f"line-{claims.proofs()[text].line}", "proof"
    if text in CHECKS:
        return "reference/testing", f"drpo_core.testing.checks.{text}", "function"
    if page != "reference/claims" and not page.startswith("derivations/"):
        return None
    if text in drpo_core.__all__:
        return "reference/core", f"drpo_core.{text}", "function"
    if (ROOT / text).is_file() and text.endswith(".py"):
        return _source(ROOT / text), "", "source"
    claim = CLAIM.fullmatch(text)
    return claim and (f"derivations/{claim[1]}", claim[2].lower(), "claim-link")


def _claims(doctree: nodes.document, reference: Callable[..., nodes.reference]) -> None:
    for node in doctree.findall(nodes.strong):
        if LABEL.fullmatch(node.astext()):
            node.parent["ids"].append(node.astext()[:-1].lower())
            node.parent["classes"].append("claim")
    for text in list(doctree.findall(nodes.Text)):
        if isinstance(text.parent, nodes.paragraph) and claims.PROPERTY.search(text):
            pieces: list[nodes.Node] = []
            for i, piece in enumerate(claims.PROPERTY.split(text)):
                if i % 2:
                    pieces.append(reference("verify", f"p{piece}", nodes.Text(f"P{piece}"), css="property"))
                elif piece:
                    pieces.append(nodes.Text(piece))
            text.parent.replace(text, pieces)


def _properties(doctree: nodes.document) -> None:
    seen: set[str] = set()
    for entry in doctree.findall(nodes.entry):
        name = entry.astext()
        if re.fullmatch(r"P\d+", name) and name not in seen:
            seen.add(name)
            entry["ids"].append(name.lower())


def _source(path: Path) -> str:
    """The page that shows a file's source."""
    SOURCES.add(path)
    return "source/" + path.relative_to(ROOT).with_suffix("").as_posix()


def sources(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every cited source file as a page, its lines numbered and linkable."""
    SOURCES.update(claims.PROOFS / name.partition("::")[0] for name in claims.proofs())
    formatter = HtmlFormatter(linenos="inline", lineanchors="line", anchorlinenos=True, cssclass="highlight")
    for path in sorted(SOURCES):
        code = highlight(path.read_text(encoding="utf-8"), PythonLexer(), formatter)
        name = path.relative_to(ROOT).as_posix()
        yield _source(path), {"title": name, "body": f"<h1><code>{name}</code></h1>{code}"}, "page.html"
    del app


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("doctree-read", link, priority=900)
    app.connect("html-collect-pages", sources)
    return {"parallel_read_safe": False, "version": "1"}
