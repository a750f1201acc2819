"""Write the scorecard from the results of `run.py`: ``python tests/scorecard/write.py RESULTS docs/scorecard.md``.

Needs Python ≥ 3.11 alone. The page depends on nothing but the results and `remarks.toml`: no dates, no timings.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

PROPERTIES = tuple(f"P{number}" for number in range(1, 25))
ORDER = ("drpo", "verl", "trl", "torchrl", "skyrl")
TITLES = {"drpo": "drpo-core", "verl": "verl", "trl": "TRL", "torchrl": "torchrl", "skyrl": "SkyRL"}

PASS, FAIL, JUDGED, NOT_APPLICABLE = "✓", "**✗**", "(✗)", "–"


@dataclass(frozen=True)
class Remark:
    """What stands behind the failures of some rows in one property.

    A judgement (`judged`) holds for the failures whose reason has the regular expression `seen` in it, no others.
    """

    rows: str
    property: str
    cause: str
    issues: tuple[str, ...] = ()
    judged: bool = False
    seen: str = ""

    def matches(self, row: str, number: str) -> bool:
        """Whether it is about a row's failure."""
        return number == self.property and fnmatch(row, self.rows)


def main() -> None:
    """Read the results, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="directory of the JSON files")
    parser.add_argument("page", type=Path)
    arguments = parser.parse_args()
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in arguments.results.glob("*.json")}
    results = [found[name] for name in ORDER if name in found]
    arguments.page.write_text(page(results, read_remarks(Path(__file__).with_name("remarks.toml"))), encoding="utf-8")


def read_remarks(path: Path) -> list[Remark]:
    """The remarks of a TOML file."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["remark"]
    return [Remark(**{key: tuple(value) if key == "issues" else value for key, value in entry.items()}) for entry in entries]


def page(results: list[dict[str, Any]], remarks: list[Remark]) -> str:
    """The whole page."""
    refuse_unused(results, remarks)
    missing = [TITLES[name] for name in ORDER if name not in {result["framework"] for result in results}]
    lines = [_INTRODUCTION, "## Properties", "", *_statements(results), "", "## Results", ""]
    if missing:
        lines += [f"Not run for this page: {', '.join(missing)}.", ""]
    lines += _table(results, remarks)
    for result in results:
        lines += ["", *_section(result, remarks)]
    return "\n".join(lines) + "\n"


def verdict(row: dict[str, Any], number: str, remarks: list[Remark]) -> str:
    """One cell: failed if any check of the property failed, not applicable if none applies."""
    statuses = {check["status"] for check in row["results"] if check["property"] == number}
    if "failed" in statuses:
        return JUDGED if judgement(row, number, remarks) else FAIL
    return PASS if "passed" in statuses else NOT_APPLICABLE


def judgement(row: dict[str, Any], number: str, remarks: list[Remark]) -> str:
    """Why a failure is not held against the row; empty if it is, or if any of several reasons is not excused."""
    if number == "P5" and row["empty_is_finite"]:
        return "Counted under P1: only padding that holds NaN does it; with finite padding the loss is finite, the gradient 0."
    judgements = [remark for remark in remarks if remark.judged and remark.matches(row["name"], number)]
    causes = []
    for reason in _failed(row, number):
        excuses = [remark.cause for remark in judgements if re.search(remark.seen, reason)]
        if not excuses:
            return ""
        causes += excuses[:1]
    return " ".join(dict.fromkeys(causes))


def _failed(row: dict[str, Any], number: str) -> list[str]:
    return [c["reason"] for c in row["results"] if c["property"] == number and c["status"] == "failed"]


def refuse_unused(results: list[dict[str, Any]], remarks: list[Remark]) -> None:
    """A remark that no failure calls for has gone stale.

    Excused are frameworks that were not run, and judgements: whether a tie is drawn at all is a matter of the cases.
    """
    ran = tuple(result["framework"] for result in results)
    failures = {
        (row["name"], check["property"])
        for result in results
        for row in result["rows"]
        for check in row["results"]
        if check["status"] == "failed"
    }
    for remark in remarks:
        if not remark.judged and remark.rows.startswith(ran) and not any(remark.matches(*failure) for failure in failures):
            msg = f"remarks.toml: {remark.rows!r} no longer fails {remark.property}; delete or correct the remark"
            raise SystemExit(msg)


def _statements(results: list[dict[str, Any]]) -> list[str]:
    """What each property states: the sentence of each of its checks."""
    lines = ["| | |", "|---|---|"]
    for number in PROPERTIES:
        checks = results[0]["rows"][0]["results"] if results else []
        stated = [check["statement"] for check in checks if check["property"] == number]
        lines.append(f"| {number} | {_cell(' '.join(stated))} |")
    return lines


def _table(results: list[dict[str, Any]], remarks: list[Remark]) -> list[str]:
    lines = [f"| implementation | {' | '.join(PROPERTIES)} |", f"|---|{':-:|' * len(PROPERTIES)}"]
    for result in results:
        for row in result["rows"]:
            cells = " | ".join(verdict(row, number, remarks) for number in PROPERTIES)
            lines.append(f"| {row['name']} | {cells} |")
    return lines


def _section(result: dict[str, Any], remarks: list[Remark]) -> list[str]:
    title = TITLES[result["framework"]]
    versions = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    lines = [f"## {title}", "", f"{versions}; Python {result['python']}, CPU.", ""]
    lines += ["| implementation | what was run | declared |", "|---|---|---|"]
    for row in result["rows"]:
        lines.append(f"| {row['name']} | {_cell(row['called'])} | {_cell(_declared(row))} |")
    failures = _failures(result["rows"], remarks)
    if failures:
        lines += [
            "",
            "| implementation | property | smallest counterexample found | cause | upstream |",
            "|---|---|---|---|---|",
        ]
        lines += failures
    else:
        lines += ["", "No check failed."]
    lines += ["", "Not applicable:", ""]
    return lines + _reasons(result["rows"])


