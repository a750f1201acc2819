"""The rows of an audit: each line of the table of objectives at some thresholds, or any objective of the user's own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from drpo_core.modes import Mode
from drpo_core.objectives import (
    OBJECTIVES,
    PolicyGradient,
    Threshold,
    VacuousTrustRegionWarning,
    family_of,
    label,
    parameters_of,
)
from drpo_core.objectives.protocol import weight_of
from drpo_core.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drpo_core.objectives import Family, Objective

__all__ = ["SWEEPS", "Row", "Sweep", "as_row", "row_at", "rows", "swept_by"]

Sweep: TypeAlias = tuple[str | None, str | None]

SWEEPS: dict[str, Sweep] = {
    "delta": ("delta", "abs(π − μ)"),
    "delta_kl": ("delta", "Binary KL"),
    "eps": ("eps", "abs(r − 1)"),
    "max_ratio": ("max_ratio", None),
}
"""The arguments of `rows`: which hyper-parameter each sets, of the families that bound which measure with it."""


@dataclass(frozen=True, slots=True)
class Row:
    """An objective to audit.

    `quantile` is the share of diverging tokens that its threshold was chosen to drop, if it was; `warning` says why the
    threshold is vacuous, if it is.
    """

    objective: Objective
    quantile: float | None = None
    warning: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The hyper-parameters that are set: fields of a dataclass, attributes of any other object."""
        return parameters_of(self.objective)

    @property
    def name(self) -> str:
        """The objective as one would write it in Python."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())
        return f"{type(self.objective).__name__}({arguments})"

    @property
    def family(self) -> str:
        """The objective's name as the papers write it."""
        return family_of(self.objective).name

    @property
    def label(self) -> str:
        """Family and hyper-parameters, for people."""
        return label(self.objective)


def rows(
    *,
    delta: Sequence[Threshold] | None = None,
    delta_kl: Sequence[Threshold] | None = None,
    eps: Sequence[Threshold] | None = None,
    max_ratio: Sequence[float] | None = None,
    quantile: float | None = None,
) -> list[Row]:
    """Every objective of `drpo_core.objectives.OBJECTIVES` but PG-IS, at each of the given thresholds.

    A threshold is one number, or (low, high). None takes the values that the table calls typical, as families that no
    argument moves always do. At δ ≥ 1 DPPO Binary-TV and Mask-DRPO are the unregularised surrogate, so they get no row
    there; DRPO does.

    Parameters
    ----------
    delta
        δ of DPPO Binary-TV, DRPO and Mask-DRPO, differences of probabilities.
    delta_kl
        δ of DPPO Binary-KL, nats.
    eps
        ε of PPO-clip and SPO, differences of importance ratios.
    max_ratio
        c of CISPO.
    quantile
        The share of diverging tokens that these thresholds drop, if they were chosen so.

    Returns
    -------
    list
        Rows in the order of the table.

    Raises
    ------
    TypeError, ValueError
        If a threshold is not a finite positive number.

    Examples
    --------
    >>> from drpo_core.audit import rows
    >>> [row.label for row in rows(delta=[0.1, 2.0], delta_kl=[], eps=[(0.2, 0.28)], max_ratio=[])][:6]
    ['PPO-clip ε=0.2/0.28', 'SPO ε=0.2/0.28', 'DPPO-TV δ=0.1', 'DRPO δ=0.1', 'DRPO δ=2', 'Mask-DRPO δ=0.1']
    """
    given = {
        SWEEPS["delta"]: delta,
        SWEEPS["delta_kl"]: delta_kl,
        SWEEPS["eps"]: eps,
        SWEEPS["max_ratio"]: max_ratio,
    }
    found = []
    for family in OBJECTIVES:
        if family.objective is PolicyGradient:
            continue
        values = given.get(_sweep(family))
        thresholds = (family.typical if family.threshold else (None,)) if values is None else values
        found += [row for value in thresholds if (row := row_at(family, value, quantile)) is not None]
    return found


def row_at(family: Family, value: Threshold | None, quantile: float | None = None) -> Row | None:
    """Return a family's row at a threshold; None if a side of the threshold leaves it the unregularised surrogate."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VacuousTrustRegionWarning)
        objective = family.make(value)
    if not caught:
        return Row(objective, quantile)
    return None if _surrogate_on_a_side(objective) else Row(objective, quantile, str(caught[0].message))


def as_row(objective: Row | Objective) -> Row:
    """Return a row as it is, and an objective as a row; of a mode, its objective at the behaviour policy.

    Raises
    ------
    ValueError
        If a mode takes its ratio against another anchor, or has corrections or penalties: rollout files have neither the
        other policies nor, in a chunk of tokens, whole sequences.
    """
    if isinstance(objective, Row):
        return objective
    return Row(objective.alone if isinstance(objective, Mode) else objective)


def swept_by(name: str) -> list[Family]:
    """Return the families whose thresholds an argument of `rows` sets."""
    return [family for family in OBJECTIVES if _sweep(family) == SWEEPS[name]]


def _sweep(family: Family) -> Sweep:
    return family.threshold, family.measure


def _surrogate_on_a_side(objective: Objective) -> bool:
    """Return whether, for one sign of A, w = 1 even where π and μ are as far apart as they can be."""
    certain, hopeless = 0.0, -700.0
    log_prob, behavior_log_prob = np.array([certain, hopeless]), np.array([hopeless, certain])
    for a in (np.ones(2), -np.ones(2)):
        if np.all(weight_of(objective, Tokens.checked(log_prob, behavior_log_prob, a)) == 1.0):
            return True
    return False
