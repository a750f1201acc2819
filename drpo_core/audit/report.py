"""The result of an audit: figures of each snapshot and objective, as data and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from drpo_core import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drpo_core.audit.selection import Row

    Values = np.ndarray[Any, Any]

__all__ = ["BINS", "COLUMNS", "SCHEMA_VERSION", "Audited", "Curve", "Report", "Snapshot", "kept_mass"]

SCHEMA_VERSION = 1
# bins of the shift π − μ in [−1, 1]; an odd number, so that on-policy tokens fill one bin
BINS = 201
COLUMNS = {
    "dropped": "dropped_fraction",
    "attenuated": "attenuated_fraction",
    "amplified": "amplified_fraction",
    "corrective": "corrective_fraction",
}
"""Titles of the shares in tables, each with the figure that it shows."""


# standard errors of the mean ratio below 1 from which it is no noise
BELOW = 3.0


def kept_mass(health: Mapping[str, Any]) -> str | None:
    """Return what a mean ratio below 1 by more than noise says of the data; None where it is not."""
    mean, error = health["ratio_mean"], health["ratio_standard_error"]
    if not mean < 1.0 - BELOW * error:
        return None
    return (
        f"E_μ[r] = {mean:.4f} ± {error:.4f} is below 1: π gives that mass to what μ could sample. Truncated sampling (top-p, "
        "top-k, min-p) whose supports were not recorded, or drift whose large ratios are too rare to be in these tokens"
    )


@dataclass(slots=True)
class Curve:
    """Sum of an objective's weights in each bin of the shift, for A > 0 and for A < 0."""

    row: Row
    total: Values = field(default_factory=lambda: np.zeros((2, BINS)))


@dataclass(slots=True)
class Audited:
    """A row and its figures."""

    row: Row
    figures: dict[str, float]


@dataclass(slots=True)
class Snapshot:
    """The data's own health, each objective's figures, and what the plot needs.

    `counts` is the histogram of active tokens over `BINS` bins of the shift, for A > 0 and for A < 0.
    """

    health: dict[str, Any]
    objectives: list[Audited]
    warnings: list[str]
    counts: Values
    curves: list[Curve]


@dataclass(slots=True)
class Report:
    """The audit of a file."""

    file: str
    arrays: dict[str, Any]
    snapshots: dict[str, Snapshot]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The report as strict JSON: what is not a finite number is None. `docs/audit.md` describes it."""
        return {
            "version": SCHEMA_VERSION,
            "drpo_core": __version__,
            "file": self.file,
            "arrays": self.arrays,
            "notes": self.notes,
            "snapshots": {
                name: {
                    "health": _strict(snapshot.health),
                    "warnings": snapshot.warnings,
                    "objectives": [
                        {
                            "name": audited.row.name,
                            "objective": type(audited.row.objective).__name__,
                            "parameters": _strict(audited.row.parameters),
                            "quantile": audited.row.quantile,
                            "warning": audited.row.warning,
                            **_strict(audited.figures),
                        }
                        for audited in snapshot.objectives
                    ],
                }
                for name, snapshot in self.snapshots.items()
            },
        }


def _strict(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Convert to what JSON has: no NaN, no infinity, and text for what is neither a number nor a container."""

    def converted(value: Any) -> Any:
        if isinstance(value, dict):
            return _strict(value)
        if isinstance(value, list | tuple):
            return [converted(item) for item in value]
        if value is None or isinstance(value, str | bool | int):
            return value
        if isinstance(value, float | np.floating | np.integer):
            return float(value) if math.isfinite(value) else None
        return repr(value)

    return {str(name): converted(value) for name, value in values.items()}
