"""The objectives: one file a family, one class an objective, and the one table of all of them.

Whatever lists objectives iterates over `OBJECTIVES`: the audit and its plots, the explorer, `drpo check`, the tables of
the docs and the tests. A new objective is a file here and a line there.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from drpo_core.divergence import binary_kl_of
from drpo_core.objectives.cispo import CISPO
from drpo_core.objectives.dppo import DPPO
from drpo_core.objectives.drpo import DRPO, MaskDRPO
from drpo_core.objectives.icepop import IcePop
from drpo_core.objectives.ipo import IPO
from drpo_core.objectives.policy_gradient import PolicyGradient
from drpo_core.objectives.ppo import PPOClip
from drpo_core.objectives.protocol import Objective
from drpo_core.objectives.reinforce import Reinforce
from drpo_core.objectives.sapo import SAPO
from drpo_core.objectives.spo import SPO
from drpo_core.objectives.thresholds import VacuousTrustRegionWarning
from drpo_core.objectives.topr import TOPR

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core._arrays import Array
    from drpo_core.tokens import Tokens

__all__ = [
    "CISPO",
    "DPPO",
    "DRPO",
    "IPO",
    "MEASURES",
    "OBJECTIVES",
    "SAPO",
    "SPO",
    "TOPR",
    "Family",
    "IcePop",
    "MaskDRPO",
    "Objective",
    "PPOClip",
    "PolicyGradient",
    "Reinforce",
    "Threshold",
    "VacuousTrustRegionWarning",
    "family_of",
    "is_known",
    "label",
    "parameters_of",
]

Threshold: TypeAlias = float | tuple[float, float]
"""One number, or (low, high)."""

MEASURES: Mapping[str, Callable[[Tokens], Array]] = {
    "abs(π − μ)": lambda tokens: tokens.xp.abs(tokens.shift),
    "abs(r − 1)": lambda tokens: tokens.xp.abs(tokens.ratio_minus_one),
    "Binary KL": binary_kl_of,
}
"""What a threshold may bound, by name."""


class Family(NamedTuple):
    """An objective without its threshold.

    `name` is its name in the papers, `threshold` the parameter that is swept, `typical` the values that `drpo audit`
    shows, `measure` what the threshold bounds (a key of `MEASURES`), `fixed` the other parameters of the family.
    """

    name: str
    objective: type[Any]
    threshold: str | None = None
    typical: tuple[Threshold, ...] = ()
    measure: str | None = None
    fixed: Mapping[str, Any] = MappingProxyType({})

    def make(self, threshold: Threshold | None = None) -> Any:
        """The objective at a threshold: one number, (low, high), or None for a family that has none."""
        if threshold is None:
            return self.objective(**self.fixed)
        if isinstance(threshold, tuple):
            low, high = threshold
            return self.objective(**{f"{self.threshold}_low": low, f"{self.threshold}_high": high}, **self.fixed)
        return self.objective(**{str(self.threshold): threshold}, **self.fixed)


OBJECTIVES: tuple[Family, ...] = (
    Family("PG-IS", PolicyGradient),
    Family("CISPO", CISPO, "max_ratio", (5.0,)),
    Family("PPO-clip", PPOClip, "eps", (0.2, (0.2, 0.28)), "abs(r − 1)"),
    Family("SPO", SPO, "eps", (0.2, (0.2, 0.28)), "abs(r − 1)"),
    Family("DPPO-TV", DPPO, "delta", (0.15,), "abs(π − μ)", {"divergence": "binary_tv"}),
    Family("DPPO-KL", DPPO, "delta", (0.05,), "Binary KL", {"divergence": "binary_kl"}),
    Family("DRPO", DRPO, "delta", (0.15, 12.5), "abs(π − μ)"),
    Family("Mask-DRPO", MaskDRPO, "delta", (0.15,), "abs(π − μ)"),
    Family("REINFORCE", Reinforce),
    Family("SAPO", SAPO, fixed={"tau_positive": 1.0, "tau_negative": 1.05}),
    Family("IcePop", IcePop, fixed={"min_ratio": 0.5, "max_ratio": 5.0}),
    Family("IPO", IPO, "delta", (0.3,), "abs(π − μ)"),
    Family("TOPR", TOPR),
)

_SYMBOLS = {"delta": "δ", "eps": "ε", "max_ratio": "c"}
# the two parameters that are written as low/high
_PAIRS = {
    "δ": ("delta_low", "delta_high"),
    "ε": ("eps_low", "eps_high"),
    "c": ("min_ratio", "max_ratio"),
    "τ": ("tau_negative", "tau_positive"),
}


def is_known(objective: object) -> bool:
    """Whether its class is in the table: its methods look at one token at a time, and at nothing but its fields."""
    return any(type(objective) is family.objective for family in OBJECTIVES)


def family_of(objective: object) -> Family:
    """The family in the table, or one named after the class."""
    for family in OBJECTIVES:
        if type(objective) is family.objective and all(getattr(objective, k) == v for k, v in family.fixed.items()):
            return family
    return Family(type(objective).__name__, type(objective))


def label(objective: object) -> str:
    """Family and hyper-parameters, for people: ``DRPO δ=0.15``, ``PPO-clip ε=0.2/0.28``.

    Examples
    --------
    >>> from drpo_core import DPPO, PPOClip
    >>> from drpo_core.objectives import label
    >>> label(PPOClip(eps_low=0.2, eps_high=0.28)), label(DPPO(delta=0.05, divergence="binary_kl"))
    ('PPO-clip ε=0.2/0.28', 'DPPO-KL δ=0.05')
    """
    family = family_of(objective)
    given = parameters_of(objective)
    numbers = {name: value for name, value in given.items() if name not in family.fixed or isinstance(value, float)}
    for symbol, pair in _PAIRS.items():
        if all(side in numbers for side in pair):
            low, high = (numbers.pop(side) for side in pair)
            numbers = {symbol: f"{low:.4g}/{high:.4g}", **numbers}
    parts = [
        f"{_SYMBOLS.get(name, name)}={value:.4g}" if isinstance(value, float) else f"{_SYMBOLS.get(name, name)}={value}"
        for name, value in numbers.items()
    ]
    return " ".join((family.name, *parts))


def parameters_of(objective: object) -> dict[str, Any]:
    """The hyper-parameters that are set: fields of a dataclass, or the instance's attributes."""
    if dataclasses.is_dataclass(objective):
        values = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    else:
        values = dict(getattr(objective, "__dict__", {}))
    return {name: value for name, value in values.items() if value is not None}
