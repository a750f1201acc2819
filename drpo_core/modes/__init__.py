"""Modes: a whole policy loss as one value, and those that frameworks name.

A function a framework, called as the framework names its loss and spells its configuration:
``modes.verl("gspo", clip_ratio_low=3e-4, clip_ratio_high=4e-4)``. It returns a `Mode`.
"""

from __future__ import annotations

from drpo_core.modes.areal import areal
from drpo_core.modes.mode import DoubleRatioWarning, Mode
from drpo_core.modes.nemo_rl import nemo_rl
from drpo_core.modes.open_instruct import open_instruct
from drpo_core.modes.openrlhf import openrlhf
from drpo_core.modes.prime_rl import prime_rl
from drpo_core.modes.skyrl import skyrl
from drpo_core.modes.slime import slime
from drpo_core.modes.tinker import tinker
from drpo_core.modes.torchrl import torchrl
from drpo_core.modes.trl import trl
from drpo_core.modes.tunix import tunix
from drpo_core.modes.verl import VERL_PRESETS, verl

__all__ = [
    "VERL_PRESETS",
    "DoubleRatioWarning",
    "Mode",
    "areal",
    "nemo_rl",
    "open_instruct",
    "openrlhf",
    "prime_rl",
    "skyrl",
    "slime",
    "tinker",
    "torchrl",
    "trl",
    "tunix",
    "verl",
]
