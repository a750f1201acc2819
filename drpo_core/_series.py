"""e^x − 1, log(1 + x) and tanh of array operations, for compilers that make them inaccurate or slow, or lack them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Float, Namespace

__all__ = ["expm1", "log1p", "tanh"]


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


def log1p(x: Float[Array, "..."], *, xp: Namespace) -> Float[Array, "..."]:
    """log(1 + x) within 2 machine epsilons: the `log` of the rounded sum, and what rounding took away from it."""
    whole = 1.0 + x
    lost = xp.where((whole > 0.0) & xp.isfinite(whole), (x - (whole - 1.0)) / whole, 0.0)
    return xp.log(whole) + lost


def tanh(x: Float[Array, "..."], *, double: bool, xp: Namespace) -> Float[Array, "..."]:
    """(1 − e^(−2x)) / (1 + e^(−2x)) within 4 machine epsilons, from `expm1` of −2 abs(x), which is never large."""
    e = expm1(-2.0 * xp.abs(x), double=double, xp=xp)
    return -xp.sign(x) * (e / (e + 2.0))
