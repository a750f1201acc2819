"""A traced pass over the tokens, replayed by a library's own vectorised operations on pieces that stay in the cache.

A selection or a comparison to bool takes as long as several multiplications, in NumPy as in torch on a CPU. So a truth value
is an integer 0 or 1 as wide as the floats, and a selection is integer arithmetic on the bits of floats: exact, and blind
to NaN. Results share registers, and overwrite an operand that is not needed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from drpo_core.policy_loss import policy_loss_of
from drpo_core.trace import BOOL, FLOAT, Symbol, Trace, UntraceableError

if TYPE_CHECKING:
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.objectives import Objective
    from drpo_core.policy_loss import PolicyLoss
    from drpo_core.types import Array, Namespace

__all__ = ["ARITHMETIC", "COMPARISONS", "Library", "replay"]

Operation = Callable[..., Any]

INPUTS = ("log_prob", "behavior_log_prob", "advantages", "mask", "coefficients", "divergence")

ARITHMETIC = (
    *("abs", "add", "divide", "exp", "expm1", "log", "log1p", "maximum", "minimum", "multiply", "negative"),
    *("sqrt", "square", "subtract", "tanh"),
)
COMPARISONS = ("equal", "greater", "greater_equal", "less", "less_equal", "not_equal")

CLAMPS = {"greater": "at_most", "less": "at_least", "minimum": "at_most", "maximum": "at_least"}
"""What it is to select a constant where a value is beyond it, and an extremum with a constant."""


@dataclass(frozen=True, eq=False)
class Library:
    """What a replay asks of an array library, whose arrays can be assigned to and viewed as another dtype of their width.

    Operations are elementwise and take `out`, which may be an operand.
    """

    xp: Namespace
    arithmetic: Mapping[str, Operation]
    """`ARITHMETIC`, by the Array API's names, and `sign`, which passes on a NaN; in `out`'s dtype."""
    comparisons: Mapping[str, Operation]
    """`COMPARISONS`: 0 or 1 in an `out` of integers."""
    connectives: Mapping[str, Operation]
    """Of integers 0 and 1: `logical_and`, `logical_or`, and `differ`."""
    clamps: Mapping[str, Operation]
    """`at_most` and `at_least`: of an array and a number; NaN passes."""
    convert: Operation
    """From a dtype to that of `out`."""
    flip_sign: Operation
    """The bits of x with another sign bit, where the second operand is 1."""
    reductions: Mapping[str, Operation]
    """`sum` and `max`, over all elements."""
    total: Callable[[Sequence[Any], int, int, Any], Sequence[Any]]
    """``total(figures, width, sums, dtype)``: of rows of `width` figures, the first `sums` added up, the others' maxima."""


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

    function: Operation
    operands: tuple[Value, ...]
    out: Value | None


class Program(NamedTuple):
    """Steps for every piece, in terms of registers, and what finishes their reductions."""

    steps: list[Step]
    inputs: dict[str, Value]
    constants: dict[Value, Array]
    registers: int
    gradient: Value
    finish: Callable[[list[Any]], tuple[Array, Diagnostics | None]]


