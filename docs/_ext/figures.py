"""The figures of the site, drawn by `drpo_core` while it is built: each function returns SVG or HTML."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from drpo_core import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return f'<div class="drawn">{text[text.index("<svg") :]}</div>'


def weights() -> str:
    """Weights of the five objectives with a region, for a rare and a common token."""
    return _svg(plots.weight_figure())
