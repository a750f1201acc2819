"""How a pass over the tokens is run on torch tensors: as a compiled loop over CPU memory, or as torch's operations.

Both run `drpo_core.loss.policy_pass`, where the formulas are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from drpo_core import UntraceableError
from drpo_core.diagnostics import map_diagnostics, separated
from drpo_core.loss import CHUNK, PolicyLoss, chunked_pass, compiled_mode, compiled_pass, may_compile, policy_pass
from drpo_torch.autograd import has_memory
from drpo_torch.engines._namespace import namespace
from drpo_torch.engines.threads import in_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from drpo_core import Objective
    from drpo_core.loss import Engine
    from drpo_core.modes import Mode

__all__ = ["Batch", "is_compilable", "run_mode", "run_pass"]


class Batch(NamedTuple):
    """Checked, detached arguments of a pass: tensors of one shape, and coefficients that broadcast to it."""

    log_prob: torch.Tensor
    behavior_log_prob: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    coefficients: torch.Tensor
    divergence: torch.Tensor | None


def run_pass(
    objective: Objective, batch: Batch, engine: Engine, *, dtype: torch.dtype, gradient_dtype: torch.dtype, diagnostics: bool
) -> PolicyLoss:
    """Σ m c L, m c ∂L/∂log π in `gradient_dtype`, and diagnostics; to be called without a graph.

    Under `torch.compile` and `torch.func` every engine is the same array expression.
    """
    transformed = torch.compiler.is_compiling() or not has_memory(*batch)
    if not transformed and is_compilable(engine, *batch):
        try:
            return _compiled(objective, batch, dtype=dtype, gradient_dtype=gradient_dtype, diagnostics=diagnostics)
        except UntraceableError:
            if engine == "compiled":
                raise
    options: dict[str, Any] = {"dtype": dtype, "diagnostics": diagnostics, "xp": namespace()}
    if transformed or batch.log_prob.device.type != "cpu":
        result = policy_pass(objective, *batch, **options)
    else:
        # each of torch's threads has its own cache
        result = chunked_pass(objective, *batch, chunk=CHUNK * torch.get_num_threads(), **options)
    statistics = None if result.diagnostics is None else separated(result.diagnostics, xp=options["xp"])
    return PolicyLoss(result.loss, result.gradient.to(gradient_dtype), statistics)


def run_mode(
    mode: Mode,
    tensors: tuple[torch.Tensor | None, ...],
    coefficients_of: Callable[[torch.Tensor], torch.Tensor],
    engine: Engine,
    *,
    dtype: torch.dtype,
    diagnostics: bool,
) -> PolicyLoss | None:
    """`drpo_core.loss.mode_pass` as one compiled loop over all that a mode needs; None where there is none for it.

    `tensors` are those of `drpo_core.loss.compiled_mode`.
    """
    if torch.compiler.is_compiling() or not has_memory(*tensors) or not is_compilable(engine, *tensors):
        return None
    result = compiled_mode(
        mode,
        lambda counted: _array(coefficients_of(torch.from_numpy(counted))),
        *(None if tensor is None else _array(tensor) for tensor in tensors),
        **_options(dtype, diagnostics=diagnostics),
    )
    return None if result is None else _as_tensors(result, dtype=dtype, gradient_dtype=dtype)


def is_compilable(engine: Engine, *tensors: torch.Tensor | None) -> bool:
    """Whether to try a compiled loop over these; raises where it is asked for and can't be."""
    others = {t.device.type for t in tensors if t is not None} - {"cpu"}
    if others and engine == "compiled":
        msg = f"engine: 'compiled' works on CPU tensors, got {', '.join(sorted(others))}"
        raise ValueError(msg)
    return not others and may_compile(engine)


def _compiled(
    objective: Objective, batch: Batch, *, dtype: torch.dtype, gradient_dtype: torch.dtype, diagnostics: bool
) -> PolicyLoss:
    arrays = (None if tensor is None else _array(tensor) for tensor in batch)
    result = compiled_pass(objective, *arrays, **_options(dtype, diagnostics=diagnostics))
    return _as_tensors(result, dtype=dtype, gradient_dtype=gradient_dtype)


def _options(dtype: torch.dtype, *, diagnostics: bool) -> dict[str, Any]:
    """How a compiled loop is run for tensors."""
    return {
        "dtype": np.dtype("f8" if dtype == torch.float64 else "f4"),
        "diagnostics": diagnostics,
        "threads": torch.get_num_threads(),
        "spread": in_threads,
    }


def _as_tensors(result: PolicyLoss, *, dtype: torch.dtype, gradient_dtype: torch.dtype) -> PolicyLoss:
    statistics = result.diagnostics
    if statistics is not None:
        # all in one small tensor: making one is what takes time
        numbers = [field.item() for statistic in statistics.values() for field in statistic]
        fields = iter(torch.tensor(numbers, dtype=dtype, device="cpu"))
        statistics = map_diagnostics(lambda _: next(fields), statistics)
    loss = torch.tensor(result.loss.item(), dtype=dtype, device="cpu")
    return PolicyLoss(loss, torch.from_numpy(result.gradient).to(gradient_dtype), statistics)


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """A view for NumPy; 16-bit floats, of which it has only one kind, in float32."""
    tensor = tensor.detach()
    array: NDArray[Any] = (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()
    return array
