"""What a checkpoint may hold: `torch.load` refuses classes that it was not told of."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import get_args

from torch.serialization import add_safe_globals

from drpo_core import anchors, corrections, modes, objectives, penalties
from drpo_core.diagnostics import Statistic

__all__ = ["register_classes"]


def register_classes() -> None:
    """Let ``torch.load(weights_only=True)``, its default, make objectives, modes and diagnostics: plain data, without code."""
    public = [getattr(room, name) for room in (objectives, anchors, corrections, penalties, modes) for name in room.__all__]
    values = [kind for kind in public if isinstance(kind, type) and is_dataclass(kind)]
    add_safe_globals([*values, *get_args(Statistic)])
