"""Write docs/benchmarks.md from the results of `run.py`: ``python benchmarks/write.py RESULTS docs/benchmarks.md``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median, quantiles
from typing import Any

HERE = Path(__file__).parent


def main() -> None:
    """Read the results, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="directory of the JSON files")
    parser.add_argument("page", type=Path)
    arguments = parser.parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.results.glob("*.json"))]
    arguments.page.write_text(page([r for r in results if r["group"] != "smoke"]), encoding="utf-8")


def page(results: list[dict[str, Any]]) -> str:
    """The whole page."""
    text = (HERE / "text.md").read_text(encoding="utf-8")
    return text.replace("<!-- tables -->", "\n\n".join(_group(result) for result in results))


def ratios(case: dict[str, Any], of: str, to: str) -> tuple[float, float, float]:
    """Median and quartiles, over the rounds, of the seconds of one function over those of another."""
    pairs = zip(case["seconds"][of], case["seconds"][to], strict=True)
    each = [first / second for first, second in pairs]
    low, _, high = quantiles(each, n=4, method="inclusive")
    return median(each), low, high


def _group(result: dict[str, Any]) -> str:
    machine = result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    settings = (
        f"{machine['processor']}, {machine['threads']} of its threads; Python {machine['python']}, {packages}; "
        f"malloc: `{machine['malloc']}`."
    )
    lines = [
        f"## {result['group']}",
        "",
        settings,
    ]
    for case in result["cases"]:
        lines += ["", *_table(case)]
    if result["memory"]:
        lines += [
            "",
            "Peak resident memory beyond inputs and gradients, N = 512, V = 151,936, a process each, 4 KiB pages:",
            "",
        ]
        lines += ["| | MiB |", "|---|--:|"]
        lines += [f"| {label} | {size / 2**20:.0f} |" for label, size in result["memory"].items()]
    if result.get("errors"):
        lines += [
            "",
            "Largest errors beside float64, N = 4,096, V = 4,096: log π in nats, gradients beside their largest element:",
            "",
            "| | log π | ∂hidden | ∂weight |",
            "|---|--:|--:|--:|",
            *(f"| {label} | {' | '.join(f'{e:.1e}' for e in errors)} |" for label, errors in result["errors"].items()),
        ]
    return "\n".join(lines)


def _table(case: dict[str, Any]) -> list[str]:
    baseline = next(iter(case["seconds"]))
    rounds = len(case["seconds"][baseline])
    lines = [
        (
            f"**{case['about'][0].upper()}{case['about'][1:]}** ({rounds} rounds; "
            f"{case['others']:g} cores busy with other processes)"
        ),
        "",
    ]
    lines += ["| | ms | speed-up (quartiles) |", "|---|--:|--:|"]
    for label, seconds in case["seconds"].items():
        value, low, high = ratios(case, baseline, label)
        shown = "1" if label == baseline else f"{_short(value)} ({_short(low)}–{_short(high)})"
        lines.append(f"| {label} | {_short(1e3 * median(seconds))} | {shown} |")
    return lines


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
