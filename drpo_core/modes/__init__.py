"""Modes: a whole policy loss as one value, and those that frameworks name."""

from __future__ import annotations

from drpo_core.modes.mode import DoubleRatioWarning, Mode

__all__ = ["DoubleRatioWarning", "Mode"]