def replay(
    objective: Objective,
    arrays: tuple[Array | None, ...],
    gradient: Array,
    dtype: Any,
    *,
    diagnostics: bool,
    size: int,
    library: Library,
) -> tuple[Array, Diagnostics | None]:
    """Loss and diagnostics of `INPUTS`; the final gradient is written to `gradient`. At least one token, `size` at a time.

    Raises `UntraceableError` where the objective is not one operation after another on the numbers of one token.
    """
    # an objective that is equal only to itself may have changed since
    build = _program if type(objective).__hash__ not in (None, object.__hash__) else _program.__wrapped__
    program = build(objective, dtype, diagnostics, arrays[-1] is not None, library)  # type: ignore[arg-type]
    xp = library.xp
    columns = gradient.shape[-1] if gradient.ndim else 1
    given = {
        name: xp.reshape(xp.broadcast_to(array, gradient.shape), (-1, columns))
        for name, array in zip(INPUTS, arrays, strict=True)
        if array is not None and name in program.inputs
    }
    given["mask"] = given["mask"].view(xp.uint8)
    target = xp.reshape(gradient, (-1, columns))
    memory = xp.empty((program.registers, min(size, target.shape[0] * columns)), dtype=dtype)
    collected: list[Any] = []
    shape: tuple[int, ...] | None = None
    views: dict[Value, Array] = {}
    calls: list[Callable[[], object] | None] = []
    for rows, part in _pieces(target.shape[0], columns, size):
        piece = target[rows, part]
        if piece.shape != shape:
            shape = piece.shape
            count = shape[0] * shape[1]
            registers = {Value(i): xp.reshape(memory[i, :count], shape) for i in range(program.registers)}
            views = _with_bits(registers | program.constants, dtype, xp)
            # bound once, because looking up operands takes as long as a small operation
            calls = [
                _bound(step, views, collected) if all(map(views.__contains__, step.operands)) else None
                for step in program.steps
            ]
        views |= {
            program.inputs[name]: array[rows, part] if name == "mask" else xp.astype(array[rows, part], dtype, copy=False)
            for name, array in given.items()
        }
        views |= _with_bits({place: views[place] for name, place in program.inputs.items() if name != "mask"}, dtype, xp)
        for step, call in zip(program.steps, calls, strict=True):
            (call or _bound(step, views, collected))()
        target[rows, part] = views[program.gradient]
    return program.finish(collected)


def _with_bits(views: dict[Value, Array], dtype: Any, xp: Namespace) -> dict[Value, Array]:
    return views | {value.bits: view.view(_bits(dtype, xp)) for value, view in views.items() if not value.as_integer}


def _bound(step: Step, views: dict[Value, Array], collected: list[Any]) -> Callable[[], object]:
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
def _program(
    objective: Objective,
    dtype: Any,
    diagnostics: bool,  # noqa: FBT001 -- a key
    measured: bool,  # noqa: FBT001
    library: Library,
) -> Program:
    trace = Trace(library.xp.finfo(dtype).eps)
    x, b, a, m, c, d = (trace.input(name, BOOL if name == "mask" else FLOAT) for name in INPUTS)
    try:
        measurement = d if measured else None
        result = policy_loss_of(
            objective, x, b, a, m, c, measurement, dtype=FLOAT, diagnostics=diagnostics, select=False, xp=trace.namespace
        )
    except (AttributeError, TypeError, ValueError) as error:
        # what does not work on symbols may on arrays, as a library's own functions do; if not, the plain pass says so
        msg = f"an objective that raises {error!r}"
        raise UntraceableError(msg) from error
    lowering = _Lowering(trace, dtype, library)
    reductions = [*trace.reductions("sum"), *trace.reductions("max")]
    gradient = lowering.of(result.gradient)
    for reduction in reductions:
        lowering.reduce(reduction)
    return lowering.program(gradient, _finisher(trace, reductions, result, dtype, library))


