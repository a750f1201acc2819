"""Directives: what the library draws or tabulates while the site is built."""

from __future__ import annotations

from importlib.resources import as_file
from typing import TYPE_CHECKING, Any

import claims
import families
import figures
import named_modes
import parity
import sizes
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from drpo_core.audit import BUNDLED, open_rollouts
from drpo_core.audit.explorer import explorer_data
from drpo_core.audit.page import explorer_html

if TYPE_CHECKING:
    from sphinx.application import Sphinx


class Drawn(SphinxDirective):
    """``{drawn} name``: what the function `name` of figures.py returns, as HTML; the body says what it shows."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Draw."""
        self.env.note_reread()
        html = getattr(figures, self.arguments[0])()
        figure = nodes.container(classes=["drawn-figure"])
        figure += nodes.raw("", html, format="html")
        self.state.nested_parse(self.content, self.content_offset, figure)
        return [figure]


class Explorer(SphinxDirective):
    """``{explorer}``: the trust region with sliders, over the rollouts that ship with the package."""

    def run(self) -> list[nodes.Node]:
        """Compute and embed."""
        self.env.note_reread()
        with as_file(BUNDLED) as path:
            data = explorer_data(open_rollouts(path))
        return [nodes.raw("", explorer_html(data), format="html")]


class Claims(SphinxDirective):
    """``{claims}``: every numbered claim of the derivations, with what proves it and what code that proof runs."""

    def run(self) -> list[nodes.Node]:
        """Tabulate."""
        self.env.note_reread()
        lines = ["| claim | proved by | properties | implemented by |", "|---|---|---|---|"]
        for page in claims.pages():
            for claim in claims.claims(page):
                proofs = [claims.proofs()[name] for name in claim.proofs]
                cells = (
                    f"`{claim.page}:{claim.label}`",
                    " · ".join(f"`{proof.name}` ({proof.prover})" for proof in proofs),
                    " ".join(f"P{number}" for number in claim.properties) or "–",
                    " ".join(f"`{name}`" for name in claim.implemented_by),
                )
                lines.append("| " + " | ".join(cells) + " |")
        return [nodes.container("", *self.parse_text_to_nodes("\n".join(lines)), classes=["claims"])]


class Objectives(SphinxDirective):
    """``{objectives}``: every family of objectives as a table; ``{objectives} classes``: the reference of their classes."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Tabulate, or document."""
        self.env.note_reread()
        lines = families.table()
        if self.arguments:
            documented = [f".. autoclass:: {name}\n   :members:\n   :inherited-members:\n" for name in families.classes()]
            lines = ["```{eval-rst}", *documented, "```"]
        return self.parse_text_to_nodes("\n".join(lines))


class NamedModes(SphinxDirective):
    """``{named-modes}``: every mode that a framework names as a table, or their reference, or what was found of them.

    The argument is one of ``functions``, ``parity`` (how far each is from the framework's own function), ``compared`` (what of
    each framework ran) and ``sizes`` (lines of code).
    """

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Tabulate, or document."""
        self.env.note_reread()
        makers = {
            "table": named_modes.table,
            "functions": named_modes.functions,
            "parity": lambda: [parity.summary(), "", *parity.table()],
            "compared": parity.functions,
            "sizes": sizes.table,
        }
        lines = makers[self.arguments[0] if self.arguments else "table"]()
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("drawn", Drawn)
    app.add_directive("claims", Claims)
    app.add_directive("explorer", Explorer)
    app.add_directive("objectives", Objectives)
    app.add_directive("named-modes", NamedModes)
    return {"parallel_read_safe": False, "version": "1"}
