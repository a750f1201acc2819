"""A traced pass over the tokens, replayed by torch's own vectorised operations on pieces that stay in the cache.

`torch.where` and comparisons to bool are several times slower than arithmetic on the CPU. So a truth value is an integer
0 or 1 as wide as the floats, and a selection is integer arithmetic on the bits of floats: exact, and blind to NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from drpo_core.policy_loss import policy_loss_of
from drpo_core.trace import BOOL, FLOAT, Symbol, Trace, UntraceableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.policy_loss import PolicyLoss

__all__ = ["PIECE", "replay"]

Operation = Callable[..., Any]

PIECE = 1 << 16
"""Tokens a thread handles at a time: its intermediate results of so many stay in its cache, and calling torch is worth it."""

INPUTS = ("log_prob", "behavior_log_prob", "advantages", "mask", "coefficients", "divergence")

CONNECTIVES: dict[str, Operation] = {"logical_and": torch.bitwise_and, "logical_or": torch.bitwise_or}
COMPARISONS: dict[str, Operation] = {
    "equal": torch.eq,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "not_equal": torch.ne,
}
CLASSES: dict[str, tuple[Operation, float]] = {
    "isfinite": (torch.lt, math.inf),
    "isinf": (torch.eq, math.inf),
}
"""How abs(x) compares with what."""

ARITHMETIC: dict[str, Operation] = {
    "abs": torch.abs,
    "add": torch.add,
    "divide": torch.div,
    "exp": torch.exp,
    "log": torch.log,
    "log1p": torch.log1p,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "multiply": torch.mul,
    "negative": torch.neg,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "subtract": torch.sub,
    "tanh": torch.tanh,
}
EXTREMA: dict[str, Operation] = {"greater": torch.minimum, "less": torch.maximum}
"""What it is to select a constant where a value is beyond it."""

REDUCTIONS: dict[str, Operation] = {"sum": torch.sum, "max": torch.amax}


class Value(NamedTuple):
    """Where a result is, seen as floats (or what the caller passed) or as integers of the same width."""

    number: int
    as_integer: bool = False

    @property
    def bits(self) -> Value:
        """The same memory as integers."""
        return Value(self.number, as_integer=True)


class Step(NamedTuple):
    """An operation on results, and where its own goes; None for a reduction, whose results are collected."""

    function: Callable[..., Any]
    operands: tuple[Value, ...]
    out: Value | None


class Program(NamedTuple):
    """Steps for every piece, in terms of registers, and what finishes their reductions."""

    steps: list[Step]
    inputs: dict[str, Value]
    constants: dict[Value, torch.Tensor]
    registers: int
    gradient: Value
    finish: Callable[[list[torch.Tensor]], tuple[torch.Tensor, Diagnostics | None]]


def replay(
    objective: Objective,
    arrays: tuple[torch.Tensor | None, ...],
    gradient: torch.Tensor,
    dtype: torch.dtype,
    *,
    diagnostics: bool,
) -> tuple[torch.Tensor, Diagnostics | None]:
    """Loss and diagnostics of `INPUTS`; the final gradient is written to `gradient`. At least one token, on the CPU.

    Raises `UntraceableError` where the objective is not one operation after another on the numbers of one token.
    """
    # an objective that is equal only to itself may have changed since
    build = _program if type(objective).__hash__ is not object.__hash__ else _program.__wrapped__
    program = build(objective, dtype, diagnostics, arrays[-1] is not None)  # type: ignore[arg-type]  # hashable, if cached
    columns = gradient.shape[-1] if gradient.ndim else 1
    given = {
        name: array.detach().broadcast_to(gradient.shape).reshape(-1, columns)
        for name, array in zip(INPUTS, arrays, strict=True)
        if array is not None and name in program.inputs
    }
    given["mask"] = given["mask"].view(torch.uint8)
    target = gradient.view(-1, columns)
    size = PIECE * torch.get_num_threads()
    memory = torch.empty((program.registers, min(size, gradient.numel())), dtype=dtype)
    collected: list[torch.Tensor] = []
    shape: torch.Size | None = None
    views: dict[Value, torch.Tensor] = {}
    calls: list[Callable[[], object] | None] = []
    for rows, part in _pieces(target.shape[0], columns, size):
        piece = target[rows, part]
        if piece.shape != shape:
            shape = piece.shape
            registers = {Value(i): register[: piece.numel()].view(shape) for i, register in enumerate(memory)}
            views = _with_bits(registers | program.constants, dtype)
            # bound once, because looking up operands takes as long as a small operation
            calls = [
                _bound(step, views, collected) if all(map(views.__contains__, step.operands)) else None
                for step in program.steps
            ]
        views |= _with_bits(
            {
                program.inputs[name]: array[rows, part].to(dtype if array.is_floating_point() else array.dtype)
                for name, array in given.items()
            },
            dtype,
        )
        for step, call in zip(program.steps, calls, strict=True):
            (call or _bound(step, views, collected))()
        piece.copy_(views[program.gradient])
    return program.finish(collected)


def _with_bits(views: dict[Value, torch.Tensor], dtype: torch.dtype) -> dict[Value, torch.Tensor]:
    return views | {value.bits: view.view(_bits(dtype)) for value, view in views.items() if view.dtype == dtype}


def _bound(step: Step, views: dict[Value, torch.Tensor], collected: list[torch.Tensor]) -> Callable[[], object]:
    operands = [views[operand] for operand in step.operands]
    if step.out is None:
        return lambda: collected.append(step.function(*operands))
    return partial(step.function, *operands, out=views[step.out])


def _pieces(rows: int, columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cover a matrix with pieces of at most `size` elements: whole rows, or parts of one."""
    height = max(1, size // columns)
    for row in range(0, rows, height):
        for column in range(0, columns, size):
            yield slice(row, row + height), slice(column, column + size)


@lru_cache(maxsize=64)
def _program(objective: Objective, dtype: torch.dtype, diagnostics: bool, measured: bool) -> Program:  # noqa: FBT001
    trace = Trace()
    x, b, a, m, c, d = (trace.input(name, BOOL if name == "mask" else FLOAT) for name in INPUTS)
    try:
        measurement = d if measured else None
        result = policy_loss_of(
            objective, x, b, a, m, c, measurement, dtype=FLOAT, diagnostics=diagnostics, select=False, xp=trace.namespace
        )
    except (AttributeError, TypeError, ValueError) as error:
        # what does not work on symbols may on tensors, as torch's own functions do; if not, `plain` says so
        msg = f"an objective that raises {error!r}"
        raise UntraceableError(msg) from error
    lowering = _Lowering(trace, dtype)
    reductions = [*trace.reductions("sum"), *trace.reductions("max")]
    gradient = lowering.of(result.gradient)
    for reduction in reductions:
        lowering.reduce(reduction)
    return lowering.program(gradient, _finisher(trace, reductions, result, dtype))


class _Lowering:
    """From symbols to steps, each result in a place of its own until `program` shares registers."""

    def __init__(self, trace: Trace, dtype: torch.dtype) -> None:
        self._trace, self._constants = trace, trace.constants
        self._dtype = dtype
        self._of: dict[str, Value] = {}
        self._steps: list[Step] = []
        self._inputs: dict[str, Value] = {}
        self._tensors: dict[Value, torch.Tensor] = {}
        self._negations: dict[int, Value] = {}
        self._places = 0

    def of(self, symbol: Symbol) -> Value:
        """Where the symbol's result is; truth values are in its bits."""
        if symbol.name not in self._of:
            if symbol.reduced:
                msg = "a sum or maximum over tokens in what is done per token"
                raise UntraceableError(msg)
            self._of[symbol.name] = self._lowered(symbol)
        return self._of[symbol.name]

    def reduce(self, symbol: Symbol) -> None:
        """Collect a sum or maximum over the tokens of a piece."""
        (argument,) = map(self.of, symbol.arguments)
        if argument in self._tensors:
            msg = "a sum or maximum of what is the same for all tokens"
            raise UntraceableError(msg)
        self._steps.append(Step(REDUCTIONS[symbol.operation], (argument,), None))

    def program(self, gradient: Value, finish: Callable[..., Any]) -> Program:
        """The steps with as few registers as there are results in use at once."""
        last = {operand.number: i for i, step in enumerate(self._steps) for operand in step.operands}
        last[gradient.number] = len(self._steps)
        # what is not the result of a step keeps its number, above all registers
        fixed = {value.number for value in (*self._inputs.values(), *self._tensors)}
        places, free, registers, steps = {n: n + self._places for n in fixed}, list[int](), 0, []

        def placed(value: Value) -> Value:
            return value._replace(number=places[value.number])

        for i, (function, operands, out) in enumerate(self._steps):
            if out is not None:
                if not free:
                    free.append(registers)
                    registers += 1
                places[out.number] = free.pop()
            steps.append(Step(function, tuple(map(placed, operands)), None if out is None else placed(out)))
            free += {places[o.number] for o in operands if last[o.number] == i and o.number not in fixed}
        inputs = {name: placed(value) for name, value in self._inputs.items()}
        constants = {placed(value): tensor for value, tensor in self._tensors.items()}
        return Program(steps, inputs, constants, registers, placed(gradient), finish)

    def _lowered(self, symbol: Symbol) -> Value:
        if symbol.operation == "input":
            value = self._inputs[symbol.name] = self._place()
            return value if symbol.kind == FLOAT else self._emit(_convert, value, bits=True)
        if symbol.operation == "constant":
            return self._constant(self._constants[symbol.name]) if symbol.kind == FLOAT else self._truth(symbol.name == "True")
        return self._selected(*symbol.arguments) if symbol.operation == "where" else self._computed(symbol)

    def _computed(self, symbol: Symbol) -> Value:
        name, operands = symbol.operation, [self.of(argument) for argument in symbol.arguments]
        if name == "logical_not":
            return self._negated(operands[0])
        if name in CONNECTIVES:
            return self._emit(CONNECTIVES[name], *(operand.bits for operand in operands), bits=True)
        return self._of_numbers(symbol, operands)

    def _of_numbers(self, symbol: Symbol, operands: list[Value]) -> Value:
        name = symbol.operation
        if any(argument.kind == BOOL for argument in symbol.arguments):
            msg = f"{name} of truth values"
            raise UntraceableError(msg)
        if name in COMPARISONS:
            return self._compared(COMPARISONS[name], *operands)
        if name == "isnan":
            return self._compared(torch.ne, *operands, *operands)
        if name in CLASSES:
            comparison, limit = CLASSES[name]
            return self._compared(comparison, self._emit(torch.abs, *operands), self._constant(limit))
        if name == "expm1":
            return self._expm1(symbol.arguments[0])
        if name not in ARITHMETIC:
            raise UntraceableError(name)
        return self._emit(ARITHMETIC[name], *operands)

    def _expm1(self, t: Symbol) -> Value:
        """e^t − 1 = tanh(t/2) (e^t + 1), with the e^t that is mostly there: torch's own takes as long as six exponentials."""
        half = self._emit(torch.mul, self.of(t), self._constant(0.5))
        power = self.of(self._trace.apply("exp", t))
        return self._emit(torch.mul, self._emit(torch.tanh, half), self._emit(torch.add, power, self._constant(1.0)))

    def _selected(self, condition: Symbol, x: Symbol, y: Symbol) -> Value:
        """Integer arithmetic, modulo 2³² or 2⁶⁴, on the bits: y + c (x − y), and less where less will do."""
        tested = [symbol.name for symbol in condition.arguments]
        extremum = EXTREMA.get(condition.operation)
        if extremum and tested == [y.name, x.name] and self._is_constant(x):
            return self._emit(extremum, self.of(y), self.of(x))
        opposite = [symbol.name for symbol in (x.arguments if x.operation == "negative" else ())] == [y.name]
        if opposite:
            return self._emit(_flip_sign, self.of(y).bits, self.of(condition).bits, bits=True)
        c = self.of(condition)
        if self._is_constant(y, 0.0):
            return self._emit(torch.mul, self.of(x).bits, c.bits, bits=True)
        if self._is_constant(x, 0.0):
            return self._emit(torch.mul, self.of(y).bits, self._negated(c).bits, bits=True)
        difference = self._emit(torch.sub, self.of(x).bits, self.of(y).bits, bits=True)
        product = self._emit(torch.mul, difference.bits, c.bits, bits=True)
        return self._emit(torch.add, product.bits, self.of(y).bits, bits=True)

    def _compared(self, comparison: Callable[..., Any], x: Value, y: Value) -> Value:
        """A comparison into floats, which torch vectorises, as 0 or 1 of integers."""
        return self._emit(_convert, self._emit(comparison, x, y), bits=True)

    def _negated(self, c: Value) -> Value:
        if c.number not in self._negations:
            self._negations[c.number] = self._emit(torch.bitwise_xor, c.bits, self._truth(value=True).bits, bits=True)
        return self._negations[c.number]

    def _is_constant(self, symbol: Symbol, value: float | None = None) -> bool:
        # by repr, because −0 is not 0
        given = self._constants.get(symbol.name) if symbol.operation == "constant" else None
        return given is not None and (value is None or repr(given) == repr(value))

    def _constant(self, value: float) -> Value:
        return self._tensor(torch.tensor(value, dtype=self._dtype))

    def _truth(self, value: bool) -> Value:  # noqa: FBT001 -- a value, not a choice
        return self._tensor(torch.tensor(int(value), dtype=_bits(self._dtype)).view(self._dtype))

    def _tensor(self, value: torch.Tensor) -> Value:
        place = self._place()
        self._tensors[place] = value
        return place

    def _place(self) -> Value:
        self._places += 1
        return Value(self._places - 1)

    def _emit(self, function: Callable[..., Any], *operands: Value, bits: bool = False) -> Value:
        out = self._place()
        if all(Value(operand.number) in self._tensors for operand in operands):
            self._tensors[out] = torch.empty((), dtype=self._dtype)
            views = self._tensors | {place.bits: tensor.view(_bits(self._dtype)) for place, tensor in self._tensors.items()}
            function(*(views[operand] for operand in operands), out=views[out.bits if bits else out])
            return out
        self._steps.append(Step(function, operands, out.bits if bits else out))
        return out


def _finisher(
    trace: Trace, reductions: list[Symbol], result: PolicyLoss, dtype: torch.dtype
) -> Callable[[list[torch.Tensor]], tuple[torch.Tensor, Diagnostics | None]]:
    """Add up the sums and maxima of all pieces, in float64, and compute what depends on them."""
    names = [symbol.name for symbol in reductions]
    sums = sum(symbol.operation == "sum" for symbol in reductions)

    def finish(partial: list[torch.Tensor]) -> tuple[torch.Tensor, Diagnostics | None]:
        figures = torch.stack(partial).view(-1, len(names)).to(torch.float64)
        whole = torch.cat((figures[:, :sums].sum(0), figures[:, sums:].amax(0))).to(dtype)
        known = dict(zip(names, whole.unbind(), strict=True))

        def value(symbol: Symbol) -> torch.Tensor:
            if symbol.name in known:
                return known[symbol.name]
            if symbol.operation == "constant":
                return torch.tensor(trace.constants[symbol.name], dtype=dtype)
            combined: torch.Tensor = ARITHMETIC[symbol.operation](*map(value, symbol.arguments))
            return combined

        statistics = result.diagnostics
        if statistics is not None:
            statistics = {name: type(s)(*map(value, s)) for name, s in statistics.items()}
        return value(result.loss), statistics

    return finish


def _bits(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def _convert(x: torch.Tensor, *, out: torch.Tensor) -> None:
    out.copy_(x)


def _flip_sign(x: torch.Tensor, condition: torch.Tensor, *, out: torch.Tensor) -> None:
    """Add the sign bit, modulo 2³² or 2⁶⁴, where the condition is 1."""
    torch.add(x, condition, alpha=torch.iinfo(x.dtype).min, out=out)
