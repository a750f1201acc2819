"""Namespaces in which what torch does inaccurately or slowly is replaced: for code that it compiles, and that it runs."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch

from drpo_core import series

__all__ = ["is_transformed", "namespace"]


class CompiledNamespace:
    """array-api-compat's torch with an expm1 that stays accurate: inductor turns torch's into exp(t) − 1 on the CPU."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 -- functions, dtypes and numbers
        """Whatever is not replaced."""
        return getattr(xp, name)

    def expm1(self, t: torch.Tensor) -> torch.Tensor:
        """e^t − 1, to within the rounding of the arithmetic."""
        result: torch.Tensor = series.expm1(t, double=t.dtype == torch.float64, xp=xp)
        return result

    def count_nonzero(self, x: torch.Tensor) -> torch.Tensor:
        """How many elements are not 0, as a 0-d int32: inductor adds up int64, torch's, one by one."""
        # comparing a bool with a number, inductor does by way of int64
        counted = x if x.dtype == torch.bool else x != 0
        return torch.sum(counted.to(torch.int32), dtype=torch.int32)


class EagerNamespace:
    """array-api-compat's torch with NumPy's count of the truths in a CPU tensor: torch's takes three times as long."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 -- functions, dtypes and numbers
        """Whatever is not replaced."""
        return getattr(xp, name)

    def count_nonzero(self, x: torch.Tensor) -> torch.Tensor:
        """How many elements are not 0, as a 0-d int64."""
        if type(x) is not torch.Tensor or x.device.type != "cpu":
            return torch.count_nonzero(x)
        return torch.tensor(np.count_nonzero(x.numpy()))


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether torch.func looks on: such a tensor has no memory of its own."""
    # there is no public test
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # noqa: SLF001


COMPILED, EAGER = CompiledNamespace(), EagerNamespace()


def namespace() -> Any:  # noqa: ANN401 -- a module, or an object like one
    """The namespace for what runs now: compiled, under a transform of torch.func, or neither."""
    if torch.compiler.is_compiling():
        return COMPILED
    # under a transform, tensors have no memory for NumPy to look at
    return EAGER if torch._C._functorch.maybe_current_level() is None else xp  # noqa: SLF001 -- there is no public test
