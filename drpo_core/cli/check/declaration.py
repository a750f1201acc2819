"""The user's declarations about a loss, as fields of an `Implementation`."""

from dataclasses import dataclass
from typing import Any

from drpo_core.cli.check.notes import note
from drpo_core.cli.objective import parse_objective
from drpo_core.cli.usage import UsageError, one_of
from drpo_core.modes import Mode
from drpo_core.objectives import Objective
from drpo_core.testing.batch import DTYPES
from drpo_core.testing.implementation import REDUCTIONS

__all__ = ["RETURNS", "Declared"]

RETURNS = {"loss": "", "loss+gradient": "[:2]", "loss+gradient+weight": "[:3]", "tuple-first": "[0]"}
"""The kinds of result a loss may have, each with the subscript that selects what the kit needs."""


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The flags that describe a function, as typed."""

    framework: str | None
    objective: str | None
    reduction: str | None
    horizon: float
    form: str
    renamed: list[str]
    constants: list[str]
    returns: str
    max_log_ratio: float | None
    dtypes: list[str]
    boundary_dropped: bool
    not_local: bool

    def given(self) -> list[str]:
        """Return the flags that differ from their defaults."""
        flags = {
            "--framework": self.framework is not None,
            "--objective": self.objective is not None,
            "--reduction": self.reduction is not None,
            "--horizon": self.horizon != 1.0,
            "--form": self.form != "ratio",
            "--map": bool(self.renamed),
            "--set": bool(self.constants),
            "--returns": self.returns != "loss",
            "--max-log-ratio": self.max_log_ratio is not None,
            "--dtype": bool(self.dtypes),
            "--boundary-dropped": self.boundary_dropped,
            "--not-local": self.not_local,
        }
        return [flag for flag, used in flags.items() if used]

    def claims(self) -> dict[str, Any]:
        """Return the declaration as fields of `Implementation`."""
        one_of("--reduction", self.reduction or "none", REDUCTIONS)
        one_of("--form", self.form, ("ratio", "score"))
        one_of("--returns", self.returns, RETURNS)
        for dtype in self.dtypes:
            one_of("--dtype", dtype, DTYPES)
        if not 0.0 < self.horizon < float("inf"):
            msg = f"--horizon: expected a positive number, got {self.horizon:g}"
            raise UsageError(msg)
        if self.max_log_ratio is not None and not self.max_log_ratio > 0.0:
            msg = f"--max-log-ratio: expected a positive number of nats, got {self.max_log_ratio:g}"
            raise UsageError(msg)
        objective = None if self.objective is None else _claimed(self.objective)
        claims: dict[str, Any] = {
            "objective": objective,
            "reduction": self.reduction or "none",
            "horizon": self.horizon,
            "form": self.form,
            "keeps_boundary": not self.boundary_dropped,
            "local": not self.not_local,
        }
        if isinstance(objective, Mode):
            # it says these itself, unless they are given
            said = {"reduction": "--reduction", "horizon": "--horizon", "form": "--form", "local": "--not-local"}
            claims = {name: value for name, value in claims.items() if name not in said or said[name] in self.given()}
        if self.max_log_ratio is not None:
            claims["max_abs_log_ratio"] = self.max_log_ratio
        if self.dtypes:
            claims["dtypes"] = tuple(self.dtypes)
        return claims


def _claimed(text: str) -> Objective:
    """Make the objective and tell what it warned about."""
    parsed = parse_objective(text)
    for warning in parsed.warnings:
        note(f"--objective: {warning}")
    return parsed.objective
