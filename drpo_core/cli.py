"""The command `drpo`. Without the extra `cli` it says how to install it; this module then still imports.

That is why typer and rich are imported inside functions, and why annotations are not postponed: typer reads them.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from drpo_core import check_cli, explorer
from drpo_core.audit import Audited, Report, Row, Snapshot, Threshold, audit, rows
from drpo_core.rollouts import RolloutError, Rollouts, open_rollouts

if TYPE_CHECKING:
    import typer
    from rich.table import Table

__all__ = ["main"]

EXTRA = ("matplotlib", "pyarrow", "rich", "safetensors", "typer")
BUNDLED = "gemma3_270m_arithmetic.npz"
COLUMNS = {
    "dropped": "dropped_fraction",
    "attenuated": "attenuated_fraction",
    "amplified": "amplified_fraction",
    "corrective": "corrective_fraction",
}


def main() -> None:
    """Run `drpo`: exit code 0, or 2 and one line on stderr if the input is bad."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal that has no π gets a question mark, not a traceback
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        _app()()
    except ModuleNotFoundError as missing:
        library = (missing.name or "").partition(".")[0]
        if library not in EXTRA:
            raise
        _stop(f"drpo: {library} is not installed: pip install 'drpo-core[cli]'")


def _app() -> "typer.Typer":
    """The commands."""
    import typer  # noqa: PLC0415 - of the extra `cli`

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def drpo() -> None:
        """Policy-loss math for off-policy RL of language models."""

    several = "Comma-separated and repeatable; LOW/HIGH sets the two sides apart."

    @app.command("audit")
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
        delta: Annotated[
            list[str] | None, typer.Option(help=f"δ of DPPO-TV, DRPO, Mask-DRPO [default: 0.15,12.5]. {several}")
        ] = None,
        delta_kl: Annotated[list[str] | None, typer.Option(help=f"δ of DPPO-KL, nats [default: 0.05]. {several}")] = None,
        eps: Annotated[
            list[str] | None, typer.Option(help=f"ε of PPO-clip and SPO [default: 0.2,0.2/0.28]. {several}")
        ] = None,
        max_ratio: Annotated[list[str] | None, typer.Option(help="c of CISPO [default: 5]. Comma-separated.")] = None,
        at_quantile: Annotated[
            list[str] | None, typer.Option(help="Add rows at the thresholds that drop this share of diverging tokens.")
        ] = None,
        *,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
        plot: Annotated[Path | None, typer.Option(help="Draw weight against shift: .png, .svg or .pdf.")] = None,
        html: Annotated[Path | None, typer.Option(help="Write the report and an explorer as one page.")] = None,
    ) -> None:
        """Print what each objective would do to recorded rollouts."""
        thresholds = _Thresholds(delta or [], delta_kl or [], eps or [], max_ratio or [], at_quantile or [])
        names = {"log_prob": log_prob, "behavior_log_prob": behavior_log_prob, "advantages": advantages, "mask": mask}
        try:
            report = _audit(file, names, snapshot or [], thresholds, plot, html)
        except RolloutError as error:
            _stop(f"drpo audit: {error}")
        _warn(report)
        if as_json:
            sys.stdout.write(json.dumps(report.as_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n")
        else:
            _print_tables(report)

    check_cli.register(app)
    return app


def _stop(line: str) -> NoReturn:
    sys.stderr.write(line + "\n")
    raise SystemExit(2)


@dataclass(frozen=True, slots=True)
class _Thresholds:
    """Lists as they were typed; an empty one means the default."""

    delta: list[str]
    delta_kl: list[str]
    eps: list[str]
    max_ratio: list[str]
    at_quantile: list[str]

    def rows(self) -> list[Row]:
        """The objectives to audit."""
        given: dict[str, Any] = {
            "delta": _numbers("--delta", self.delta),
            "delta_kl": _numbers("--delta-kl", self.delta_kl),
            "eps": _numbers("--eps", self.eps),
            "max_ratio": _numbers("--max-ratio", self.max_ratio, sides=False),
        }
        try:
            return rows(**{name: values for name, values in given.items() if values})
        except ValueError as error:
            raise RolloutError(str(error)) from error

    def quantiles(self) -> list[float]:
        """The shares to drop."""
        found = [q for q in _numbers("--at-quantile", self.at_quantile, sides=False) if isinstance(q, float)]
        for q in found:
            if not 0.0 < q < 1.0:
                msg = f"--at-quantile: expected a share between 0 and 1, got {q:g}"
                raise RolloutError(msg)
        return found


def _numbers(flag: str, texts: list[str], *, sides: bool = True) -> list[Threshold]:
    """Numbers, or LOW/HIGH pairs, of comma-separated lists; each once."""
    found: list[Threshold] = []
    for text in ",".join(texts).split(",") if texts else []:
        try:
            values = [float(part) for part in text.split("/")]
        except ValueError:
            values = []
        if len(values) not in ((1, 2) if sides else (1,)):
            msg = f"{flag}: expected numbers{' or LOW/HIGH' if sides else ''}, comma-separated, got {text!r}"
            raise RolloutError(msg)
        found.append(values[0] if len(values) == 1 else (values[0], values[1]))
    return list(dict.fromkeys(found))


def _audit(
    file: Path | None,
    names: dict[str, str | None],
    snapshots: list[str],
    thresholds: _Thresholds,
    plot: Path | None,
    html: Path | None,
) -> Report:
    """Audit a file under a progress bar, draw it, and write its page."""
    from rich.console import Console  # noqa: PLC0415 - of the extra `cli`
    from rich.progress import Progress  # noqa: PLC0415 - of the extra `cli`

    objectives, quantiles = thresholds.rows(), thresholds.quantiles()
    if plot is not None:
        _check_plot(plot)
    if html is not None:
        _check_html(html)
    with ExitStack() as stack:
        path = file if file is not None else stack.enter_context(as_file(files("drpo_core") / "data" / BUNDLED))
        rollouts = open_rollouts(path, snapshots=snapshots, **names)
        console = Console(stderr=True)
        progress = stack.enter_context(Progress(console=console, transient=True, disable=not console.is_terminal))
        passes = len(rollouts.snapshots) * (5 if quantiles else 1)
        task = progress.add_task("reading", total=rollouts.tokens * passes)
        report = audit(
            rollouts,
            objectives,
            quantiles=quantiles,
            curves=plot is not None,
            advance=lambda count: progress.advance(task, count),
            file=f"bundled:{BUNDLED}" if file is None else None,
        )
        if html is not None:
            _write_html(html, rollouts, report)
    if plot is not None:
        _draw(report, plot)
    return report


def _check_plot(path: Path) -> None:
    """Refuse a name that can't be drawn before the file is read, which may take minutes."""
    from drpo_core import plots  # noqa: PLC0415 - matplotlib is slow to import

    if path.suffix.lower() not in plots.SUFFIXES:
        msg = f"--plot: expected a file named {', '.join(plots.SUFFIXES)}, got {path}"
        raise RolloutError(msg)
    _check_folder("--plot", path)


def _check_html(path: Path) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        msg = f"--html: expected a file named .html, got {path}"
        raise RolloutError(msg)
    _check_folder("--html", path)


def _check_folder(flag: str, path: Path) -> None:
    if not path.parent.is_dir():
        msg = f"{flag}: {path} can't be written: no folder {path.parent}"
        raise RolloutError(msg)


def _draw(report: Report, path: Path) -> None:
    from drpo_core import plots  # noqa: PLC0415 - matplotlib is slow to import

    try:
        plots.save(plots.audit_figure(report), path)
    except OSError as error:
        msg = f"--plot: {path} can't be written: {error.strerror or error}"
        raise RolloutError(msg) from error


def _write_html(path: Path, rollouts: Rollouts, report: Report) -> None:
    """The report and an explorer of the same rollouts, whose sliders stop at the audited thresholds too."""
    objectives = [audited.row.objective for snapshot in report.snapshots.values() for audited in snapshot.objectives]
    data = explorer.explorer_data(rollouts, explorer.Grid().including(objectives))
    try:
        path.write_text(explorer.report_html(report, data, COLUMNS), encoding="utf-8")
    except OSError as error:
        msg = f"--html: {path} can't be written: {error.strerror or error}"
        raise RolloutError(msg) from error


def _warn(report: Report) -> None:
    """What is suspicious about the data, on stderr."""
    for name, snapshot in report.snapshots.items():
        for warning in snapshot.warnings:
            sys.stderr.write(f"drpo audit: warning: {name}: {warning}\n")


def _print_tables(report: Report) -> None:
    from rich.console import Console  # noqa: PLC0415 - of the extra `cli`
    from rich.measure import Measurement  # noqa: PLC0415 - of the extra `cli`
    from rich.text import Text  # noqa: PLC0415 - of the extra `cli`

    footnotes = {note: mark for mark, note in enumerate(report.notes, 1)}
    tables = [_table(snapshot, footnotes) for snapshot in report.snapshots.values()]
    console = Console(highlight=False)
    if not console.is_terminal:
        # a pipe has no width to fit; wrapped cells would be hard to search
        widest = max(Measurement.get(console, console.options.update(max_width=400), table).maximum for table in tables)
        console = Console(highlight=False, width=widest)
    for (name, snapshot), table in zip(report.snapshots.items(), tables, strict=True):
        console.print(Text(f"{report.file}: {name}", style="bold"))
        for line in _health_lines(report, name, snapshot):
            console.print(Text(line), soft_wrap=True)
        console.print(table)
    for note, mark in footnotes.items():
        console.print(Text(f"[{mark}] {note}"), soft_wrap=True)


def _health_lines(report: Report, name: str, snapshot: Snapshot) -> list[str]:
    health = snapshot.health
    arrays = report.arrays
    used = f"π {arrays['log_prob'][name]}, μ {arrays['behavior_log_prob']}, A {arrays['advantages']}, mask {arrays['mask']}"
    counted = f"{health['valid_tokens']:,} valid of {health['tokens']:,} tokens"
    active = f"{health['active_tokens']:,} with A ≠ 0, {health['diverging_tokens']:,} of them diverging"
    bad = {
        "NaN at masked positions": sum(health["masked_nan"].values()),
        "positive log-probs": sum(health["positive_log_prob"].values()),
        "infinite values": sum(health["infinite"].values()),
    }
    shift = f"mean |π − μ| = {health['binary_tv_mean']:.5f} (largest {health['binary_tv_max']:.3f})"
    ratio = f"E_μ[r] = {health['ratio_mean']:.4f} (largest {health['ratio_max']:.4g})"
    rare = ", ".join(f"{share:.2%} with μ ≤ {bound}" for bound, share in health["rare_fraction"].items())
    return [
        f"arrays: {used}",
        f"tokens: {counted}, {active}",
        f"health: {', '.join(f'{count:,} {what}' for what, count in bad.items())}",
        f"policy: {ratio}, mean |ℓ| = {health['log_ratio_abs_mean']:.4f} nats, {shift}",
        f"rare:   {rare}",
    ]


def _table(snapshot: Snapshot, footnotes: dict[str, int]) -> "Table":
    from rich import box  # noqa: PLC0415 - of the extra `cli`
    from rich.table import Table  # noqa: PLC0415 - of the extra `cli`
    from rich.text import Text  # noqa: PLC0415 - of the extra `cli`

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("objective", no_wrap=True)
    for title in (*COLUMNS, "weights", "ESS", "mass"):
        table.add_column(title, justify="right", no_wrap=True)
    for audited in snapshot.objectives:
        table.add_row(*(Text(cell) for cell in _cells(audited, footnotes)))
    return table


def _cells(audited: Audited, footnotes: dict[str, int]) -> list[str]:
    row, figures = audited.row, audited.figures
    mark = f" [{footnotes[row.warning]}]" if row.warning in footnotes else ""
    chosen = f" (q={row.quantile:g})" if row.quantile is not None else ""
    return [
        f"{row.label}{chosen}{mark}",
        *(f"{figures[column]:.2%}" for column in COLUMNS.values()),
        f"{figures['weight_min']:.3f} … {figures['weight_max']:.3f}",
        f"{figures['effective_sample_size']:.3f}",
        f"{figures['gradient_mass_kept']:.3f}",
    ]


if __name__ == "__main__":
    main()
