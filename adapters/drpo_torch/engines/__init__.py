"""How a pass over the tokens is run on torch tensors: as a compiled loop over CPU or GPU memory, or as torch's operations.

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
    from drpo_core.engines.recording import Pass
    from drpo_core.loss import Engine
    from drpo_core.modes import Mode

    Loop = Callable[..., PolicyLoss]
    """A pass over tensors, as `_over_memory`."""

__all__ = ["Batch", "loop_for", "run_mode", "run_pass"]


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
    loop = None if transformed else loop_for(engine, *batch)
    if loop is not None:
        try:
            return loop(objective, *batch, dtype=dtype, gradient_dtype=gradient_dtype, diagnostics=diagnostics)
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
    if torch.compiler.is_compiling() or not has_memory(*tensors):
        return None
    loop = loop_for(engine, *tensors)
    if loop is None:
        return None

    def one() -> torch.Tensor:
        return torch.ones((), dtype=dtype, device=tensors[0].device)  # type: ignore[union-attr]

    options: dict[str, Any] = {"dtype": dtype, "gradient_dtype": dtype, "diagnostics": diagnostics}
    return compiled_mode(mode, coefficients_of, *tensors, compiled=loop, one=one, **options)


def loop_for(engine: Engine, *tensors: torch.Tensor | None) -> Loop | None:
    """The compiled loop to try over these, if there is one; raises where one is asked for and can't be had."""
    devices = {tensor.device.type for tensor in tensors if tensor is not None}
    if len(devices) == 1 and devices <= TRITON_DEVICES:
        return _over_device if may_compile(engine, "triton") else None
    if devices <= {"cpu"}:
        return _over_memory if may_compile(engine) else None
    if engine == "compiled":
        msg = f"engine: 'compiled' works on tensors of a CPU or a GPU of CUDA or ROCm, got {', '.join(sorted(devices))}"
        raise ValueError(msg)
    return None


TRITON_DEVICES = {"cuda"}
"""ROCm's are called so too."""


def _over_memory(
    objective: Objective,
    *tensors: torch.Tensor | None,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    diagnostics: bool,
    run: Pass = policy_pass,
) -> PolicyLoss:
    """A pass as numba's loop."""
    arrays = (None if tensor is None else _array(tensor) for tensor in tensors)
    result = compiled_pass(objective, *arrays, **_options(dtype, diagnostics=diagnostics), run=run)
    return _as_tensors(result, dtype=dtype, gradient_dtype=gradient_dtype)


def _over_device(
    objective: Objective,
    *tensors: torch.Tensor | None,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    diagnostics: bool,
    run: Pass = policy_pass,
) -> PolicyLoss:
    """A pass as Triton's kernels."""
    from drpo_torch.engines import trial  # noqa: PLC0415 -- triton is an extra

    options: dict[str, Any] = {"dtype": dtype, "gradient_dtype": gradient_dtype, "diagnostics": diagnostics}
    return trial.checked(run, objective, *tensors, **options)


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
    tensor = tensor.detach().resolve_neg()
    array: NDArray[Any] = (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()
    return array
