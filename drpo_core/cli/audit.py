"""The command `drpo audit`: its flags, and where the results go. `drpo_core.audit` computes them."""

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import as_file
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from drpo_core.audit import BUNDLED, Report, RolloutError, Rollouts, Row, Threshold, audit, open_rollouts, rows
from drpo_core.audit.explorer import Grid, explorer_data
from drpo_core.audit.page import report_html
from drpo_core.audit.quantiles import PASSES
from drpo_core.audit.selection import swept_by
from drpo_core.cli.objective import parse_objective, try_out
from drpo_core.cli.tables import print_tables
from drpo_core.cli.usage import UsageError, quiet_stdout, stop
from drpo_core.modes.mode import is_whole_mode

__all__ = ["audit_command"]

SEVERAL = "Comma-separated and repeatable; LOW/HIGH sets the two sides apart."


def _help(symbol: str, argument: str, unit: str = "") -> str:
    """Say whose thresholds a flag sets, and which values the table calls typical."""
    families = swept_by(argument)
    typical = dict.fromkeys(value for family in families for value in family.typical)
    default = ",".join(
        "/".join(f"{side:g}" for side in (value if isinstance(value, tuple) else (value,))) for value in typical
    )
    return f"{symbol} of {', '.join(family.name for family in families)}{unit} (default: {default})."


