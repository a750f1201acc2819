"""The engines of `policy_loss`: one pass over the tokens that forms the loss, its final gradient and diagnostics.

All of them run `drpo_core.policy_loss.policy_loss_of`, where the formulas are: on whole tensors (`plain`), replayed on
pieces that stay in the cache (`eager`), through `torch.compile` (`compiled`) or as a numba loop (`jitted`).
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat.numpy
import torch

from drpo_core.policy_loss import PolicyLoss, policy_loss_and_gradient, policy_loss_of
from drpo_core.replay import replay
from drpo_core.trace import UntraceableError
from drpo_torch import operations
from drpo_torch.namespace import is_transformed, namespace
from drpo_torch.threads import in_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from drpo_core import Objective
    from drpo_core.reduction import Reduction

__all__ = ["ENGINES", "Batch", "has_memory", "jitted", "plain"]


class Batch(NamedTuple):
    """Checked arguments of a pass: tensors of one shape, coefficients that broadcast to it, and the dtypes to use."""

    log_prob: torch.Tensor
    behavior_log_prob: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    coefficients: torch.Tensor
    divergence: torch.Tensor | None
    dtype: torch.dtype
    gradient_dtype: torch.dtype


def plain(objective: Objective, batch: Batch, *, diagnostics: bool) -> PolicyLoss:
    """One expression on whole tensors: what every transform of torch can trace, on any device."""
    result = policy_loss_of(objective, *batch[:6], dtype=batch.dtype, diagnostics=diagnostics, select=False, xp=namespace())
    return result._replace(gradient=result.gradient.to(batch.gradient_dtype))


def eager(objective: Objective, batch: Batch, *, diagnostics: bool) -> PolicyLoss:
    """Torch's operations on pieces that stay in the cache; `plain` where that is not possible."""
    if not _in_memory(batch):
        return plain(objective, batch, diagnostics=diagnostics)
    gradient = torch.empty(batch.log_prob.shape, dtype=batch.gradient_dtype)
    try:
        size = operations.PIECE * torch.get_num_threads()
        tensors = tuple(None if t is None else t.detach() for t in batch[:6])
        loss, statistics = replay(
            objective, tensors, gradient, batch.dtype, diagnostics=diagnostics, size=size, library=operations.LIBRARY
        )
    except UntraceableError:
        return plain(objective, batch, diagnostics=diagnostics)
    return PolicyLoss(loss, gradient, statistics)


def compiled(objective: Objective, batch: Batch, *, diagnostics: bool) -> PolicyLoss:
    """`torch.compile`, which fuses the pass into one loop; compiled once per kind of objective and dtypes."""
    if torch.compiler.is_compiling() or not has_memory(*batch[:6]) or batch.log_prob.numel() == 0:
        return plain(objective, batch, diagnostics=diagnostics)
    # 1-D, so that shapes don't matter, unless rows have coefficients of their own
    keep_rows = batch.coefficients.numel() not in (1, batch.mask.numel())
    shape = batch.mask.shape if keep_rows else (-1,)
    flat = [None if t is None else t.reshape(shape) for t in (*batch[:3], batch.mask.view(torch.uint8), batch.divergence)]
    coefficients = batch.coefficients if keep_rows else batch.coefficients.reshape(-1)
    kind = (type(objective), *(t if t is None else t.ndim for t in batch[:6]), *batch[6:], diagnostics)
    function = _compiled_for(*kind)
    loss, gradient, statistics = function(objective, *flat, coefficients, batch.dtype, batch.gradient_dtype, diagnostics)
    return PolicyLoss(loss, gradient.reshape(batch.log_prob.shape), statistics)


def jitted(
    objective: Objective,
    tensors: dict[str, torch.Tensor | None],
    *,
    reduction: Reduction,
    normalizer: float | torch.Tensor | None,
    gradient_dtype: torch.dtype,
    diagnostics: bool,
) -> PolicyLoss:
    """`policy_loss_and_gradient` of the core, by its compiled loop, over the memory of CPU tensors."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type != "cpu":
            msg = f"engine: 'jit' works on CPU tensors, got {name} on {tensor.device}"
            raise ValueError(msg)
    arrays: dict[str, Any] = {name: None if tensor is None else _array(tensor) for name, tensor in tensors.items()}
    result = policy_loss_and_gradient(
        objective,
        **arrays,
        reduction=reduction,
        normalizer=_array(normalizer) if isinstance(normalizer, torch.Tensor) else normalizer,
        diagnostics=diagnostics,
        engine="jit",
        threads=torch.get_num_threads(),
        spread=in_threads,
        xp=array_api_compat.numpy,
    )
    statistics = result.diagnostics
    if statistics is not None:
        statistics = {name: type(s)(*map(torch.as_tensor, s)) for name, s in statistics.items()}
    gradient = torch.from_numpy(result.gradient).to(gradient_dtype)
    return PolicyLoss(torch.as_tensor(result.loss), gradient, statistics)


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """A view for NumPy; 16-bit floats, of which it has only one kind, in float32."""
    tensor = tensor.detach()
    array: NDArray[Any] = (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()
    return array


ENGINES: dict[str, Callable[..., PolicyLoss]] = {"eager": eager, "compile": compiled}
"""Those that take a `Batch`, whose coefficients are known; `jitted` has NumPy find them, with less to do per call."""


OPTIONS: dict[str, Any] = {"max_fusion_size": 1024, "cpp.max_horizontal_fusion_size": 256}
"""Of inductor: one loop for everything, where it would keep what several share in memory, truths one byte at a time."""


@cache
def _compiled_for(*kind: object) -> Callable[..., tuple[Any, ...]]:  # noqa: ARG001 -- the cache's key
    """`_pass` compiled: code of its own for each kind, because Dynamo limits the recompilations of one code object."""
    own = FunctionType(_pass.__code__.replace(), _pass.__globals__, _pass.__name__)
    return torch.compile(own, fullgraph=True, dynamic=True, options=OPTIONS)


def _pass(
    objective: Objective,
    log_prob: torch.Tensor,
    behavior_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    divergence: torch.Tensor | None,
    coefficients: torch.Tensor,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    diagnostics: bool,  # noqa: FBT001
) -> tuple[Any, ...]:
    # inductor's loads of bool are not vectorised, those of uint8 are
    batch = Batch(
        log_prob, behavior_log_prob, advantages, mask.to(torch.int32) > 0, coefficients, divergence, dtype, gradient_dtype
    )
    return tuple(plain(objective, batch, diagnostics=diagnostics))


def has_memory(*tensors: torch.Tensor | None) -> bool:
    """Whether these are plain tensors: torch.func and make_fx have others, which only `plain` can take."""
    return all(t is None or (type(t) in (torch.Tensor, torch.nn.Parameter) and not is_transformed(t)) for t in tensors)


def _in_memory(batch: Batch) -> bool:
    """Whether these are plain tensors on the CPU with at least one token, and nothing traces."""
    return (
        not torch.compiler.is_compiling()
        and has_memory(*batch[:6])
        and all(t is None or t.device.type == "cpu" for t in batch[:6])
        and batch.log_prob.numel() > 0
    )
