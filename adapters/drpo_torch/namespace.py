"""The namespace of code that torch compiles: what inductor would compute inaccurately is replaced."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch

__all__ = ["namespace"]


class CompiledNamespace:
    """array-api-compat's torch with an expm1 that stays accurate: inductor turns torch's into exp(t) − 1 on the CPU."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 -- functions, dtypes and numbers
        """Whatever is not replaced."""
        return getattr(xp, name)

    def expm1(self, t: torch.Tensor) -> torch.Tensor:
        """e^t − 1 by its series where abs(t) < ½, to within the rounding of the arithmetic."""
        near = torch.abs(t) < 0.5
        x = torch.where(near, t, 0.0)
        series = torch.ones_like(x)
        for n in range(14 if t.dtype == torch.float64 else 8, 1, -1):
            series = 1.0 + x * (1.0 / n) * series
        return torch.where(near, x * series, torch.exp(t) - 1.0)


COMPILED = CompiledNamespace()


def namespace() -> Any:  # noqa: ANN401 -- a module, or an object like one
    """The namespace for what runs now: compiled or not."""
    return COMPILED if torch.compiler.is_compiling() else xp
