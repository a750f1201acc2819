"""Modes: a whole policy loss as one value, and those that frameworks name.

A function a framework, called as the framework names its loss and spells its configuration:
``modes.verl("gspo", clip_ratio_low=3e-4, clip_ratio_high=4e-4)``. It returns a `Mode`.
"""

from __future__ import annotations

from drpo_core.modes._areal import areal
from drpo_core.modes._ms_swift import ms_swift
from drpo_core.modes._nemo_rl import nemo_rl
from drpo_core.modes._open_instruct import open_instruct
from drpo_core.modes._openrlhf import openrlhf
from drpo_core.modes._prime_rl import prime_rl
from drpo_core.modes._roll import roll
from drpo_core.modes._skyrl import skyrl
from drpo_core.modes._slime import slime
from drpo_core.modes._tinker import tinker
from drpo_core.modes._torchrl import torchrl
from drpo_core.modes._trl import trl
from drpo_core.modes._tunix import tunix
from drpo_core.modes._verl import VERL_PRESETS, verl
from drpo_core.modes.mode import DoubleRatioWarning, Mode

__all__ = [
    "VERL_PRESETS",
    "DoubleRatioWarning",
    "Mode",
    "areal",
    "ms_swift",
    "nemo_rl",
    "open_instruct",
    "openrlhf",
    "prime_rl",
    "roll",
    "skyrl",
    "slime",
    "tinker",
    "torchrl",
    "trl",
    "tunix",
    "verl",
]
