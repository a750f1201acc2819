"""Mathematics rendered by KaTeX while the site is built, so that a page needs neither internet nor JavaScript for it."""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

LOG = logging.getLogger(__name__)
KATEX = Path(__file__).parents[2] / "build" / "katex" / "node_modules" / "katex" / "dist"


@cache
def _server() -> subprocess.Popen[str]:
    node = shutil.which("node")
    if node is None:
        msg = "Node.js is not installed (Debian: apt-get install nodejs npm)"
        raise ExtensionError(msg)
    command = [node, str(Path(__file__).with_name("mathematics.js")), str(KATEX / "katex.min.js")]
    # it ends with its standard input, however this process ends
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # noqa: S603


@cache
def render(tex: str, *, display: bool) -> dict[str, str]:
    """``{"html": …}``, or ``{"error": …}`` if KaTeX can't."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps({"tex": tex, "display": display}) + "\n")
    server.stdin.flush()
    return dict(json.loads(server.stdout.readline()))


def _visit(translator: HTML5Translator, node: nodes.math | nodes.math_block, *, display: bool) -> None:
    answer = render(node.astext(), display=display)
    if "error" in answer:
        LOG.warning("%s", answer["error"], location=node)
    html = answer.get("html", node.astext())
    translator.body.append(f'<div class="math">{html}</div>' if display else f'<span class="math">{html}</span>')
    raise nodes.SkipNode


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    """In a line of text."""
    _visit(translator, node, display=False)


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """In a paragraph of its own."""
    _visit(translator, node, display=True)


def finish(app: Sphinx, error: Exception | None) -> None:
    """Stop the server; put KaTeX's style sheet and fonts beside the pages, unless an error left none."""
    if _server.cache_info().currsize:
        _server().communicate()
        _server.cache_clear()
    if app.builder.format == "html" and error is None:
        target = Path(app.outdir) / "_static"
        shutil.copy(KATEX / "katex.min.css", target)
        shutil.copytree(
            KATEX / "fonts", target / "fonts", ignore=shutil.ignore_patterns("*.ttf", "*.woff"), dirs_exist_ok=True
        )


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_html_math_renderer("katex", (visit_inline, None), (visit_block, None))
    app.add_css_file("katex.min.css")
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "version": "1"}
