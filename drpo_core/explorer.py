"""The trust region as a page: loss and weight of every objective against π, and rollouts' own tokens, with sliders.

All numbers are computed here by the objectives themselves and embedded; the page's JavaScript picks and draws them. A page
needs no network and no other file. `drpo audit --html FILE` writes one for recorded rollouts.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from drpo_core.audit import AnyObjective, Row, active_tokens, audit
from drpo_core.objectives import CISPO, DPPO, DRPO, SPO, MaskDRPO, PolicyGradient, PPOClip
from drpo_core.tokens import Tokens
from drpo_core.objectives.thresholds import VacuousTrustRegionWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drpo_core.audit import Report
    from drpo_core.rollouts import Rollouts

    Values: TypeAlias = np.ndarray[Any, Any]

__all__ = ["COLOURS", "Grid", "explorer_data", "explorer_html", "report_html"]

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = {
    "PG-IS": "#000000",
    "CISPO": "#999999",
    "PPO-clip": "#0072B2",
    "SPO": "#56B4E9",
    "DPPO-TV": "#E69F00",
    "DPPO-KL": "#CC79A7",
    "DRPO": "#D55E00",
    "Mask-DRPO": "#009E73",
}
SIGNS = (1.0, -1.0)
# as many of a snapshot's tokens as a page draws; figures are of all
DRAWN_TOKENS = 2000
DIGITS = 5


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the sliders stop: probabilities μ, thresholds δ on abs(π − μ), thresholds ε on abs(r − 1)."""

    mu: tuple[float, ...] = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
    delta: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 12.5)
    eps: tuple[float, ...] = (0.05, 0.1, 0.2, 0.28, 0.5, 1.0, 3.0)

    def including(self, objectives: Sequence[AnyObjective]) -> Grid:
        """The grid with the thresholds of these objectives among its stops, but for those that differ by side."""
        found: dict[str, set[float]] = {
            name: {float(value) for o in objectives if (value := getattr(o, name, None)) is not None}
            for name in ("delta", "eps")
        }
        nats = {
            float(o.delta) for o in objectives if isinstance(o, DPPO) and o.divergence != "binary_tv" and o.delta is not None
        }
        return Grid(
            mu=self.mu,
            delta=tuple(sorted({*self.delta, *(found["delta"] - nats)})),
            eps=tuple(sorted({*self.eps, *found["eps"]})),
        )

    def pi(self, mu: float) -> Values:
        """Probabilities π that curves are drawn at: even steps of [0, 1] and of [0, 4μ], and μ."""
        steps = np.linspace(0.0, 1.0, 101)[1:]
        return np.unique(np.concatenate((steps, steps[1::2] * min(1.0, 4.0 * mu), [1e-4, mu])))


def _families(grid: Grid) -> list[tuple[str | None, list[AnyObjective]]]:
    """Each family's slider, and its objective at each of the slider's stops."""
    kl: Callable[[float], AnyObjective] = lambda delta: DPPO(delta=2.0 * delta**2, divergence="binary_kl")
    of_delta: tuple[Callable[[float], AnyObjective], ...] = (
        lambda delta: DPPO(delta=delta),
        kl,
        lambda delta: DRPO(delta=delta),
        lambda delta: MaskDRPO(delta=delta),
    )
    with warnings.catch_warnings():
        # that δ ≥ 1 draws no boundary is what the page shows
        warnings.simplefilter("ignore", VacuousTrustRegionWarning)
        return [
            (None, [PolicyGradient()]),
            (None, [CISPO(max_ratio=5.0)]),
            ("eps", [PPOClip(eps=eps) for eps in grid.eps]),
            ("eps", [SPO(eps=eps) for eps in grid.eps]),
            *(("delta", [make(delta) for delta in grid.delta]) for make in of_delta),
        ]


