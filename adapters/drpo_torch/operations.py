"""Torch's operations for `drpo_core.replay`, on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import array_api_compat.torch
import torch

from drpo_core.replay import Library

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["LIBRARY", "PIECE"]

PIECE = 1 << 16
"""Tokens a thread handles at a time: its intermediate results of so many stay in its cache, and calling torch is worth it."""


def _compare(comparison: Callable[..., Any]) -> Callable[..., None]:
    """Into floats first, which torch vectorises, then made integers where they are."""

    def compare(x: torch.Tensor, y: torch.Tensor, *, out: torch.Tensor) -> None:
        as_floats = out.view(torch.float64 if out.dtype == torch.int64 else torch.float32)
        comparison(x, y, out=as_floats)
        out.copy_(as_floats)

    return compare


def _convert(x: torch.Tensor, *, out: torch.Tensor) -> None:
    out.copy_(x)


def _sign(a: torch.Tensor, *, out: torch.Tensor) -> None:
    """`torch.sign` gives 0 for a NaN. The least subnormal number exceeds 1 by these factors."""
    factor = 2.0**80 if a.dtype == torch.float32 else 2.0**600
    torch.mul(a, factor, out=out)
    out.mul_(factor)
    out.clamp_(-1.0, 1.0)


def _at_most(x: torch.Tensor, bound: float, *, out: torch.Tensor) -> None:
    torch.clamp(x, max=bound, out=out)


def _at_least(x: torch.Tensor, bound: float, *, out: torch.Tensor) -> None:
    torch.clamp(x, min=bound, out=out)


def _flip_sign(x: torch.Tensor, condition: torch.Tensor, *, out: torch.Tensor) -> None:
    """Add the sign bit, modulo 2³² or 2⁶⁴."""
    torch.add(x, condition, alpha=torch.iinfo(x.dtype).min, out=out)


def _total(figures: Sequence[torch.Tensor], width: int, sums: int, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    rows = torch.stack(tuple(figures)).view(-1, width).to(torch.float64)
    return torch.cat((rows[:, :sums].sum(0), rows[:, sums:].amax(0))).to(dtype).unbind()


# by torch's own names: through those of the Array API, which it has too, a call takes longer
LIBRARY = Library(
    xp=array_api_compat.torch,
    arithmetic={
        "abs": torch.abs,
        "add": torch.add,
        "divide": torch.div,
        "exp": torch.exp,
        "expm1": torch.expm1,
        "log": torch.log,
        "log1p": torch.log1p,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "multiply": torch.mul,
        "negative": torch.neg,
        "sign": _sign,
        "sqrt": torch.sqrt,
        "square": torch.square,
        "subtract": torch.sub,
        "tanh": torch.tanh,
    },
    comparisons={
        "equal": _compare(torch.eq),
        "greater": _compare(torch.gt),
        "greater_equal": _compare(torch.ge),
        "less": _compare(torch.lt),
        "less_equal": _compare(torch.le),
        "not_equal": _compare(torch.ne),
    },
    connectives={"logical_and": torch.bitwise_and, "logical_or": torch.bitwise_or, "differ": torch.bitwise_xor},
    clamps={"at_most": _at_most, "at_least": _at_least},
    convert=_convert,
    flip_sign=_flip_sign,
    reductions={"sum": torch.sum, "max": torch.amax},
    total=_total,
)
