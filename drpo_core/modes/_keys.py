"""The keys of a framework's configuration, as the makers of modes read them."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from drpo_core._checks import check_number
from drpo_core.objectives import CISPO, PPOClip
from drpo_core.penalties import CovariancePenalty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core.modes.mode import Mode

__all__ = ["AT_RANDOM", "ONE_RATIO", "Keys", "chosen", "cispo", "clip", "covariance_penalty", "made"]

T = TypeVar("T")

ONE_RATIO = "the ratio of a sequence is differentiated as one there, so its tokens share the mean of their weights"
"""Why weights of tokens on the ratio of a sequence are no mode, where a framework does not detach the mean."""

AT_RANDOM = (
    "it chooses tokens at random: pass drpo_core.corrections.clip_cov_weights(log_prob, advantages, mask, noise) as "
    "token_weights, beside Mode(PPOClip(eps_low=…, eps_high=…), anchor=Proximal())"
)
"""Why Clip-Cov is no mode, and how it is had."""


class Keys:
    """What a call gives, over a framework's defaults. Keys that nothing has read were given in vain: `check_all_read`."""

    def __init__(self, framework: str, name: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        if unknown := given.keys() - defaults.keys():
            msg = f"{', '.join(sorted(unknown))}: expected keys of {framework} among {', '.join(defaults)}"
            raise ValueError(msg)
        for key, value in given.items():
            # what compares element by element is no value of a configuration
            if hasattr(value, "__array__") and not isinstance(value, numbers.Number):
                msg = f"{key}: expected a value as a configuration has it, got {type(value).__name__}"
                raise TypeError(msg)
        self._framework, self.name = framework, name
        self._values = {**defaults, **given}
        self._given = given.keys()
        self.read: dict[str, Any] = {}
        """The keys that were read, with their values."""

    def __getitem__(self, key: str) -> Any:
        """The value of a key."""
        self.read[key] = self._values[key]
        return self._values[key]

    def number(self, key: str, *, above: float | None = None, at_least: float | None = None) -> float:
        """The value, a number within its bound."""
        return check_number(key, self[key], above=above, at_least=at_least)

    def optional(self, key: str, *, above: float | None = None, at_least: float | None = None) -> float | None:
        """The value, a number within its bound or None."""
        return None if self[key] is None else self.number(key, above=above, at_least=at_least)

    def pair(self, key: str) -> tuple[float, float]:
        """The value, two numbers."""
        value = self[key]
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) != 2:
            msg = f"{key}: expected two numbers, got {value!r}"
            raise ValueError(msg)
        return check_number(key, value[0]), check_number(key, value[1])

    def flag(self, key: str) -> bool:
        """The value, True or False."""
        if not isinstance(self[key], bool):
            msg = f"{key}: expected True or False, got {self[key]!r}"
            raise TypeError(msg)
        return bool(self[key])

    def choice(self, key: str, known: Mapping[Any, T]) -> T:
        """What the value stands for."""
        return chosen(key, self[key], known)

    def ignore(self, *keys: str) -> None:
        """Accept keys that the framework ignores too."""
        for key in keys:
            self[key]

    def refuse(self, key: str, reason: str) -> None:
        """Raise, because a mode can't do what a value asks for."""
        msg = f"{key}: {self._framework}'s {self.name!r} with {self._values[key]!r} is no Mode: {reason}"
        raise ValueError(msg)

    def check_all_read(self) -> None:
        """Raise if a key was given that these settings do not use."""
        if unused := [key for key in self._given if key not in self.read]:
            used = ", ".join(self.read) or "none"
            msg = f"{', '.join(unused)}: {self._framework}'s {self.name!r} with these settings reads {used} only"
            raise ValueError(msg)


def chosen(key: str, value: Any, known: Mapping[Any, T]) -> T:
    """What a value stands for, or an error that lists the known ones."""
    try:
        return known[value]
    except (KeyError, TypeError):
        msg = f"{key}: expected {', '.join(map(repr, known))}, got {value!r}"
        raise ValueError(msg) from None


def made(
    framework: str,
    argument: str,
    losses: Mapping[str, Callable[[Keys], Mode]],
    defaults: Mapping[str, Any],
    name: str,
    given: Mapping[str, Any],
    *,
    no_modes: Mapping[str, str] | None = None,
) -> Mode:
    """The mode of a framework's loss; `argument` is the framework's word for the name of a loss.

    `no_modes`: the framework's losses that no mode can stand for, and why.
    """
    for refused, reason in (no_modes or {}).items():
        if name == refused:
            msg = f"{argument}: {framework}'s {name!r} is no Mode: {reason}"
            raise ValueError(msg)
    loss = chosen(argument, name, losses)
    keys = Keys(framework, name, defaults, given)
    try:
        mode = loss(keys)
    except (TypeError, ValueError) as error:
        if given and str(error).partition(":")[0] not in defaults:
            # what a part of the mode says of a number, under its own name
            msg = f"{', '.join(given)}: {framework}'s {name!r} is no Mode with these values: {error}"
            raise type(error)(msg) from error
        raise
    keys.check_all_read()
    return mode


def cispo(eps_low: float, eps_high: float) -> CISPO:
    """CISPO with the ratio clipped to [1 − ε_low, 1 + ε_high]; ε_low ≥ 1 is no lower bound."""
    return CISPO(max_ratio=1.0 + eps_high, min_ratio=1.0 - eps_low if eps_low < 1.0 else None)


def covariance_penalty(keys: Keys, share: str) -> tuple[CovariancePenalty, ...]:
    """KL-Cov's penalty, under verl's and SkyRL's key for β; `share`: the key of the share of tokens."""
    coefficient = keys.number("ppo_kl_coef", at_least=0.0)
    of_tokens = keys.number(share, above=0.0)
    if of_tokens > 1.0:
        msg = f"{share}: expected 1 or less, got {of_tokens:g}"
        raise ValueError(msg)
    return (CovariancePenalty(coefficient=coefficient, share=of_tokens),) if coefficient > 0.0 else ()


def clip(low: float, high: float) -> PPOClip:
    """The clip to ratios within [low, high], whose offsets from 1 are not to print as 0.19999999999999996."""
    return PPOClip(eps_low=round(1.0 - low, 12), eps_high=round(high - 1.0, 12))
