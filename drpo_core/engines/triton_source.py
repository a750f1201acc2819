"""Any objective's loss, final gradient and diagnostics as the source of two Triton kernels.

Made from the same recording as the loop of `drpo_core.engines.numba_loop`: each token is read once, in its own dtype, and
nothing but the gradient is written. The programs of the first kernel, `tokens`, leave a sum and a maximum each; the only one
of the second, `finish`, combines them in one order and computes what follows from them, so that nothing is atomic and
nothing waits for the host. Thresholds are arguments. What runs them is the adapter's (`drpo_torch.engines.triton_loop`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from drpo_core import _series
from drpo_core.engines.ordering import integer, lowest
from drpo_core.engines.trace import BOOL, Trace, UntraceableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from drpo_core.engines.trace import RowStage, Symbol

__all__ = ["FUNCTIONS", "Kernels", "kernels"]


class Kernels(NamedTuple):
    """The source of `tokens` and `finish`, and the names of what they are given, in the order of their arguments.

    `sums` and `maxima` are how many of them each program leaves. `rows`: whether a program has to see whole rows.
    """

    source: str
    inputs: tuple[str, ...]
    uniforms: tuple[str, ...]
    sums: int
    maxima: int
    rows: bool


def kernels(trace: Trace, gradient: Symbol, outputs: Sequence[Symbol], dtype: np.dtype[Any]) -> Kernels:
    """Kernels that write the gradient of each token, and each output once; `dtype` is that of the arithmetic.

    The source uses the names ``triton`` and ``tl``.
    """
    if gradient.reduced:
        msg = "a sum or maximum over tokens in what is done for each token"
        raise UntraceableError(msg)
    statements, uniforms = trace.statements(gradient), trace.uniforms()
    sums, maxima = trace.reductions("sum"), trace.reductions("max")
    inputs = tuple(symbol.name for symbol in trace.inputs())
    reductions = (*sums, *maxima)
    wide = np.dtype(np.float64)
    names = tuple(symbol.name for symbol in uniforms)
    source = f"""
{FUNCTIONS}

@triton.jit(do_not_specialize={names})
def tokens(
    {_lines(4, (f"{name}_at, {name}_row: tl.int64, {name}_column: tl.int64," for name in inputs))}
    gradient_at, gradient_row: tl.int64, sums_at, maxima_at,
    {" ".join(_argument(symbol, dtype) for symbol in uniforms)}
    rows, width, parts, span, items, programs, BLOCK: tl.constexpr,
):
    {_lines(4, _known(trace, uniforms, dtype, "(1,)"))}
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    {_lines(4, (_nothing(s, dtype) for s in reductions))}
    for item in range(program * items, tl.minimum((program + 1) * items, rows * parts)):
        row, begin = item // parts, item % parts * span
        end = tl.minimum(begin + span, width)
        {"".join(_stage(stage, inputs, dtype) for stage in statements.rows) or "pass"}
        for start in range(begin, end, BLOCK):
            {_lines(12, _loaded(inputs, dtype))}
            {_lines(12, statements.per_token)}
            tl.store(gradient_at + row * gradient_row + column, narrowed({gradient.name}, gradient_at), mask=inside)
            {_lines(12, map(_reduced, reductions))}
    {_lines(4, (f"tl.store(sums_at + {i} * programs + program, tl.sum(lanes_{s.name}, 0))" for i, s in enumerate(sums)))}
    {_lines(4, (f"tl.store(maxima_at + {i} * programs + program, tl.max(lanes_{s.name}, 0))" for i, s in enumerate(maxima)))}


@triton.jit(do_not_specialize={names})
def finish(
    sums_at, maxima_at, results_at,
    {" ".join(_argument(symbol, wide) for symbol in uniforms)}
    programs, BLOCK: tl.constexpr,
):
    {_lines(4, _known(trace, uniforms, wide, "()"))}
    lane = tl.arange(0, BLOCK)
    some = lane < programs
    {_lines(4, (_sum(i, s) for i, s in enumerate(sums)))}
    {_lines(4, (_largest(i, s, dtype) for i, s in enumerate(maxima)))}
    {_lines(4, statements.reduced)}
    {_lines(4, (f"tl.store(results_at + {i}, {s.name})" for i, s in enumerate(outputs)))}
"""
    return Kernels(source, inputs, names, len(sums), len(maxima), bool(statements.rows))


def _named(name: str) -> str:
    """A function of Triton's by the name that recordings have for it."""
    return f"""
@triton.jit
def {name}(x):
    return tl.{name}(x)

"""


def _function(name: str, formula: Callable[..., Symbol]) -> str:
    """A formula of array operations as a function of Triton."""
    trace = Trace()
    y = formula(trace.input("x"), xp=trace.namespace)
    constants = (f"{name} = tl.full((), {value!r}, x.dtype)" for name, value in trace.constants.items())
    return f"""
@triton.jit
def {name}(x):
    {_lines(4, constants)}
    {_lines(4, trace.statements(y).per_token)}
    return {y.name}
"""


