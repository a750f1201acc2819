"""What a checkpoint may hold: `torch.load` refuses classes that it was not told of."""

from __future__ import annotations

from typing import get_args

from torch.serialization import add_safe_globals

from drpo_core.diagnostics import Statistic
from drpo_core.objectives import OBJECTIVES

__all__ = ["register_classes"]


def register_classes() -> None:
    """Let ``torch.load(weights_only=True)``, its default, make objectives and diagnostics: plain data, without code."""
    add_safe_globals([*dict.fromkeys(family.objective for family in OBJECTIVES), *get_args(Statistic)])