def explorer_data(rollouts: Rollouts | None = None, grid: Grid | None = None) -> dict[str, Any]:
    """All that an explorer shows, as JSON takes it.

    Parameters
    ----------
    rollouts
        Their tokens are drawn, and counted by what each objective does to them.
    grid
        Where the sliders stop; default: ``Grid()``.

    Returns
    -------
    dict
        ``mu``, ``delta``, ``eps``: the sliders' stops. ``pi[m]``: where curves are drawn at the m-th μ.
        ``objectives[i]``: ``loss`` and ``weight``, indexed by sign of A (0: A = 1), μ and threshold, then π;
        ``edge``, by sign and threshold: up to where w > 0, at each of ``plane``. ``snapshots``: tokens and figures.

    Examples
    --------
    >>> from drpo_core.explorer import Grid, explorer_data
    >>> data = explorer_data(grid=Grid(mu=(0.5,), delta=(0.25,), eps=(0.2,)))
    >>> drpo = next(o for o in data["objectives"] if o["family"] == "DRPO")
    >>> at_one = data["pi"][0].index(1.0)
    >>> drpo["weight"][0][0][0][at_one]  # A > 0, μ = 0.5, δ = 0.25, π = 1: w = 1 − 0.5/0.25
    -1.0
    """
    grid = grid or Grid()
    families = _families(grid)
    points = [grid.pi(mu) for mu in grid.mu]
    plane = np.linspace(0.005, 0.995, 100)
    objectives = []
    for slider, stops in families:
        curves = [[[_curve(o, pi, mu, sign) for o in stops] for mu, pi in zip(grid.mu, points, strict=True)] for sign in SIGNS]
        objectives.append(
            {
                "family": Row(stops[0]).family,
                "colour": "currentColor" if COLOURS[Row(stops[0]).family] == "#000000" else COLOURS[Row(stops[0]).family],
                "slider": slider,
                "labels": [Row(o).label for o in stops],
                "loss": [[[curve[0] for curve in row] for row in side] for side in curves],
                "weight": [[[curve[1] for curve in row] for row in side] for side in curves],
                "edge": [[_round(_edge(o, plane, sign)) for o in stops] for sign in SIGNS],
                "own_edge": [
                    [_round([float(_edge(o, np.array([mu]), sign)[0]) for o in stops]) for mu in grid.mu] for sign in SIGNS
                ],
            }
        )
    return {
        "mu": list(grid.mu),
        "delta": list(grid.delta),
        "eps": list(grid.eps),
        "pi": [_round(pi) for pi in points],
        "start": {"mu": _nearest(grid.mu, 0.25), "delta": _nearest(grid.delta, 0.15), "eps": _nearest(grid.eps, 0.2)},
        # where π's slider starts: a token that doubled
        "probe": [_nearest(pi, min(1.0, 2.0 * mu)) for mu, pi in zip(grid.mu, points, strict=True)],
        "windows": [[[0.0, 1.0], [0.0, min(1.0, 4.0 * mu)]] for mu in grid.mu],
        "loss_limits": [
            [[_loss_limits(sign, top / mu) for top in (1.0, min(1.0, 4.0 * mu))] for mu in grid.mu] for sign in SIGNS
        ],
        "plane": _round(plane),
        "objectives": objectives,
        "snapshots": [] if rollouts is None else _snapshots(rollouts, families, grid),
    }


def _curve(objective: AnyObjective, pi: Values, mu: float, sign: float) -> tuple[list[float], list[float]]:
    """Loss and weight of one token at A = ±1, against π."""
    tokens = Tokens.of(np.log(pi), np.full_like(pi, np.log(mu)), np.full_like(pi, sign), xp=np)
    return _round(objective.loss(tokens)), _round(objective.weight(tokens))


def _edge(objective: AnyObjective, mu: Values, sign: float) -> Values:
    """How far π may move along A until w > 0 no more, by bisection; 1 or 0 if that never happens."""
    near, far = mu.copy(), np.full_like(mu, 1.0 if sign > 0 else 1e-12)

    def inside(pi: Values) -> Values:
        return np.asarray(objective.weight(Tokens.of(np.log(pi), np.log(mu), np.full_like(mu, sign), xp=np)) > 0.0)

    never = inside(far)
    for _ in range(40):
        middle = 0.5 * (near + far)
        kept = inside(middle)
        near, far = np.where(kept, middle, near), np.where(kept, far, middle)
    return np.where(never, 1.0 if sign > 0 else 0.0, near)


def _loss_limits(sign: float, largest_ratio: float) -> list[float]:
    """An axis for the loss on which the surrogate −A r fits, with room for a penalty."""
    return [-1.1 * largest_ratio, 0.5 * largest_ratio] if sign > 0 else [-0.5 * largest_ratio, 1.1 * largest_ratio]


def _nearest(stops: Sequence[float] | Values, value: float) -> int:
    return int(np.argmin(np.abs(np.asarray(stops) - value)))


def _round(values: Any) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") + 0.0 for value in np.asarray(values).tolist()]


# --- rollouts --------------------------------------------------------------------------------------------------------


def _snapshots(
    rollouts: Rollouts, families: Sequence[tuple[str | None, Sequence[AnyObjective]]], grid: Grid
) -> list[dict[str, Any]]:
    table = [Row(o) for _, stops in families for o in stops]
    report = audit(rollouts, table)
    found = []
    for name, snapshot in report.snapshots.items():
        # a log-prob above 0 is the audit's to report; here it is drawn at 1
        with np.errstate(over="ignore", invalid="ignore"):
            tokens = _sample(rollouts, name, snapshot.health["active_tokens"])
            kinds = [[_kinds(o, tokens) for o in stops] for _, stops in families]
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
                "figures": [[_figures(next(figures).figures) for _ in stops] for _, stops in families],
            }
        )
    return found


