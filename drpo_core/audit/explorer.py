"""The trust region as a page, in numbers: loss and weight of every objective against π, and what it makes of rollouts.

All numbers are computed here by the objectives themselves; `drpo_core.audit.page` embeds them in HTML, whose JavaScript picks
and draws them. `drpo audit --html FILE` writes such a page for recorded rollouts.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from drpo_core.audit.palette import colours
from drpo_core.audit.selection import Row
from drpo_core.audit.statistics import audit
from drpo_core.audit.tokens import ChunkTokens
from drpo_core.objectives import OBJECTIVES, VacuousTrustRegionWarning, family_of, label
from drpo_core.objectives.protocol import loss_of, weight_of
from drpo_core.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from drpo_core.audit.readers import Rollouts
    from drpo_core.objectives import Objective

    Values: TypeAlias = np.ndarray[Any, Any]

__all__ = ["Grid", "explorer_data"]

SIGNS = (1.0, -1.0)
# the objective that a page colours tokens by until the reader chooses another
FIRST_SHOWN = "DRPO"
# so many of a snapshot's tokens are drawn; the figures are of all
DRAWN_TOKENS = 2000
DIGITS = 5
SLIDERS: Mapping[str, tuple[str, Callable[[float], float]]] = {
    "abs(π − μ)": ("delta", lambda delta: delta),
    "abs(r − 1)": ("eps", lambda eps: eps),
    # by Pinsker's inequality the largest threshold whose region lies within δ on abs(π − μ)
    "Binary KL": ("delta", lambda delta: 2.0 * delta**2),
}
"""The slider that moves thresholds on a measure, and the threshold at one of its stops."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the sliders stop: probabilities μ, thresholds δ on abs(π − μ), thresholds ε on abs(r − 1)."""

    mu: tuple[float, ...] = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
    delta: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 12.5)
    eps: tuple[float, ...] = (0.05, 0.1, 0.2, 0.28, 0.5, 1.0, 3.0)

    def including(self, objectives: Sequence[Objective]) -> Grid:
        """Add the thresholds of these objectives to the stops, except those that differ by side."""
        return Grid(
            mu=self.mu,
            delta=tuple(sorted({*self.delta, *_thresholds(objectives, "abs(π − μ)")})),
            eps=tuple(sorted({*self.eps, *_thresholds(objectives, "abs(r − 1)")})),
        )

    def stops(self, slider: str) -> tuple[float, ...]:
        """Return the stops of a slider."""
        return {"mu": self.mu, "delta": self.delta, "eps": self.eps}[slider]

    def pi(self, mu: float) -> Values:
        """Return the probabilities π at which curves are drawn: even steps of [0, 1] and of [0, 4μ], and μ."""
        steps = np.linspace(0.0, 1.0, 101)[1:]
        return np.unique(np.concatenate((steps, steps[1::2] * min(1.0, 4.0 * mu), [1e-4, mu])))


def _thresholds(objectives: Sequence[Objective], measure: str) -> set[float]:
    """Return the thresholds on a measure, but for those that differ by side."""
    found = set()
    for objective in objectives:
        family = family_of(objective)
        value = getattr(objective, family.threshold, None) if family.threshold and family.measure == measure else None
        if value is not None:
            found.add(float(value))
    return found


class _Card(NamedTuple):
    """One drawing of the page: an objective at each stop of its slider, or at the only one if it has no slider."""

    family: str
    slider: str | None
    stops: list[Objective]


def _cards(grid: Grid, objectives: Sequence[Objective]) -> list[_Card]:
    """Return a card for each line of the table, and for each of the given objectives."""
    cards = []
    with warnings.catch_warnings():
        # no warning: the page shows that δ ≥ 1 draws no boundary
        warnings.simplefilter("ignore", VacuousTrustRegionWarning)
        for family in OBJECTIVES:
            if (moved := SLIDERS.get(family.measure or "")) is not None:
                slider, threshold = moved
                cards.append(_Card(family.name, slider, [family.make(threshold(stop)) for stop in grid.stops(slider)]))
            else:
                fixed = family.typical if family.threshold else (None,)
                cards += [_Card(family.name, None, [family.make(value)]) for value in fixed]
    return cards + [_Card(family_of(objective).name, None, [objective]) for objective in objectives]