class _Lowering:
    """From symbols to steps, each result in a place of its own until `program` shares registers."""

    def __init__(self, trace: Trace, dtype: Any, library: Library) -> None:
        self._trace, self._constants = trace, trace.constants
        self._dtype, self._library = dtype, library
        self._of: dict[str, Value] = {}
        self._signs: dict[str, Value] = {}
        self._steps: list[Step] = []
        self._inputs: dict[str, Value] = {}
        self._arrays: dict[Value, Array] = {}
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
        if argument in self._arrays:
            msg = "a sum or maximum of what is the same for all tokens"
            raise UntraceableError(msg)
        self._steps.append(Step(self._library.reductions[symbol.operation], (argument,), None))

    def program(self, gradient: Value, finish: Callable[..., Any]) -> Program:
        """The steps with as few registers as there are results in use at once."""
        last = {operand.number: i for i, step in enumerate(self._steps) for operand in step.operands}
        last[gradient.number] = len(self._steps)
        # what is not the result of a step keeps its number, above all registers
        fixed = {value.number for value in (*self._inputs.values(), *self._arrays)}
        places, free, registers, steps = {n: n + self._places for n in fixed}, list[int](), 0, []

        def placed(value: Value) -> Value:
            return value._replace(number=places[value.number])

        for i, (function, operands, out) in enumerate(self._steps):
            moved = tuple(map(placed, operands))
            # freed before the result is placed, which may overwrite an operand
            free += {places[o.number] for o in operands if last[o.number] == i and o.number not in fixed}
            if out is not None:
                if not free:
                    free.append(registers)
                    registers += 1
                places[out.number] = free.pop()
            steps.append(Step(function, moved, None if out is None else placed(out)))
        inputs = {name: placed(value) for name, value in self._inputs.items()}
        constants = {placed(value): array for value, array in self._arrays.items()}
        return Program(steps, inputs, constants, registers, placed(gradient), finish)

    def _lowered(self, symbol: Symbol) -> Value:
        if symbol.operation == "input":
            value = self._inputs[symbol.name] = self._place()
            return value if symbol.kind == FLOAT else self._emit(self._library.convert, value, bits=True)
        if symbol.operation == "constant":
            return self._constant(self._constants[symbol.name]) if symbol.kind == FLOAT else self._truth(symbol.name == "True")
        return self._selected(*symbol.arguments) if symbol.operation == "where" else self._computed(symbol)

    def _clamped(self, operation: str, x: Symbol, bound: Symbol) -> Value:
        # a number, not an operand: a bound that is an array, of one element even, makes it several times slower
        clamp, number = self._library.clamps[CLAMPS[operation]], self._constants[bound.name]
        return self._emit(lambda x, *, out: clamp(x, number, out=out), self.of(x))

    def _computed(self, symbol: Symbol) -> Value:
        if symbol.operation in ("minimum", "maximum") and self._is_constant(symbol.arguments[1]):
            return self._clamped(symbol.operation, *symbol.arguments)
        name, operands = symbol.operation, [self.of(argument) for argument in symbol.arguments]
        connectives = self._library.connectives
        if name == "logical_not":
            return self._emit(connectives["differ"], operands[0].bits, self._truth(value=True).bits, bits=True)
        if name in connectives:
            return self._emit(connectives[name], *(operand.bits for operand in operands), bits=True)
        if any(argument.kind == BOOL for argument in symbol.arguments):
            msg = f"{name} of truth values"
            raise UntraceableError(msg)
        return self._of_numbers(name, operands)

    def _of_numbers(self, name: str, operands: list[Value]) -> Value:
        arithmetic, comparisons = self._library.arithmetic, self._library.comparisons
        if name in comparisons:
            return self._emit(comparisons[name], *operands, bits=True)
        if name == "isnan":
            return self._emit(comparisons["not_equal"], *operands, *operands, bits=True)
        if name in ("isfinite", "isinf"):
            comparison = comparisons["less" if name == "isfinite" else "equal"]
            return self._emit(comparison, self._emit(arithmetic["abs"], *operands), self._constant(math.inf), bits=True)
        if name not in arithmetic:
            raise UntraceableError(name)
        return self._emit(arithmetic[name], *operands)

    def _selected(self, condition: Symbol, x: Symbol, y: Symbol) -> Value:
        """Integer arithmetic, modulo 2³² or 2⁶⁴, on the bits: y + c (x − y), and less where less will do."""
        arithmetic = self._library.arithmetic
        if condition.operation in ("greater", "less") and self._is_constant(x):
            tested, bound = condition.arguments
            if tested is y and bound is x:
                return self._clamped(condition.operation, y, x)
        if x.operation == "negative" and x.arguments[0] is y:
            return self._emit(self._library.flip_sign, self.of(y).bits, self.of(condition).bits, bits=True)
        if self._is_along_sign(condition, x, y):
            return self._emit(arithmetic["multiply"], self._sign(condition.arguments[0]), self.of(x))
        if self._is_constant(x, 0.0):
            x, y, condition = y, x, self._trace.apply("logical_not", condition)
        c = self.of(condition).bits
        if self._is_constant(y, 0.0):
            return self._emit(arithmetic["multiply"], self.of(x).bits, c, bits=True)
        difference = self._emit(arithmetic["subtract"], self.of(x).bits, self.of(y).bits, bits=True)
        product = self._emit(arithmetic["multiply"], difference.bits, c, bits=True)
        return self._emit(arithmetic["add"], product.bits, self.of(y).bits, bits=True)

    def _is_along_sign(self, condition: Symbol, x: Symbol, y: Symbol) -> bool:
        """Whether x is taken where a > 0, else −x where a < 0, else a: sign(a)·x of a finite x, a NaN passed on."""
        if [condition.operation, y.operation] != ["greater", "where"]:
            return False
        (a, zero), (below, opposite, rest) = condition.arguments, y.arguments
        return (
            self._is_constant(zero, 0.0)
            and rest is a
            and below is self._trace.apply("less", a, zero)
            and opposite is self._trace.apply("negative", x)
        )

    def _sign(self, a: Symbol) -> Value:
        if a.name not in self._signs:
            self._signs[a.name] = self._emit(self._library.arithmetic["sign"], self.of(a))
        return self._signs[a.name]

    def _is_constant(self, symbol: Symbol, value: float | None = None) -> bool:
        # by repr, because −0 is not 0
        given = self._constants.get(symbol.name) if symbol.operation == "constant" else None
        return given is not None and (value is None or repr(given) == repr(value))

    def _constant(self, value: float) -> Value:
        return self._array(self._library.xp.asarray(value, dtype=self._dtype))

    def _truth(self, value: bool) -> Value:  # noqa: FBT001 -- a value, not a choice
        xp = self._library.xp
        return self._array(xp.asarray(int(value), dtype=_bits(self._dtype, xp)).view(self._dtype))

    def _array(self, value: Array) -> Value:
        place = self._place()
        self._arrays[place] = value
        return place

    def _place(self) -> Value:
        self._places += 1
        return Value(self._places - 1)

    def _emit(self, function: Operation, *operands: Value, bits: bool = False) -> Value:
        out = self._place()
        if all(Value(operand.number) in self._arrays for operand in operands):
            xp = self._library.xp
            self._arrays[out] = xp.empty((), dtype=self._dtype)
            views = _with_bits(self._arrays, self._dtype, xp)
            function(*(views[operand] for operand in operands), out=views[out.bits if bits else out])
            return out
        self._steps.append(Step(function, operands, out.bits if bits else out))
        return out


def _finisher(
    trace: Trace, reductions: list[Symbol], result: PolicyLoss, dtype: Any, library: Library
) -> Callable[[list[Any]], tuple[Array, Diagnostics | None]]:
    """Add up the sums and maxima of all pieces, in float64, and compute what depends on them."""
    names = [symbol.name for symbol in reductions]
    sums = sum(symbol.operation == "sum" for symbol in reductions)

    def finish(figures: list[Any]) -> tuple[Array, Diagnostics | None]:
        known = dict(zip(names, library.total(figures, len(names), sums, dtype), strict=True))

        def value(symbol: Symbol) -> Array:
            if symbol.name in known:
                return known[symbol.name]
            if symbol.operation == "constant":
                return library.xp.asarray(trace.constants[symbol.name], dtype=dtype)
            return library.arithmetic[symbol.operation](*map(value, symbol.arguments))

        statistics = result.diagnostics
        if statistics is not None:
            statistics = {name: type(s)(*map(value, s)) for name, s in statistics.items()}
        return value(result.loss), statistics

    return finish


def _bits(dtype: Any, xp: Namespace) -> Any:
    return xp.int64 if dtype == xp.float64 else xp.int32
