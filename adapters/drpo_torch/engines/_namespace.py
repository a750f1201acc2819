"""Torch's Array API, with what torch does inaccurately or slowly replaced."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch

from drpo_core import _series

__all__ = ["namespace"]


class CompiledNamespace:
    """For code that `torch.compile` traces: inductor turns torch's expm1 into exp(t) − 1 on the CPU."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 -- functions, dtypes and numbers
        """Whatever is not replaced."""
        return getattr(xp, name)

    def expm1(self, t: torch.Tensor) -> torch.Tensor:
        """e^t − 1, to within the rounding of the arithmetic."""
        result: torch.Tensor = _series.expm1(t, double=t.dtype == torch.float64, xp=xp)
        return result

    def count_nonzero(self, x: torch.Tensor) -> torch.Tensor:
        """How many elements are not 0, as a 0-d int32: inductor adds up int64, torch's, one by one."""
        # inductor compares a bool with a number by way of int64
        counted = x if x.dtype == torch.bool else x != 0
        return torch.sum(counted.to(torch.int32), dtype=torch.int32)

    def cumulative_sum(self, x: torch.Tensor, *, axis: int = 0) -> torch.Tensor:
        """Running sums along an axis: array-api-compat's looks for its namespace, of which Dynamo warns."""
        return torch.cumsum(x, dim=axis)


class EagerNamespace:
    """For CPU tensors: NumPy counts truths in a third of torch's time."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 -- functions, dtypes and numbers
        """Whatever is not replaced."""
        return getattr(xp, name)

    def count_nonzero(self, x: torch.Tensor) -> torch.Tensor:
        """How many elements are not 0, as a 0-d int64."""
        # of few elements, to make a tensor of the count takes longer than to count
        if type(x) is not torch.Tensor or x.device.type != "cpu" or x.numel() < 1 << 14:
            return torch.count_nonzero(x)
        return torch.tensor(np.count_nonzero(x.numpy()), device=x.device)


COMPILED, EAGER = CompiledNamespace(), EagerNamespace()


def namespace() -> Any:  # noqa: ANN401 -- a module, or an object like one
    """The namespace for what runs now: traced by a compiler, under a transform of torch.func, or neither."""
    if torch.compiler.is_compiling():
        return COMPILED
    # under a transform, tensors have no memory for NumPy to look at; there is no public test
    return EAGER if torch._C._functorch.maybe_current_level() is None else xp  # noqa: SLF001