def _stage(stage: RowStage, inputs: tuple[str, ...], dtype: np.dtype[Any]) -> str:
    """A pass over the tokens of a row, which leaves the results of its reductions."""
    inputs = tuple(name for name in inputs if name != "coefficients")
    return f"""
        {_lines(8, (_nothing(s, dtype) for s in stage.reductions))}
        for start in range(begin, end, BLOCK):
            {_lines(12, _loaded(inputs, dtype))}
            {_lines(12, stage.per_token)}
            {_lines(12, map(_reduced, stage.reductions))}
        {_lines(8, (f"{s.name} = {_total(s, f'lanes_{s.name}', dtype)}" for s in stage.reductions))}
        {_lines(8, stage.after)}
"""


def _lines(indent: int, statements: Iterable[str]) -> str:
    return ("\n" + " " * indent).join(statements) or "pass"


def _argument(uniform: Symbol, dtype: np.dtype[Any]) -> str:
    """A threshold, or what follows from some; a truth value comes as a number, and a float64 as its bits."""
    return f"{uniform.name}: tl.{'int64' if dtype.itemsize == 8 else dtype.name},"


def _known(trace: Trace, uniforms: Iterable[Symbol], dtype: np.dtype[Any], shape: str) -> Iterable[str]:
    """Constants in the dtype of the arithmetic, because a literal is float32; and the arguments as what they stand for."""
    for name, value in trace.constants.items():
        yield f"{name} = tl.full((), float({str(value)!r}), tl.{dtype.name})"
    for symbol in uniforms:
        if dtype.itemsize == 8:
            # a float argument may arrive as float32
            yield f"{symbol.name} = tl.cast({symbol.name}, tl.int64).to(tl.float64, bitcast=True)"
        if symbol.kind == BOOL:
            yield f"{symbol.name} = tl.full({shape}, {symbol.name}, tl.{dtype.name}) != 0.0"


def _loaded(inputs: tuple[str, ...], dtype: np.dtype[Any]) -> Iterable[str]:
    yield "column = start + lane"
    yield "inside = column < end"
    for name in inputs:
        loaded = f"tl.load({name}_at + row * {name}_row + column * {name}_column, mask=inside, other=0)"
        yield f"{name} = {loaded} != 0" if name == "mask" else f"{name} = {loaded}.to(tl.{dtype.name})"


def _is_sum(reduction: Symbol) -> bool:
    return reduction.operation.endswith("sum")


def _nothing(reduction: Symbol, dtype: np.dtype[Any]) -> str:
    """What each lane starts from."""
    of_maxima = f"tl.full((BLOCK,), {lowest(dtype)}, tl.{integer(dtype).name})"
    return f"lanes_{reduction.name} = " + (f"tl.zeros((BLOCK,), tl.{dtype.name})" if _is_sum(reduction) else of_maxima)


def _reduced(reduction: Symbol) -> str:
    """One token more in each lane."""
    x, lanes = reduction.arguments[0].name, f"lanes_{reduction.name}"
    if _is_sum(reduction):
        return f"{lanes} += tl.where(inside, {x}, 0.0)"
    return f"{lanes} = tl.where(inside, tl.maximum({lanes}, ordered({x})), {lanes})"


def _sum(i: int, reduction: Symbol) -> str:
    """The sum of what the programs have left."""
    return f"{reduction.name} = tl.sum(tl.load(sums_at + {i} * programs + lane, mask=some, other=0.0), 0)"


def _largest(i: int, reduction: Symbol, dtype: np.dtype[Any]) -> str:
    """The maximum of what the programs have left."""
    left = f"tl.load(maxima_at + {i} * programs + lane, mask=some, other={lowest(dtype)})"
    return f"{reduction.name} = unordered(tl.max({left}, 0), tl.{dtype.name}).to(tl.float64)"


def _total(reduction: Symbol, lanes: str, dtype: np.dtype[Any]) -> str:
    """Of a row, in one lane: a truth value that is a number does not combine with those of lanes in Triton's interpreter."""
    if _is_sum(reduction):
        return f"tl.sum({lanes}, 0, keep_dims=True)"
    return f"unordered(tl.max({lanes}, 0, keep_dims=True), tl.{dtype.name})"


FUNCTIONS = f"""
import triton
import triton.language as tl

zero, one, infinity = tl.constexpr(0.0), tl.constexpr(1.0), tl.constexpr(float("inf"))

{"".join(_named(name) for name in ("abs", "exp", "log"))}
@triton.jit
def sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        # the other one is an approximation in float32
        return tl.sqrt_rn(x)


@triton.jit
def select(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def narrowed(x, at):
    # to 16 bits, which nothing takes float64 to at once
    if x.dtype == tl.float64 and at.dtype.element_ty.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x


@triton.jit
def negated(condition):
    return condition == 0


@triton.jit
def ordered(x):
    # the NaN of an invalid operation is negative
    x = tl.where(x == x, x, float("nan"))
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def unordered(bits, dtype: tl.constexpr):
    if dtype == tl.float64:
        return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits).to(tl.float64, bitcast=True)
    else:
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)

{_function("expm1", partial(_series.expm1, double=True))}
{_function("log1p", _series.log1p)}
{_function("tanh", partial(_series.tanh, double=True))}
"""
"""What a recording's operations are in Triton, as functions by the names that recordings have for them."""
