"""The objectives of the table under the names, and at the thresholds, of a framework's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_core.objectives import OBJECTIVES

if TYPE_CHECKING:
    from drpo_core.objectives import Family, Objective

__all__ = ["at_clip_range", "families_by_name", "resolved"]

_CAPS = ("max_ratio", "dual_clip")


def families_by_name() -> dict[str, Family]:
    """Every family by the name of its loss in a framework: ``drpo``, and ``drpo_core_ppo_clip`` for PPO-clip."""

    def name(family: Family) -> str:
        word = family.name.lower().replace("-", "_")
        return word if word == "drpo" else f"drpo_core_{word}"

    return {name(family): family for family in OBJECTIVES}


def at_clip_range(family: Family, low: float, high: float, *, cap: float | None = None) -> Any:
    """The family's objective at the thresholds (low, high) of a framework's clip range.

    A threshold that is one number is `high`; if it bounds the ratio, 1 + `high`. A family that keeps the ratio between two
    bounds has 1 − `low` and 1 + `high`. `cap` is what bounds the ratio besides, where the class takes that: its `max_ratio`
    or `dual_clip`.

    Examples
    --------
    >>> from drpo_core.objectives import label
    >>> from drpo_core.objectives.configured import at_clip_range, families_by_name
    >>> label(at_clip_range(families_by_name()["drpo_core_ppo_clip"], 0.2, 0.28, cap=3.0))
    'PPO-clip ε=0.2/0.28 dual_clip=3'
    >>> label(at_clip_range(families_by_name()["drpo_core_cispo"], 0.2, 4.0))
    'CISPO c=5'
    >>> label(at_clip_range(families_by_name()["drpo_core_icepop"], 0.2, 0.28, cap=3.0))
    'IcePop c=0.8/1.28'
    """
    parameters = getattr(family.objective, "__dataclass_fields__", {})
    if {"min_ratio", "max_ratio"} <= family.fixed.keys():
        return family._replace(fixed={**family.fixed, "min_ratio": 1.0 - low, "max_ratio": 1.0 + high}).make()
    caps = {name: cap for name in _CAPS if name in parameters and name != family.threshold}
    capped = family._replace(fixed={**family.fixed, **caps})
    if family.threshold is None:
        return capped.make()
    if f"{family.threshold}_low" in parameters:
        return capped.make((low, high))
    return capped.make(1.0 + high if family.threshold == "max_ratio" else high)


def resolved(objective: Any, config: Any) -> Objective:
    """An objective that was given, or what a given function makes of the configuration."""
    chosen: Objective = objective if hasattr(objective, "weight") else objective(config)
    return chosen
