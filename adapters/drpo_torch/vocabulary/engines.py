"""Which row kernels run: numba's loops where they exist, torch's operations elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drpo_core.loss import check_engine, may_compile
from drpo_torch.autograd import has_memory
from drpo_torch.vocabulary.softmax import ArrayRows, EmptyRows

if TYPE_CHECKING:
    from types import ModuleType

    from drpo_core.loss import Engine
    from drpo_torch.vocabulary.softmax import RowKernels

__all__ = ["loops", "row_kernels"]

_COMPILED_FOR = (torch.float32, torch.float64, torch.bfloat16)


def loops(engine: Engine, **matrices: torch.Tensor) -> ModuleType | None:
    """The module of numba's loops if they are to run over these rows, else None; the keywords name them in errors.

    ``"auto"`` takes the loops where they exist; ``"compiled"`` raises where they don't.
    """
    check_engine(engine)
    if engine == "arrays":
        return None
    hindrances = (_hindrance(name, matrix) for name, matrix in matrices.items())
    hindrance = next((h for h in hindrances if h is not None), None)
    if hindrance is None:
        return _rows() if may_compile(engine) else None
    if engine == "compiled":
        msg = f"engine: 'compiled' {hindrance}; 'auto' runs torch's operations there"
        raise ValueError(msg)
    return None


def row_kernels(module: ModuleType | None, vocabulary: int, dtype: torch.dtype, device: torch.device) -> RowKernels:
    """Kernels over rows of `vocabulary` logits of this dtype, by the loops if there are any."""
    if vocabulary == 0:
        return EmptyRows()
    if module is None:
        return ArrayRows(vocabulary, dtype, device)
    kernels: RowKernels = module.LoopRows(dtype)
    return kernels


def _hindrance(name: str, matrix: torch.Tensor) -> str | None:
    """The reason why the loops can't take a matrix; None if they can."""
    if matrix.device.type != "cpu":
        return f"takes tensors on the CPU, got {name} on {matrix.device}"
    if matrix.dtype not in _COMPILED_FOR:
        return f"takes float32, float64 and bfloat16, got {name} of {matrix.dtype}"
    if not has_memory(matrix) or matrix.is_neg():
        return f"takes plain tensors, got {name} of type {type(matrix).__name__}"
    if matrix.numel() and matrix.shape[-1] > 1 and matrix.stride(-1) != 1:
        return f"takes rows that are contiguous, got {name} with strides {matrix.stride()}"
    return None


def _rows() -> ModuleType:
    from drpo_torch.vocabulary import rows  # noqa: PLC0415 -- numba is an extra, and slow to import

    return rows
