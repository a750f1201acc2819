"""The commands of the study: ``python -m study COMMAND`` in the folder ``studies``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from study import analysis, results, runner
from study.cells import SEEDS, quick_cells

COMMANDS = {
    "quick": "train three methods in one setting from three seeds, and draw them; goes on where it was interrupted",
    "full": "tuning and the whole comparison; goes on where it was interrupted",
    "status": "how much of the full comparison is done, and an estimate of the time left",
    "report": "tables and figures of results; without --results those of the site, from the repository's results",
    "pack": "put a folder of run files into one Parquet file",
    "unpack": "write the run files of a Parquet file into a folder",
    "parity": "the same training in torch and in JAX",
    "parallel": "the same training in one process and in two",
}


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    whole = argparse.ArgumentParser(prog="study", description="The DRPO paper's comparison in miniature.")
    commands = whole.add_subparsers(dest="command", required=True)
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about)
        match name:
            case "quick" | "full":
                command.add_argument("--results", type=Path, required=True, metavar="FOLDER", help="folder of the run files")
                command.add_argument("--processes", type=int, default=runner.PROCESSES, help="runs at a time")
            case "status" | "report":
                about_source = "folder of run files, or Parquet file"
                command.add_argument("--results", type=Path, required=name == "status", help=about_source)
            case "pack":
                command.add_argument("folder", type=Path)
                command.add_argument("file", type=Path)
            case "unpack":
                command.add_argument("file", type=Path)
                command.add_argument("folder", type=Path)
        if name in {"full", "status"}:
            command.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds for each cell")
    return whole


def report(source: Path | None) -> str:
    """Draw the site's tables and figures; or those of a source, into its folder or, for ``x.parquet``, into ``x.report``."""
    if source is None:
        figures = results.PAGES / "figures"
        quick = analysis.quick(results.QUICK, figures)
        return f"{analysis.report(results.FULL, results.PAGES / 'tables.txt', figures)}\n**Quick run**\n\n{quick}"
    results.check_runs(source)
    folder = source.with_suffix(".report") if source.is_file() else source
    return analysis.report(source, folder / "tables.txt", folder)


def main(arguments: list[str] | None = None) -> None:
    """Parse and run; a wrong folder or file ends with a message."""
    command_line = parser()
    chosen = command_line.parse_args(arguments)
    try:
        run(chosen)
    except results.UnusableError as error:
        command_line.error(str(error))


def run(chosen: argparse.Namespace) -> None:
    """Run a parsed command."""
    match chosen.command:
        case "quick":
            results.check_folder(chosen.results)
            runner.run_missing(chosen.results, quick_cells(), chosen.processes, "quick")
            print(analysis.quick(chosen.results, chosen.results))
        case "full":
            results.check_folder(chosen.results)
            print(runner.status(chosen.results, range(chosen.seeds), chosen.processes))
            runner.full(chosen.results, range(chosen.seeds), chosen.processes)
            print(report(chosen.results))
        case "status":
            print(runner.status(chosen.results, range(chosen.seeds)))
        case "report":
            print(report(chosen.results))
        case "pack":
            print(f"{results.pack(chosen.folder, chosen.file)} runs in {chosen.file}")
        case "unpack":
            print(f"{results.unpack(chosen.file, chosen.folder)} runs in {chosen.folder}")
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
