"""An audit's report as tables in a terminal or a pipe."""

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from drpo_core.audit import Audited, Report, Snapshot
from drpo_core.audit.report import COLUMNS, kept_mass

__all__ = ["print_tables"]


def print_tables(report: Report) -> None:
    """Print each snapshot's health and table, and then the footnotes."""
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
    error = f"± {health['ratio_standard_error']:.4f}"
    ratio = f"E_μ[r] = {health['ratio_mean']:.4f} {error} (largest {health['ratio_max']:.4g})"
    kept = kept_mass(health)
    rare = ", ".join(f"{share:.2%} with μ ≤ {bound}" for bound, share in health["rare_fraction"].items())
    return [
        f"arrays: {used}",
        f"tokens: {counted}, {active}",
        f"health: {', '.join(f'{count:,} {what}' for what, count in bad.items())}",
        f"policy: {ratio}, mean |ℓ| = {health['log_ratio_abs_mean']:.4f} nats, {shift}",
        *([] if kept is None else [f"kept:   {kept}"]),
        f"rare:   {rare}",
    ]


def _table(snapshot: Snapshot, footnotes: dict[str, int]) -> Table:
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
