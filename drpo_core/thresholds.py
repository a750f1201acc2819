"""Trust-region thresholds: one number, or a low and a high one, and what a token's region is."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from drpo_core.ratio import Tokens
    from drpo_core.types import Array, Bool, Float

__all__ = ["Bounds", "VacuousTrustRegionWarning", "bounds", "cap", "kept", "sides", "warn_if_vacuous", "within"]


class VacuousTrustRegionWarning(UserWarning):
    """A threshold on abs(π − μ) of 1 or more, which no token can exceed."""


class Bounds(NamedTuple):
    """`high` bounds moves away from μ where A > 0, `low` where A < 0."""

    low: float
    high: float


def bounds(name: str, value: float | None, low: float | None, high: float | None) -> Bounds:
    """Either one threshold for both sides, or low and high together; each finite and positive."""
    given = {key: v for key, v in ((name, value), (f"{name}_low", low), (f"{name}_high", high)) if v is not None}
    if list(given) not in ([name], [f"{name}_low", f"{name}_high"]):
        msg = f"expected either {name} or both {name}_low and {name}_high, got {' and '.join(given) or 'none of them'}"
        raise TypeError(msg)
    checked = [cap(key, v) for key, v in given.items()]
    return Bounds(checked[0], checked[-1])


def sides(value: float | None, low: float | None, high: float | None) -> Bounds:
    """The bounds of thresholds that `bounds` has accepted; free of checks, for use in traced code."""
    return Bounds(low, high) if value is None else Bounds(value, value)  # type: ignore[arg-type]


def cap(name: str, value: object, *, above: float = 0.0) -> float:
    """A finite number greater than `above`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        msg = f"{name}: expected a real number, got {type(value).__name__}"
        raise TypeError(msg)
    if not above < float(value) < math.inf:
        msg = f"{name}: expected a finite number greater than {above:g}, got {value!r}"
        raise ValueError(msg)
    return float(value)


def warn_if_vacuous(objective: str, delta: Bounds, *, stacklevel: int = 4) -> None:
    """Warn that |π − μ| ≤ 1 < δ: such a threshold never masks and never corrects."""
    if max(delta) >= 1.0:
        msg = (
            f"{objective}: delta = {max(delta):g} is at least 1, but abs(π − μ) never exceeds 1, so no token can leave "
            "the trust region: nothing is masked and no gradient is corrected"
        )
        warnings.warn(msg, VacuousTrustRegionWarning, stacklevel=stacklevel)


def kept(tokens: Tokens, inside: Bool[Array, "*tokens"]) -> Bool[Array, "*tokens"]:
    """True unless the token is diverging and outside its region; False (dropped) where anything is NaN."""
    excess, a = tokens.ratio_minus_one, tokens.advantages
    not_nan = (excess == excess) & (a == a)
    return not_nan & ((tokens.along_advantage(excess) <= 0.0) | inside)


def within(x: Float[Array, "*tokens"], region: Bounds) -> Bool[Array, "*tokens"]:
    """−low ≤ x ≤ high, the boundary included; False where x is NaN."""
    return (x >= -region.low) & (x <= region.high)
