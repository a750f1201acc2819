"""The audit's report and the explorer as HTML: one self-contained page, which needs no network and no other file."""

from __future__ import annotations

import json
import re
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from drpo_core.audit.report import COLUMNS, kept_mass

if TYPE_CHECKING:
    from drpo_core.audit.report import Audited, Report

__all__ = ["explorer_html", "report_html"]


def explorer_html(data: dict[str, Any]) -> str:
    """The explorer as a fragment of HTML: style, controls, script, and the data.

    Parameters
    ----------
    data
        From `drpo_core.audit.explorer.explorer_data`.

    Returns
    -------
    str
        To be put into a page's body.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    # inside <script> only these characters could end the data
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _template("explorer.html").replace("@DATA@", text)


def report_html(report: Report, data: dict[str, Any]) -> str:
    """An audit's report with its explorer, as one self-contained page.

    Parameters
    ----------
    report
        From `drpo_core.audit.audit`.
    data
        From `drpo_core.audit.explorer.explorer_data`, of the same rollouts.

    Returns
    -------
    str
        An HTML document. What comes from the file is text in it, whatever it holds.
    """
    parts = []
    for name, snapshot in report.snapshots.items():
        health = snapshot.health
        pi, mu, a, mask = (report.arrays[role] for role in ("log_prob", "behavior_log_prob", "advantages", "mask"))
        ratio = f"E_μ[r] = {health['ratio_mean']:.4f} ± {health['ratio_standard_error']:.4f}"
        kept = kept_mass(health)
        facts = [
            ("arrays", f"π {pi[name]}, μ {mu}, A {a}, mask {mask}"),
            ("tokens", f"{health['valid_tokens']:,} valid of {health['tokens']:,}, {health['active_tokens']:,} with A ≠ 0"),
            ("policy", f"{ratio}, mean |π − μ| = {health['binary_tv_mean']:.5f}"),
            *([] if kept is None else [("kept", kept)]),
            *(("warning", warning) for warning in snapshot.warnings),
        ]
        head = "".join(f'<th scope="col">{escape(title)}</th>' for title in ("objective", *COLUMNS, "weights", "mass kept"))
        rows = "".join(_report_row(audited) for audited in snapshot.objectives)
        listed = "".join(f"<dt>{escape(term)}</dt><dd>{escape(fact)}</dd>" for term, fact in facts)
        parts.append(
            f"<h2>{escape(name)}</h2><dl>{listed}</dl>"
            f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    # one pass over the template, so that a name that looks like a mark stays a name
    filled = {
        "@TITLE@": escape(report.file),
        "@REPORT@": "".join(parts) + (f"<ul>{notes}</ul>" if notes else ""),
        "@EXPLORER@": explorer_html(data),
    }
    return re.sub("@(TITLE|REPORT|EXPLORER)@", lambda mark: filled[mark.group()], _template("report.html"))


def _report_row(audited: Audited) -> str:
    row, figures = audited.row, audited.figures
    label = row.label + (f" (q={row.quantile:g})" if row.quantile is not None else "")
    cells = [
        *(f"{figures[column]:.2%}" for column in COLUMNS.values()),
        f"{figures['weight_min']:.3f} … {figures['weight_max']:.3f}",
        f"{figures['gradient_mass_kept']:.3f}",
    ]
    return f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'


def _template(name: str) -> str:
    return (files("drpo_core.audit") / "templates" / name).read_text(encoding="utf-8")
