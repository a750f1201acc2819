"""Modes that are more than an objective, each once: what tests of compiled loops iterate over."""

from mode_oracles import EXAMPLES, quiet
from named_modes import rows

from drpo_core import PPOClip
from drpo_core.anchors import Prefix, Proximal, Sequence
from drpo_core.corrections import (
    FutureRatio,
    ImportanceWeight,
    MinimumPrefixRatio,
    PrefixBudgetMask,
    RatioMask,
    SecondMomentMask,
    Veto,
)
from drpo_core.modes import Mode
from drpo_core.modes.mode import parts_of
from drpo_core.penalties import CovariancePenalty, Penalty

EVERYTHING = Mode(
    PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
    anchor=Sequence(Proximal()),
    corrections=(ImportanceWeight(high=2.0), Veto(low=0.1, high=10.0), RatioMask(level="geometric", low=0.9, high=1.1)),
    penalties=(Penalty(coefficient=0.1),),
    reduction="sequence_mean_token_mean",
    count_masked=False,
)
ACROSS_ROWS = (CovariancePenalty, FutureRatio, MinimumPrefixRatio, Prefix, PrefixBudgetMask, SecondMomentMask)
"""They look at the order of the tokens, or at those of other rows."""


def needs_arrays(mode):
    parts = parts_of(mode)
    return any(isinstance(part, ACROSS_ROWS) or getattr(part, "normalize", False) for part in parts)


def distinct():
    """Every named mode and every example of a part, once."""
    named = [row.mode for row in rows()]
    parts = [quiet(example) for example in EXAMPLES if not hasattr(example, "log_prob")]
    anchored = [Mode(PPOClip(eps=0.2), anchor=example) for example in EXAMPLES if hasattr(example, "log_prob")]
    found = dict.fromkeys((*named, *parts, *anchored, EVERYTHING))
    return [mode for mode in found if not mode.is_plain]