def _declared(row: dict[str, Any]) -> str:
    claims = row["claims"]
    parts = [
        f"`{claims['objective']}`" if claims["objective"] else "no objective that the kit has a formula for",
        f"{claims['form']} form",
        f"`{claims['reduction']}`" + (" with a denominator of the whole batch" if claims["normalizer"] else ""),
        claims["dtype"],
    ]
    if not claims["local"]:
        parts.append("tokens of a sequence interact")
    if row["counts_empty_rows"]:
        parts.append("the mean is over all rows")
    return "; ".join([*parts, *([row["boundary"]] if row["boundary"] else [])])


def _failures(rows: list[dict[str, Any]], remarks: list[Remark]) -> list[str]:
    """A line a failure; rows that fail alike share one, with the counterexample of the first."""
    shared: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        for number in PROPERTIES:
            failed = [check for check in row["results"] if check["property"] == number and check["status"] == "failed"]
            if not failed:
                continue
            matching = [remark for remark in remarks if not remark.judged and remark.matches(row["name"], number)]
            excused = judgement(row, number, remarks)
            cause = f"Not held against it. {excused}" if excused else " ".join(remark.cause for remark in matching)
            issues = [] if excused else [issue for remark in matching for issue in remark.issues]
            seen = "; ".join(readable(check["reason"]) + case(check["counterexample"]) for check in failed)
            shared.setdefault((number, seen, cause, ", ".join(map(_link, issues)) or "–"), []).append(row["name"])
    return [
        f"| {', '.join(names)} | {number} | {_cell(seen)} | {_cell(cause)} | {links} |"
        for (number, seen, cause, links), names in shared.items()
    ]


def case(counterexample: str, longest: int = 300) -> str:
    """The counterexample as a clause, if it is short enough to be read."""
    plain = re.sub(r"np\.array\(([^()]*)\)", r"\1", counterexample)
    plain = readable(re.sub(r"^.*?\b(?:TokenBatch|Vocabulary)\((.*?)\)+$", r"\1", plain))
    return f". Case: {plain}" if 0 < len(plain) <= longest else ""


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    """Properties that say nothing about a row, by reason; a reason that several rows share is given once."""
    shared: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        by_reason: dict[str, list[str]] = {}
        for check in row["results"]:
            if check["status"] == "not applicable":
                numbers = by_reason.setdefault(check["reason"], [])
                if check["property"] not in numbers:
                    numbers.append(check["property"])
        for reason, numbers in by_reason.items():
            shared.setdefault((reason, ", ".join(numbers)), []).append(row["name"])
    every = [row["name"] for row in rows]
    return [
        f"- {numbers}: {readable(reason)} ({'all rows' if names == every else ', '.join(names)})."
        for (reason, numbers), names in shared.items()
    ]


def readable(reason: str) -> str:
    """A reason without NumPy's constructors and with numbers of at most seven digits."""
    plain = re.sub(r"(?:np\.float64|array)\(([^()]*)\)", r"\1", reason)
    return re.sub(r"-?\d+\.\d{7,}(?:e[-+]?\d+)?", lambda match: f"{float(match[0]):.7g}", plain)


def _link(issue: str) -> str:
    repository, _, number = issue.partition("#")
    name = repository.rpartition("/")[2]
    return f"[{name} #{number}](https://github.com/{repository}/issues/{number})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_INTRODUCTION = f"""# Scorecard

The verification kit of `drpo_core.testing`, run on public releases of policy losses and on this library.

Each release is installed in an environment of its own, on the CPU, with the versions given below. A short declaration
calls the release's own loss function, with the settings given below, and says what it claims to be: an objective, a
reduction, a dtype, limits such as a log-ratio clamped to ±20. The kit checks that claim and nothing else: tokens beyond a
declared limit are not drawn (P2 is about such tokens), and what a declaration excludes is marked as not applicable. The
frameworks are checked in float32, the dtype they are used with. Every property is searched with the kit's `ci` profile, which
draws the same cases in every run; a ✓ says that none of them failed, not that none exists.

| mark | meaning |
|:-:|---|
| {PASS} | every check of the property passed |
| {FAIL} | a check found a counterexample; see the section of the release |
| {JUDGED} | a check found a counterexample that, judged by hand, is no defect of its own; the reason is given |
| {NOT_APPLICABLE} | does not apply to what was declared; the reasons are listed |

A counterexample is the smallest that Hypothesis found; its case is what was drawn, to which the check then does what the
property states (pads it, poisons its masked inputs, replaces a token). `drpo_core.testing` gives a snippet for each.

A failure says that a loss function, called directly, does not have a property. It does not say that training with the
framework meets the case: other code may prevent it, and where it is known to, the table says so. To avoid counting one
cause many times, fully masked batches are left to P5, and rows without a valid token to P6 where a release is declared
to average over all rows. P1, which poisons all masked inputs at once, is also run with one of them poisoned at a time.

Regenerate this page with `pipx run nox -s scorecard`. The declarations are `tests/scorecard/declare_*.py`, the exact
versions `tests/scorecard/requirements/*.txt`, the causes `tests/scorecard/remarks.toml`. Corrections are welcome.
"""


if __name__ == "__main__":
    main()
