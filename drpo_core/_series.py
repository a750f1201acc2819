"""e^x − 1 of array operations, for compilers that make it inaccurate or slow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Float, Namespace

__all__ = ["expm1"]


def expm1(x: Float[Array, "..."], *, double: bool, xp: Namespace) -> Float[Array, "..."]:
    """e^x − 1 within 2.5 machine epsilons: its Taylor series where abs(x) < ½, else from `exp`.

    A compiler shares that `exp` with the formulas around it. `double`: whether x is float64, which takes 15 terms and not 8.
    """
    near = xp.abs(x) < 0.5
    # selected before the series, whose derivative would be a NaN at −inf
    small = xp.where(near, x, 0.0)
    terms = 15 if double else 8
    series = xp.full_like(x, 1.0 / math.factorial(terms))
    for n in reversed(range(2, terms)):
        series = series * small + 1.0 / math.factorial(n)
    return xp.where(near, small + small * small * series, xp.exp(x) - 1.0)
