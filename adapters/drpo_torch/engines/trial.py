"""The first use of a kernel in a process, once for each kind of tensors: the same small batch by the array expression.

So a kernel that fails to compile, or that a compiler or a device gets wrong, costs a warning and some speed, not a training
run. It is the only time that a loss waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drpo_core.engines.recording import ARRAYS
from drpo_core.engines.trace import floats_of
from drpo_core.modes import Mode
from drpo_core.objectives import label
from drpo_torch.engines import triton_loop
from drpo_torch.engines._namespace import namespace
from drpo_torch.engines.kernel_error import NOT_TRIED, KernelError, is_captured, warn_of

if TYPE_CHECKING:
    from drpo_core import Objective
    from drpo_core.engines.recording import Pass
    from drpo_core.loss import PolicyLoss

__all__ = ["agree", "checked"]

SHAPE = (3, 200)
"""Of the batch: rows of more tokens than a program takes at a time."""

TOLERANCE = {torch.float64: 2.0**-30, torch.float32: 2.0**-12, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-6}
"""Of the largest of an array: between the few roundings that two right engines differ by, and what an error of one makes."""


def checked(
    policy_pass: Pass,
    objective: Objective,
    *tensors: torch.Tensor | None,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    diagnostics: bool,
) -> PolicyLoss:
    """The pass over these tensors, those of `ARRAYS`, by its kernels.

    Raises `UntraceableError` if there are none, and `KernelError`, after a warning, if those that there are do not hold.
    """
    given = {name: tensor for name, tensor in zip(ARRAYS, tensors, strict=False) if tensor is not None}
    program = triton_loop.program(policy_pass, objective, tuple(given), dtype, diagnostics=diagnostics)
    thresholds, like = tuple(floats_of(objective)), given["log_prob"]
    kind = (like.device, gradient_dtype, *(tensor.dtype for tensor in given.values()))
    if kind not in program.trials:
        if is_captured(like.device):
            # nothing may wait for a device whose work is being recorded
            raise KernelError(NOT_TRIED)
        program.trials[kind] = _finding(program, policy_pass, objective, given, dtype, gradient_dtype, diagnostics=diagnostics)
        if program.trials[kind] is not None:
            warn_of(f"the Triton kernel of {_name(objective)}", like.device, like.dtype, str(program.trials[kind]))
    finding = program.trials[kind]
    if finding is not None:
        raise KernelError(finding)
    try:
        return program.run(given, thresholds, dtype, gradient_dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # other sizes and strides are compiled for themselves
        program.trials[kind] = finding = _failure(error)
        warn_of(f"the Triton kernel of {_name(objective)}", like.device, like.dtype, finding)
        raise KernelError(finding) from error


def _finding(
    program: triton_loop.Program,
    policy_pass: Pass,
    objective: Objective,
    given: dict[str, torch.Tensor],
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    *,
    diagnostics: bool,
) -> str | None:
    """What is wrong with the kernels on a small batch of the same dtypes; None if nothing is."""
    try:
        batch = {name: _sample(name, tensor) for name, tensor in given.items()}
        arguments = [batch.get(name) for name in ARRAYS]
        while arguments[-1] is None:
            arguments.pop()
        found = program.run(batch, tuple(floats_of(objective)), dtype, gradient_dtype)
        wanted = policy_pass(objective, *arguments, dtype=dtype, diagnostics=diagnostics, xp=namespace())
        ours, theirs = _arrays(found), _arrays(wanted)
        dtypes = dict.fromkeys(theirs, dtype) | {"gradient": gradient_dtype}
        wrong = [name for name, array in theirs.items() if not agree(ours[name], array, dtypes[name])]
    except Exception as error:  # noqa: BLE001 -- a compiler may raise anything
        return _failure(error)
    return f"gives another {', '.join(wrong)} than the array expression" if wrong else None


def _failure(error: Exception) -> str:
    return f"fails with {type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _name(objective: Objective) -> str:
    return repr(objective) if isinstance(objective, Mode) else label(objective)


def _arrays(result: PolicyLoss) -> dict[str, torch.Tensor]:
    """Loss, gradient and each statistic's fields, by name."""
    statistics = result.diagnostics or {}
    stacked = {name: torch.stack([*map(torch.as_tensor, fields)]) for name, fields in statistics.items()}
    return {"loss": result.loss, "gradient": result.gradient, **stacked}


def _sample(name: str, like: torch.Tensor) -> torch.Tensor:
    """Values that the argument may have: tokens of all probabilities, on and off policy, some masked and NaN there."""
    # whatever the default device is
    made: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu", "dtype": torch.float32}
    uniform, normal, steps = torch.rand(SHAPE, **made), torch.randn(SHAPE, **made), torch.randn(SHAPE, **made)
    valid = uniform > 0.2
    valid[-1, : SHAPE[1] // 2] = False
    if name == "mask":
        values = valid
    elif name == "advantages":
        values = torch.where(normal.abs() < 0.1, 0.0, normal)
    elif name == "coefficients":
        values = torch.rand((SHAPE[0], 1), **made)
    elif name == "divergence":
        values = 0.3 * uniform
    else:
        shift = 0.0 if name == "log_prob" else 0.2 * (1 + ARRAYS.index(name)) ** 0.5 * steps
        values = (4.0 * uniform.log() + shift).clamp(max=-1e-3)
    if name not in ("mask", "coefficients"):
        values = torch.where(valid, values, torch.nan)
    return values.to(like.device, like.dtype)


def agree(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether they differ by roundings; where one is not finite, the other is the same."""
    found, wanted = found.double(), wanted.to(dtype).double()
    finite = wanted.isfinite()
    if not torch.equal(torch.where(finite, 0.0, found).nan_to_num(7.0), torch.where(finite, 0.0, wanted).nan_to_num(7.0)):
        return False
    scale = torch.where(finite, wanted, 0.0).abs().amax()
    return bool(((found - wanted)[finite].abs() <= TOLERANCE[dtype] * scale).all())
