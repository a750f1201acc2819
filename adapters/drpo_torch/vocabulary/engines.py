"""Which row kernels run: numba's or Triton's loops where they exist, torch's operations elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drpo_core.loss import check_engine, may_compile
from drpo_torch import engines
from drpo_torch.autograd import has_memory
from drpo_torch.engines.kernel_error import KernelError
from drpo_torch.vocabulary.softmax import ArrayRows, EmptyRows

if TYPE_CHECKING:
    from types import ModuleType

    from drpo_core.loss import Engine
    from drpo_torch.vocabulary.softmax import RowKernels

__all__ = ["loops", "row_kernels"]

_COMPILED_FOR = (torch.float32, torch.float64, torch.bfloat16)


def loops(engine: Engine, **matrices: torch.Tensor) -> ModuleType | None:
    """The module of the loops that are to run over these rows, numba's or Triton's, else None; the keywords are for errors.

    ``"auto"`` takes loops where they exist; ``"compiled"`` raises where they don't.
    """
    check_engine(engine)
    if engine == "arrays":
        return None
    devices = {matrix.device for matrix in matrices.values()}
    on_gpu = all(device.type in engines.TRITON_DEVICES for device in devices)
    hindrances = (_hindrance(name, matrix, on_gpu=on_gpu) for name, matrix in matrices.items())
    hindrance = next((h for h in hindrances if h is not None), None)
    if hindrance is None and on_gpu:
        return _triton_rows(engine, {(device, matrix.dtype) for device in devices for matrix in matrices.values()})
    if hindrance is None:
        return _numba_rows() if may_compile(engine) else None
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
    kernels: RowKernels = module.ROWS(dtype)
    return kernels


def _hindrance(name: str, matrix: torch.Tensor, *, on_gpu: bool) -> str | None:
    """The reason why the loops can't take a matrix; None if they can."""
    if not on_gpu and matrix.device.type != "cpu":
        return f"takes tensors of one CPU or GPU (of CUDA or ROCm), got {name} on {matrix.device}"
    if not has_memory(matrix) or matrix.is_neg():
        return f"takes plain tensors, got {name} of type {type(matrix).__name__}"
    if on_gpu:
        return None
    if matrix.dtype not in _COMPILED_FOR:
        return f"takes float32, float64 and bfloat16, got {name} of {matrix.dtype}"
    if matrix.numel() and matrix.shape[-1] > 1 and matrix.stride(-1) != 1:
        return f"takes rows that are contiguous, got {name} with strides {matrix.stride()}"
    return None


def _numba_rows() -> ModuleType:
    from drpo_torch.vocabulary import rows  # noqa: PLC0415 -- numba is an extra, and slow to import

    return rows


def _triton_rows(engine: Engine, kinds: set[tuple[torch.device, torch.dtype]]) -> ModuleType | None:
    """Triton's, if there is Triton and they hold on these devices, for these dtypes."""
    if not may_compile(engine, "triton"):
        return None
    from drpo_torch.vocabulary import triton_rows, triton_trial  # noqa: PLC0415 -- triton is an extra

    findings = [finding for kind in kinds if (finding := triton_trial.finding(*kind)) is not None]
    if findings and engine == "compiled":
        raise KernelError(findings[0])
    return None if findings else triton_rows