def audit_command(
    file: Annotated[
        Path | None, typer.Argument(help=".npz, .safetensors or .parquet; without it, rollouts that ship with drpo-core.")
    ] = None,
    log_prob: Annotated[
        str | None, typer.Option(help="Array of log π, or the common start NAME of snapshots NAME_<snapshot>.")
    ] = None,
    behavior_log_prob: Annotated[str | None, typer.Option(help="Array of log μ.")] = None,
    advantages: Annotated[str | None, typer.Option(help="Array of A, per token or per sequence.")] = None,
    mask: Annotated[str | None, typer.Option(help="Array of the mask.")] = None,
    snapshot: Annotated[list[str] | None, typer.Option(help="Snapshot to audit; repeatable. Default: all.")] = None,
    delta: Annotated[list[str] | None, typer.Option(help=f"{_help('δ', 'delta')} {SEVERAL}")] = None,
    delta_kl: Annotated[list[str] | None, typer.Option(help=f"{_help('δ', 'delta_kl', ', nats')} {SEVERAL}")] = None,
    eps: Annotated[list[str] | None, typer.Option(help=f"{_help('ε', 'eps')} {SEVERAL}")] = None,
    max_ratio: Annotated[list[str] | None, typer.Option(help=f"{_help('c', 'max_ratio')} Comma-separated.")] = None,
    at_quantile: Annotated[
        list[str] | None, typer.Option(help="Add rows at the thresholds that drop this share of diverging tokens.")
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help='Add a row: "PPOClip(eps=0.2, dual_clip=3.0)", or module:NAME or file.py:NAME of your own. Repeatable.'
        ),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw weight against shift: .png, .svg or .pdf.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report and an explorer as one page.")] = None,
) -> None:
    """Print what each objective would do to recorded rollouts."""
    selection = _Selection(delta or [], delta_kl or [], eps or [], max_ratio or [], at_quantile or [], objective or [])
    names = {"log_prob": log_prob, "behavior_log_prob": behavior_log_prob, "advantages": advantages, "mask": mask}
    try:
        with quiet_stdout():
            report = _audit(file, names, snapshot or [], selection, plot, html)
    except (RolloutError, UsageError) as error:
        stop(f"drpo audit: {error}")
    _warn(report)
    if as_json:
        sys.stdout.write(json.dumps(report.as_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    else:
        print_tables(report)


@dataclass(frozen=True, slots=True)
class _Selection:
    """Thresholds and objectives as they were typed; an empty list of thresholds means the default."""

    delta: list[str]
    delta_kl: list[str]
    eps: list[str]
    max_ratio: list[str]
    at_quantile: list[str]
    objective: list[str]

    def rows(self) -> list[Row]:
        """Return the table's objectives at the thresholds."""
        try:
            return rows(
                delta=_numbers("--delta", self.delta) or None,
                delta_kl=_numbers("--delta-kl", self.delta_kl) or None,
                eps=_numbers("--eps", self.eps) or None,
                max_ratio=_single_numbers("--max-ratio", self.max_ratio) or None,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error

    def added(self) -> list[Row]:
        """Return the objectives that were given one by one."""
        found = []
        for text in dict.fromkeys(self.objective):
            parsed = parse_objective(text)
            if is_whole_mode(parsed.objective):
                msg = f"--objective: {text}: the audit is of objectives on π/μ; this mode has anchor, corrections or penalties"
                raise UsageError(msg)
            try_out(parsed, text)
            found.append(Row(parsed.objective, warning="; ".join(parsed.warnings) or None))
        return found

    def quantiles(self) -> list[float]:
        """Return the shares to drop."""
        found = _single_numbers("--at-quantile", self.at_quantile)
        for q in found:
            if not 0.0 < q < 1.0:
                msg = f"--at-quantile: expected a share between 0 and 1, got {q:g}"
                raise UsageError(msg)
        return found


def _numbers(flag: str, texts: list[str]) -> list[Threshold]:
    """Parse comma-separated lists of numbers or LOW/HIGH pairs; each value once."""
    found: list[Threshold] = []
    for text, values in _split(texts):
        if len(values) not in (1, 2):
            msg = f"{flag}: expected numbers or LOW/HIGH, comma-separated, got {text!r}"
            raise UsageError(msg)
        found.append(values[0] if len(values) == 1 else (values[0], values[1]))
    return list(dict.fromkeys(found))


def _single_numbers(flag: str, texts: list[str]) -> list[float]:
    """Parse comma-separated lists of numbers; each value once."""
    found = []
    for text, values in _split(texts):
        if len(values) != 1:
            msg = f"{flag}: expected numbers, comma-separated, got {text!r}"
            raise UsageError(msg)
        found.append(values[0])
    return list(dict.fromkeys(found))


def _split(texts: list[str]) -> list[tuple[str, list[float]]]:
    """Return each item of comma-separated lists with the numbers between its slashes; none if one is no number."""
    found = []
    for text in ",".join(texts).split(",") if texts else []:
        try:
            found.append((text, [float(part) for part in text.split("/")]))
        except ValueError:
            found.append((text, []))
    return found


def _audit(
    file: Path | None,
    names: dict[str, Any],
    snapshots: list[str],
    selection: _Selection,
    plot: Path | None,
    html: Path | None,
) -> Report:
    """Audit a file under a progress bar, draw it, and write its page."""
    table, added, quantiles = selection.rows(), selection.added(), selection.quantiles()
    if plot is not None:
        _check_plot(plot)
    if html is not None:
        _check_html(html)
    with ExitStack() as stack:
        path = file if file is not None else stack.enter_context(as_file(BUNDLED))
        rollouts = open_rollouts(path, snapshots=snapshots, **names)
        console = Console(stderr=True)
        progress = stack.enter_context(Progress(console=console, transient=True, disable=not console.is_terminal))
        passes = len(rollouts.snapshots) * (PASSES + 1 if quantiles else 1)
        task = progress.add_task("reading", total=rollouts.tokens * passes)
        report = audit(
            rollouts,
            [*table, *added],
            quantiles=quantiles,
            curves=plot is not None,
            advance=lambda count: progress.advance(task, count),
            file=f"bundled:{BUNDLED.name}" if file is None else None,
        )
        if html is not None:
            _write_html(html, rollouts, report, added)
    if plot is not None:
        _draw(report, plot)
    return report


def _check_plot(path: Path) -> None:
    """Refuse a name that can't be drawn before the file is read, which may take minutes."""
    from drpo_core.audit import plots  # noqa: PLC0415 - matplotlib is of the extra `cli`

    if path.suffix.lower() not in plots.SUFFIXES:
        msg = f"--plot: expected a file named {', '.join(plots.SUFFIXES)}, got {path}"
        raise UsageError(msg)
    _check_folder("--plot", path)


def _check_html(path: Path) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        msg = f"--html: expected a file named .html, got {path}"
        raise UsageError(msg)
    _check_folder("--html", path)


def _check_folder(flag: str, path: Path) -> None:
    if not path.parent.is_dir():
        msg = f"{flag}: {path} can't be written: no folder {path.parent}"
        raise UsageError(msg)


def _draw(report: Report, path: Path) -> None:
    from drpo_core.audit import plots  # noqa: PLC0415 - matplotlib is of the extra `cli`

    try:
        plots.save(plots.audit_figure(report), path)
    except OSError as error:
        msg = f"--plot: {path} can't be written: {error.strerror or error}"
        raise UsageError(msg) from error


def _write_html(path: Path, rollouts: Rollouts, report: Report, added: list[Row]) -> None:
    """Write the report and an explorer of the same rollouts, whose sliders stop at the audited thresholds too."""
    audited = [item.row.objective for snapshot in report.snapshots.values() for item in snapshot.objectives]
    data = explorer_data(rollouts, Grid().including(audited), [row.objective for row in added])
    try:
        path.write_text(report_html(report, data), encoding="utf-8")
    except OSError as error:
        msg = f"--html: {path} can't be written: {error.strerror or error}"
        raise UsageError(msg) from error


def _warn(report: Report) -> None:
    """Write to stderr what is suspicious about the data."""
    for name, snapshot in report.snapshots.items():
        for warning in snapshot.warnings:
            sys.stderr.write(f"drpo audit: warning: {name}: {warning}\n")