def _sample(rollouts: Rollouts, name: str, active: int) -> Tokens:
    """At most `DRAWN_TOKENS` of a snapshot's active tokens, evenly spaced in the file."""
    step, seen = max(1, -(-active // DRAWN_TOKENS)), 0
    kept: list[tuple[Values, ...]] = []
    for chunk in rollouts.chunks(name):
        where = np.flatnonzero(active_tokens(chunk)[1])
        chosen = where[-seen % step :: step]
        seen += len(where)
        kept.append(tuple(array[chosen] for array in chunk[:3]))
    log_pi, log_mu, advantages = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
    return Tokens.of(log_pi, log_mu, advantages, xp=np)


def _kinds(objective: AnyObjective, tokens: Tokens) -> str:
    """A letter a token: corrected, dropped, attenuated, kept or amplified."""
    w = objective.weight(tokens)
    letters = np.select([w < 0.0, w == 0.0, w < 1.0, w == 1.0], ["c", "d", "a", "k"], "m")
    return "".join(letters.tolist())


def _figures(figures: dict[str, float]) -> dict[str, float | None]:
    """Shares and mass; None where there is no finite number, such as a share of nothing."""
    names = ("dropped_fraction", "corrective_fraction", "attenuated_fraction", "amplified_fraction", "gradient_mass_kept")
    return {name.partition("_")[0]: _round([figures[name]])[0] if math.isfinite(figures[name]) else None for name in names}


# --- HTML ------------------------------------------------------------------------------------------------------------


def explorer_html(data: dict[str, Any]) -> str:
    """The explorer as a fragment of HTML: style, controls, script, and the data.

    Parameters
    ----------
    data
        From `explorer_data`.

    Returns
    -------
    str
        To be put into a page's body.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    # inside <script> only these characters could end the data
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _template("explorer.html").replace("@DATA@", text)


def report_html(report: Report, data: dict[str, Any], columns: dict[str, str]) -> str:
    """An audit's report with its explorer, as one self-contained page.

    Parameters
    ----------
    report
        From ``drpo_core.audit.audit``.
    data
        From `explorer_data`, of the same rollouts.
    columns
        Titles of the table's columns, each with the figure it shows.

    Returns
    -------
    str
        An HTML document. What comes from the file is text in it, whatever it holds.
    """
    parts = []
    for name, snapshot in report.snapshots.items():
        health = snapshot.health
        pi, mu, a, mask = (report.arrays[role] for role in ("log_prob", "behavior_log_prob", "advantages", "mask"))
        facts = [
            (
                "arrays",
                f"π {pi[name]}, μ {mu}, A {a}, mask {mask}",
            ),
            ("tokens", f"{health['valid_tokens']:,} valid of {health['tokens']:,}, {health['active_tokens']:,} with A ≠ 0"),
            ("policy", f"E_μ[r] = {health['ratio_mean']:.4f}, mean |π − μ| = {health['binary_tv_mean']:.5f}"),
            *(("warning", warning) for warning in snapshot.warnings),
        ]
        head = "".join(f'<th scope="col">{escape(title)}</th>' for title in ("objective", *columns, "weights", "mass kept"))
        rows = "".join(_report_row(audited.row, audited.figures, columns) for audited in snapshot.objectives)
        listed = "".join(f"<dt>{escape(term)}</dt><dd>{escape(fact)}</dd>" for term, fact in facts)
        parts.append(
            f"<h2>{escape(name)}</h2><dl>{listed}</dl>"
            f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    # one pass over the template, so that a name that looks like a mark stays a name
    filled = {
        "@TITLE@": escape(report.file),
        "@REPORT@": "".join(parts) + (f"<ul>{notes}</ul>" if notes else ""),
        "@EXPLORER@": explorer_html(data),
    }
    return re.sub("@(TITLE|REPORT|EXPLORER)@", lambda mark: filled[mark.group()], _template("report.html"))


def _report_row(row: Row, figures: dict[str, float], columns: dict[str, str]) -> str:
    label = row.label + (f" (q={row.quantile:g})" if row.quantile is not None else "")
    cells = [
        *(f"{figures[column]:.2%}" for column in columns.values()),
        f"{figures['weight_min']:.3f} … {figures['weight_max']:.3f}",
        f"{figures['gradient_mass_kept']:.3f}",
    ]
    return f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'


def _template(name: str) -> str:
    return (files("drpo_core") / "templates" / name).read_text(encoding="utf-8")