def explorer_data(
    rollouts: Rollouts | None = None, grid: Grid | None = None, objectives: Sequence[Objective] = ()
) -> dict[str, Any]:
    """Compute all that an explorer shows, in the types of JSON.

    Parameters
    ----------
    rollouts
        Their tokens are drawn, and counted by what each objective does to them.
    grid
        Where the sliders stop; default: ``Grid()``.
    objectives
        What to show beside the table's: your own, or the table's with other hyper-parameters.

    Returns
    -------
    dict
        ``mu``, ``delta``, ``eps``: the sliders' stops. ``pi[m]``: where curves are drawn at the m-th μ.
        ``objectives[i]``: ``loss`` and ``weight``, indexed by sign of A (0: A = 1), μ and threshold, then π;
        ``edge``, by sign and threshold: up to where w > 0, at each of ``plane``. ``snapshots``: tokens and figures.

    Examples
    --------
    >>> from drpo_core.audit.explorer import Grid, explorer_data
    >>> data = explorer_data(grid=Grid(mu=(0.5,), delta=(0.25,), eps=(0.2,)))
    >>> drpo = next(o for o in data["objectives"] if o["family"] == "DRPO")
    >>> at_one = data["pi"][0].index(1.0)
    >>> drpo["weight"][0][0][0][at_one]  # A > 0, μ = 0.5, δ = 0.25, π = 1: w = 1 − 0.5/0.25
    -1.0
    """
    grid = grid or Grid()
    cards = _cards(grid, objectives)
    points = [grid.pi(mu) for mu in grid.mu]
    plane = np.linspace(0.005, 0.995, 100)
    colour = colours(card.family for card in cards)
    tokens = [[_tokens(pi, mu, sign) for mu, pi in zip(grid.mu, points, strict=True)] for sign in SIGNS]
    shown = []
    for family, slider, stops in cards:
        edges = [[_edge(o, np.concatenate((plane, grid.mu)), sign) for o in stops] for sign in SIGNS]
        shown.append(
            {
                "family": family,
                # black would be invisible on a dark page
                "colour": "currentColor" if colour[family] == "#000000" else colour[family],
                "slider": slider,
                "labels": [label(o) for o in stops],
                "loss": [[[_round(loss_of(o, at_mu)) for o in stops] for at_mu in side] for side in tokens],
                "weight": [[[_round(weight_of(o, at_mu)) for o in stops] for at_mu in side] for side in tokens],
                "edge": [[_round(edge[: len(plane)]) for edge in side] for side in edges],
                "own_edge": [[_round([edge[len(plane) + m] for edge in side]) for m in range(len(grid.mu))] for side in edges],
            }
        )
    first = len(cards) - len(objectives) if objectives else [card.family for card in cards].index(FIRST_SHOWN)
    return {
        "mu": list(grid.mu),
        "delta": list(grid.delta),
        "eps": list(grid.eps),
        "pi": [_round(pi) for pi in points],
        "start": {
            "mu": _nearest(grid.mu, 0.25),
            "delta": _nearest(grid.delta, 0.15),
            "eps": _nearest(grid.eps, 0.2),
            "objective": first,
        },
        # where π's slider starts: a token that doubled
        "probe": [_nearest(pi, min(1.0, 2.0 * mu)) for mu, pi in zip(grid.mu, points, strict=True)],
        "windows": [[[0.0, 1.0], [0.0, min(1.0, 4.0 * mu)]] for mu in grid.mu],
        "loss_limits": [
            [[_loss_limits(sign, top / mu) for top in (1.0, min(1.0, 4.0 * mu))] for mu in grid.mu] for sign in SIGNS
        ],
        "plane": _round(plane),
        "objectives": shown,
        "snapshots": [] if rollouts is None else _snapshots(rollouts, cards, grid),
    }


def _tokens(pi: Values, mu: Values | float, sign: float) -> Tokens:
    """Make tokens with A = ±1."""
    return Tokens.checked(np.log(pi), np.log(np.broadcast_to(mu, pi.shape)), np.full_like(pi, sign))


