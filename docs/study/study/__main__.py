"""``python -m study quick | full | report | parity | parallel | status``, in docs/study."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from study import analysis, runner
from study.cells import SEEDS, quick_cells
from study.results import FIGURES, RESULTS


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="study", description="The DRPO paper's comparison in miniature.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in {
        "quick": "three methods, one setting, three seeds; draws figures/quick.svg",
        "full": "tuning and the whole comparison; starts where it was interrupted",
        "status": "what full has done and an estimate of what is left",
        "report": "tables and figures from the results there are",
        "parity": "the same training in torch and in JAX",
        "parallel": "the same training in one process and in two",
    }.items():
        command = commands.add_parser(name, help=about)
        command.add_argument("--results", type=Path, help=f"folder of the result files (default: {name} in results/)")
        if name in {"quick", "full"}:
            command.add_argument("--processes", type=int, default=runner.PROCESSES, help="runs at a time")
        if name in {"full", "status"}:
            command.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds a cell")
    chosen = parser.parse_args()
    folder = chosen.results or RESULTS / ("quick" if chosen.command == "quick" else "full")
    match chosen.command:
        case "quick":
            runner.run_missing(folder, quick_cells(), chosen.processes, "quick")
            print(analysis.quick(folder, FIGURES if chosen.results is None else folder))
        case "full":
            print(runner.status(folder, range(chosen.seeds), chosen.processes))
            runner.full(folder, range(chosen.seeds), chosen.processes)
            print(analysis.report(folder, FIGURES if chosen.results is None else folder))
        case "status":
            print(runner.status(folder, range(chosen.seeds)))
        case "report":
            print(analysis.report(folder, FIGURES if chosen.results is None else folder))
        case "parity":
            from study import parity  # noqa: PLC0415 - JAX is needed here only

            print(parity.report())
        case "parallel":
            from study import parallel  # noqa: PLC0415

            print(parallel.report())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
