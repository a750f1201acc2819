"""Trust-region thresholds: one number, or a low and a high one, and what a token's region is."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

from drpo_core._checks import check_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core._arrays import Array, Bool, Float
    from drpo_core.tokens import Tokens

__all__ = [
    "Bounds",
    "VacuousTrustRegionWarning",
    "check_order",
    "kept",
    "set_number",
    "set_thresholds",
    "sides",
    "warn_if_vacuous",
    "within",
]


class VacuousTrustRegionWarning(UserWarning):
    """A threshold on abs(π − μ) of 1 or more, which no token can exceed."""


class Bounds(NamedTuple):
    """`high` bounds moves away from μ where A > 0, `low` where A < 0; one object where they are one threshold."""

    low: float
    high: float

    def each(self, function: Callable[[float], float]) -> Bounds:
        """The function of both; computed once where they are one threshold."""
        high = function(self.high)
        return Bounds(high if self.low is self.high else function(self.low), high)


def set_thresholds(objective: object, name: str) -> None:
    """Check that an objective has either one threshold or a low and a high one, each finite and positive."""
    keys = (name, f"{name}_low", f"{name}_high")
    given = [key for key in keys if getattr(objective, key) is not None]
    if given not in ([keys[0]], [*keys[1:]]):
        msg = f"expected either {name} or both {name}_low and {name}_high, got {' and '.join(given) or 'none of them'}"
        raise TypeError(msg)
    for key in given:
        set_number(objective, key)


def set_number(objective: object, name: str, *, above: float = 0.0) -> None:
    """Check that a hyper-parameter is a finite number greater than `above`, and keep it as a Python float."""
    object.__setattr__(objective, name, check_number(name, getattr(objective, name), above=above))


def check_order(low_name: str, low: float, high_name: str, high: float) -> None:
    """Check that a lower bound does not exceed the upper one."""
    if low > high:
        msg = f"{low_name}: expected a number of at most {high_name} = {high:g}, got {low:g}"
        raise ValueError(msg)


def sides(value: float | None, low: float | None, high: float | None) -> Bounds:
    """The bounds of thresholds that `set_thresholds` has accepted; free of checks, for use in traced code."""
    return Bounds(low, high) if value is None else Bounds(value, value)  # type: ignore[arg-type]


def warn_if_vacuous(delta: Bounds, objective: str) -> None:
    """Warn that |π − μ| ≤ 1 ≤ δ: such a threshold never masks and never corrects. To be called by `__post_init__`."""
    if max(delta) >= 1.0:
        msg = (
            f"{objective}: delta = {max(delta):g} is at least 1, but abs(π − μ) never exceeds 1, so no token can leave "
            "the trust region: nothing is masked and no gradient is corrected"
        )
        # the caller of the class: beyond this function, __post_init__ and __init__
        warnings.warn(msg, VacuousTrustRegionWarning, stacklevel=4)


def kept(tokens: Tokens, inside: Bool[Array, "*tokens"]) -> Bool[Array, "*tokens"]:
    """True unless the token is diverging and outside its region; False (dropped) where anything is NaN."""
    excess, a = tokens.ratio_minus_one, tokens.advantages
    not_nan = (excess == excess) & (a == a)
    return not_nan & ((tokens.along_advantage(excess) <= 0.0) | inside)


def within(x: Float[Array, "*tokens"], region: Bounds) -> Bool[Array, "*tokens"]:
    """−low ≤ x ≤ high, the boundary included; False where x is NaN."""
    return (x >= -region.low) & (x <= region.high)