def _edge(objective: Objective, mu: Values, sign: float) -> Values:
    """Return, by bisection, the π at which w stops being positive as π moves along A; 1 or 0 if there is none."""
    near, far = mu.copy(), np.full_like(mu, 1.0 if sign > 0 else 1e-12)

    def inside(pi: Values) -> Values:
        return np.asarray(weight_of(objective, _tokens(pi, mu, sign)) > 0.0)

    never = inside(far)
    for _ in range(40):
        middle = 0.5 * (near + far)
        kept = inside(middle)
        near, far = np.where(kept, middle, near), np.where(kept, far, middle)
    return np.where(never, 1.0 if sign > 0 else 0.0, near)


def _loss_limits(sign: float, largest_ratio: float) -> list[float]:
    """Return an axis for the loss on which the surrogate −A r fits, with room for a penalty."""
    return [-1.1 * largest_ratio, 0.5 * largest_ratio] if sign > 0 else [-0.5 * largest_ratio, 1.1 * largest_ratio]


def _nearest(stops: Sequence[float] | Values, value: float) -> int:
    return int(np.argmin(np.abs(np.asarray(stops) - value)))


def _round(values: Any) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") + 0.0 for value in np.asarray(values).tolist()]


# --- rollouts --------------------------------------------------------------------------------------------------------


def _snapshots(rollouts: Rollouts, cards: Sequence[_Card], grid: Grid) -> list[dict[str, Any]]:
    report = audit(rollouts, [Row(o) for card in cards for o in card.stops])
    found = []
    for name, snapshot in report.snapshots.items():
        # a log-prob above 0 is the audit's to report; here it is drawn at 1
        with np.errstate(over="ignore", invalid="ignore"):
            tokens = _sample(rollouts, name, snapshot.health["active_tokens"])
            kinds = [[_kinds(o, tokens) for o in card.stops] for card in cards]
        log_mu = np.minimum(tokens.behavior_log_prob, 0.0)
        pi, mu = np.exp(np.minimum(tokens.log_prob, 0.0)), np.exp(log_mu)
        figures = iter(snapshot.objectives[1:])  # the audit's own first row is PG-IS
        found.append(
            {
                "name": name,
                "active": snapshot.health["active_tokens"],
                "mu": _round(mu),
                "pi": _round(pi),
                "positive": "".join("01"[a > 0] for a in tokens.advantages.tolist()),
                # the stop of μ's slider that a token is nearest to, in ratio
                "stop": np.abs(log_mu[:, None] - np.log(grid.mu)).argmin(axis=1).tolist(),
                "kinds": kinds,
                "figures": [[_figures(next(figures).figures) for _ in card.stops] for card in cards],
            }
        )
    return found


def _sample(rollouts: Rollouts, name: str, active: int) -> Tokens:
    """Return at most `DRAWN_TOKENS` of a snapshot's active tokens, evenly spaced in the file."""
    step, seen = max(1, -(-active // DRAWN_TOKENS)), 0
    kept: list[tuple[Values, ...]] = []
    for chunk in rollouts.chunks(name):
        where = np.flatnonzero(ChunkTokens.of(chunk).active)
        chosen = where[-seen % step :: step]
        seen += len(where)
        kept.append(tuple(array[chosen] for array in chunk[:3]))
    log_pi, log_mu, advantages = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
    return Tokens.checked(log_pi, log_mu, advantages)


def _kinds(objective: Objective, tokens: Tokens) -> str:
    """Return one letter a token: c(orrected), d(ropped), a(ttenuated), k(ept) or m for amplified."""
    w = weight_of(objective, tokens)
    letters = np.select([w < 0.0, w == 0.0, w < 1.0, w == 1.0], ["c", "d", "a", "k"], "m")
    return "".join(letters.tolist())


def _figures(figures: dict[str, float]) -> dict[str, float | None]:
    """Return shares and mass; None where there is no finite number, such as a share of nothing."""
    names = ("dropped_fraction", "corrective_fraction", "attenuated_fraction", "amplified_fraction", "gradient_mass_kept")
    return {name.partition("_")[0]: _round([figures[name]])[0] if math.isfinite(figures[name]) else None for name in names}
