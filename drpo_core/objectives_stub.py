"""Stands in for the table of objectives until the core has it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from drpo_core.divergence import binary_kl_of
from drpo_core.objectives import CISPO, DPPO, DRPO, SPO, MaskDRPO, Objective, PolicyGradient, PPOClip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core.ratio import Tokens
    from drpo_core.types import Array


class Family(NamedTuple):
    """One line an objective."""

    name: str
    objective: type[Any]
    threshold: str | None = None
    typical: tuple[float | tuple[float, float], ...] = ()
    measure: str | None = None
    fixed: Mapping[str, Any] = {}

    def make(self, value: float | tuple[float, float] | None = None) -> Objective:
        """Make the objective at a threshold."""
        if value is None:
            return self.objective(**self.fixed)  # type: ignore[no-any-return]
        sides: dict[str, Any] = {str(self.threshold): value}
        if isinstance(value, tuple):
            sides = {f"{self.threshold}_low": value[0], f"{self.threshold}_high": value[1]}
        return self.objective(**sides, **self.fixed)  # type: ignore[no-any-return]


OBJECTIVES: tuple[Family, ...] = (
    Family("PG-IS", PolicyGradient),
    Family("CISPO", CISPO, "max_ratio", (5.0,)),
    Family("PPO-clip", PPOClip, "eps", (0.2, (0.2, 0.28)), "abs(r − 1)"),
    Family("SPO", SPO, "eps", (0.2, (0.2, 0.28)), "abs(r − 1)"),
    Family("DPPO-TV", DPPO, "delta", (0.15,), "abs(π − μ)", {"divergence": "binary_tv"}),
    Family("DPPO-KL", DPPO, "delta", (0.05,), "Binary KL", {"divergence": "binary_kl"}),
    Family("DRPO", DRPO, "delta", (0.15, 12.5), "abs(π − μ)"),
    Family("Mask-DRPO", MaskDRPO, "delta", (0.15,), "abs(π − μ)"),
)
MEASURES: Mapping[str, Callable[[Tokens], Array]] = {
    "abs(π − μ)": lambda tokens: tokens.xp.abs(tokens.shift),
    "abs(r − 1)": lambda tokens: tokens.xp.abs(tokens.ratio_minus_one),
    "Binary KL": lambda tokens: tokens.xp.abs(binary_kl_of(tokens)),
}


def family_of(objective: Objective) -> Family:
    """Find the objective in the table."""
    for family in OBJECTIVES:
        if type(objective) is family.objective and all(getattr(objective, k) == v for k, v in family.fixed.items()):
            return family
    return Family(type(objective).__name__, type(objective))


def label(objective: Any) -> str:
    """Name and hyper-parameters, for people."""
    symbols = {"delta": "δ", "eps": "ε", "max_ratio": "c"}
    family = family_of(objective)
    values = (
        {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
        if dataclasses.is_dataclass(objective)
        else vars(objective)
    )
    numbers = {name: value for name, value in values.items() if value is not None and name not in family.fixed}
    for name in ("delta", "eps"):
        if f"{name}_low" in numbers:
            numbers = {name: (numbers.pop(f"{name}_low"), numbers.pop(f"{name}_high")), **numbers}

    def number(value: Any) -> str:
        if isinstance(value, tuple):
            return "/".join(map(number, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return " ".join((family.name, *(f"{symbols.get(name, name)}={number(value)}" for name, value in numbers.items())))


def inside_of(objective: Any, tokens: Tokens) -> Array:
    """Whether each token is in the trust region; all are if there is none."""
    inside = getattr(objective, "inside", None)
    return tokens.log_ratio == tokens.log_ratio if inside is None else inside(tokens)
