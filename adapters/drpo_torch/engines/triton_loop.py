"""Any objective's loss, final gradient and diagnostics as two Triton kernels over the memory of a GPU (extra `triton`).

They are made of the same recording as the loop for CPUs (`drpo_core.engines.triton_source`). Tensors are read where they lie,
in their own dtype, with the strides that they have. Which kernels run, and over how much, depends on shapes alone.
"""

from __future__ import annotations

import linecache
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from drpo_core.diagnostics import map_diagnostics
from drpo_core.engines.recording import program_of
from drpo_core.engines.triton_source import kernels
from drpo_core.loss import PolicyLoss

if TYPE_CHECKING:
    from drpo_core import Objective
    from drpo_core.engines.recording import Pass
    from drpo_core.engines.trace import Trace

__all__ = ["REGISTERS", "Program", "module_of", "program"]

BLOCK = 128
"""Tokens of a step: one a thread, so that a program's sums, some twenty, stay in registers."""

MOST_PROGRAMS = 1024
"""Of the first kernel; the second one reads what they leave at once."""


def program(
    policy_pass: Pass, objective: Objective, names: tuple[str, ...], dtype: torch.dtype, *, diagnostics: bool
) -> Program:
    """The kernels of a pass over the tensors of these names, those of `ARRAYS`; `dtype` is that of the arithmetic.

    Raises `UntraceableError` if the objective does something that can't be compiled.
    """
    number = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
    return program_of(Program, policy_pass, objective, number, diagnostics=diagnostics, names=names)


REGISTERS: dict[str, int] = {} if torch.version.hip else {"maxnreg": 255}
"""As many as there are, where the compiler would otherwise put some into memory to have more programs at a time."""


class Grid(NamedTuple):
    """Rows of tokens, in parts of at most `span`; each program takes as many parts, one after the other."""

    rows: int
    width: int
    span: int

    @property
    def parts(self) -> int:
        """Of a row."""
        return -(-self.width // self.span)

    @property
    def items(self) -> int:
        """Parts that a program takes."""
        return max(1, -(-self.rows * self.parts // MOST_PROGRAMS))

    @property
    def programs(self) -> int:
        """So many that each has something to do."""
        return -(-self.rows * self.parts // self.items)


class Program:
    """The kernels of an objective without its thresholds."""

    def __init__(self, trace: Trace, result: Any, dtype: np.dtype[Any]) -> None:  # noqa: ANN401
        # each with a place of its own, so that a field can be reduced over ranks in place
        outputs = [result.loss]
        self._statistics = result.diagnostics
        if result.diagnostics is not None:
            outputs += [field for statistic in result.diagnostics.values() for field in statistic]
        self._outputs = len(outputs)
        self._made = kernels(trace, result.gradient, outputs, dtype)
        self._trace, self._before = trace, trace.statements(result.gradient).uniform
        # a training run has one threshold, or a new one at each step
        self._known = lru_cache(maxsize=4)(self._prepare)
        self.trials: dict[Any, str | None] = {}

    @cached_property
    def _kernels(self) -> tuple[Any, Any]:
        """Made at the first run, which is a trial."""
        module = module_of(self._made.source)
        return module["tokens"], module["finish"]

    def run(
        self,
        given: dict[str, torch.Tensor],
        thresholds: tuple[float, ...],
        dtype: torch.dtype,
        gradient_dtype: torch.dtype,
    ) -> PolicyLoss:
        """A pass over checked, detached tensors; the coefficients broadcast to the shape of the others."""
        made, like = self._made, given["log_prob"]
        gradient = torch.empty(like.shape, dtype=gradient_dtype, device=like.device)
        # of no token there is no program, and of no program each sum is 0
        grid, matrices = Grid(0, 0, BLOCK), list[torch.Tensor]()
        if like.numel():
            tensors = [given[name].resolve_neg() for name in made.inputs]
            grid, matrices = _laid_out(tensors, like.shape, whole_rows=made.rows)
        sums = torch.empty((made.sums, grid.programs), dtype=torch.float64, device=like.device)
        maxima = torch.empty((made.maxima, grid.programs), dtype=_integer(dtype), device=like.device)
        results = torch.empty(self._outputs, dtype=dtype, device=like.device)
        uniforms, bits = self._known(np.array(thresholds, np.float64).tobytes())
        strided = [each for matrix in matrices for each in (matrix, *matrix.stride())]
        sizes = (grid.rows, grid.width, grid.parts, grid.span, grid.items, grid.programs)
        of_tokens = bits if dtype == torch.float64 else uniforms
        tokens, finish = self._kernels
        # where the tensors are, whichever device is the current one
        with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
            if grid.programs:
                arrays = (*strided, gradient, grid.width, sums, maxima)
                tokens[(grid.programs,)](*arrays, *of_tokens, *sizes, BLOCK=BLOCK, **REGISTERS)
            finish[(1,)](sums, maxima, results, *bits, grid.programs, BLOCK=MOST_PROGRAMS, **REGISTERS)
        loss, *fields = results.unbind()
        left, statistics = iter(fields), self._statistics
        return PolicyLoss(loss, gradient, None if statistics is None else map_diagnostics(lambda _: next(left), statistics))

    def _prepare(self, thresholds: bytes) -> tuple[list[float], list[int]]:
        """The values that the kernels need of those that are known before the tokens, and their bits as float64."""
        known = self._trace.on_host(self._before, {f"p{i}": value for i, value in enumerate(np.frombuffer(thresholds))})
        values = np.array([known[name] for name in self._made.uniforms], np.float64)
        return values.tolist(), values.view(np.int64).tolist()


def _laid_out(tensors: list[torch.Tensor], shape: torch.Size, *, whole_rows: bool) -> tuple[Grid, list[torch.Tensor]]:
    """The tensors as matrices of rows of tokens: all tokens in one row where they lie so and no row is looked at."""
    full = [tensor.expand(shape) for tensor in tensors]
    width = shape[-1] if shape else 1
    one_row = not whole_rows and (width < BLOCK or all(_is_flat(tensor, shape) for tensor in tensors))
    if one_row:
        # a tensor of one element is read where it is
        rows = [
            t.reshape(1, 1).expand(1, f.numel()) if t.numel() == 1 else f.reshape(1, -1)
            for t, f in zip(tensors, full, strict=True)
        ]
        return Grid(1, shape.numel(), BLOCK), [_bytes(row) for row in rows]
    matrices = [_bytes(tensor.reshape(-1, width)) for tensor in full]
    return Grid(shape.numel() // width, width, width if whole_rows else BLOCK), matrices


def _is_flat(tensor: torch.Tensor, shape: torch.Size) -> bool:
    """Whether its elements, or the only one, are those of the tokens one after the other."""
    return tensor.numel() == 1 or (tensor.shape == shape and tensor.is_contiguous())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A mask as bytes; others as they are."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


@lru_cache(maxsize=256)
def module_of(source: str) -> dict[str, Any]:
    """The names of a source's kernels, which Triton compiles at their first launch and keeps on disk by what it says."""
    name = f"<drpo {sha256(source.encode()).hexdigest()[:16]}>"
    # where Triton, and a traceback, will look for the lines
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": "drpo_torch.engines.triton_kernels"}
    exec(compile(source, name, "exec"), namespace)  # noqa: S102
    return namespace
