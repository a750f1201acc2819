"""The operations that Array-API code performs on each token, recorded by running it once on symbols.

The recording is straight-line source over scalars, with common sub-expressions shared, which `drpo_core.engines.numba_loop`
compiles. So a formula stays where it is written, and any objective can be compiled, a user's own too.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["BOOL", "FLOAT", "ROW_REDUCTIONS", "Symbol", "Trace", "UntraceableError"]

FLOAT, BOOL = "float", "bool"

_FLOAT_TEMPLATES = {
    "abs": "abs({})",
    "add": "{} + {}",
    "divide": "{} / {}",
    "exp": "exp({})",
    "expm1": "expm1({})",
    "log": "log({})",
    "log1p": "log1p({})",
    "maximum": "select(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "minimum": "select(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "multiply": "{} * {}",
    "negative": "-{}",
    "sign": "select({0} > zero, one, select({0} < zero, -one, {0}))",
    "sqrt": "sqrt({})",
    "square": "{0} * {0}",
    "subtract": "{} - {}",
    "tanh": "tanh({})",
}
_BOOL_TEMPLATES = {
    "equal": "{} == {}",
    "greater": "{} > {}",
    "greater_equal": "{} >= {}",
    "isfinite": "abs({}) < infinity",
    "isinf": "abs({}) == infinity",
    "isnan": "{0} != {0}",
    "less": "{} < {}",
    "less_equal": "{} <= {}",
    "logical_and": "{} & {}",
    "logical_not": "negated({})",
    "logical_or": "{} | {}",
    "not_equal": "{} != {}",
}
_ALIASES = {
    "bitwise_and": "logical_and",
    "bitwise_invert": "logical_not",
    "bitwise_or": "logical_or",
    "invert": "logical_not",
    "true_divide": "divide",
}
_OPPOSITES = {"equal": "not_equal", "not_equal": "equal"}
_EXTREMA = {"maximum": "select({0} < {1}, {1}, {0})", "minimum": "select({0} > {1}, {1}, {0})"}
_TEMPLATES = _FLOAT_TEMPLATES | _BOOL_TEMPLATES | {"where": "select({}, {}, {})"}
ROW_REDUCTIONS = ("row_sum", "row_max")
_ON_HOST: dict[str, Any] = {
    **{name: getattr(np, name) for name in ("exp", "expm1", "log", "log1p", "sqrt", "tanh")},
    "abs": abs,
    "negated": operator.not_,
    "zero": 0.0,
    "one": 1.0,
    "infinity": math.inf,
    "select": lambda condition, x, y: x if condition else y,
}
"""What the templates' names are for NumPy's scalars, whose arithmetic is IEEE's: Python's raises on 1/0."""


class UntraceableError(NotImplementedError):
    """An operation that can't be compiled; array operations run it.

    A NotImplementedError, because the compiled engine is what lacks something: a TypeError or ValueError would say that the
    objective is at fault.
    """

    def __init__(self, operation: str, finding: str = "can't be compiled") -> None:
        """Name the operation, and say what was found of it."""
        super().__init__(f"{operation} {finding}; engine='arrays' runs any objective")


def _operator(name: str, *, reflected: bool = False) -> Callable[..., Any]:
    def method(self: Symbol, *others: object) -> Symbol:
        arguments = (*others, self) if reflected else (self, *others)
        return self.trace.apply(name, *arguments)

    return method


class Symbol:
    """The result of an operation on the symbols of a token.

    `uniform`: the same for all tokens, known before them, as constants and parameters are. `row`: the same for all tokens of
    a row, made of sums and maxima over it, and known after `stage` passes over its tokens. `reduced`: made of sums and maxima
    over all tokens, known after them.
    """

    __slots__ = ("arguments", "kind", "name", "operation", "reduced", "row", "stage", "trace", "uniform")

    ndim = 1

    def __init__(self, trace: Trace, operation: str, arguments: tuple[Symbol, ...], kind: str, name: str) -> None:
        """Use `Trace.apply`, which shares what was recorded before."""
        self.trace, self.operation, self.arguments, self.kind, self.name = trace, operation, arguments, kind, name
        self.reduced: bool = operation in ("sum", "max") or any(argument.reduced for argument in arguments)
        computed = operation in _TEMPLATES
        self.uniform: bool = operation in ("constant", "parameter") or (computed and all(a.uniform for a in arguments))
        over_row = operation in ROW_REDUCTIONS
        self.row: bool = over_row or (computed and not self.uniform and all(a.uniform or a.row for a in arguments))
        self.stage: int = max((argument.stage for argument in arguments), default=0) + over_row

    @property
    def shape(self) -> tuple[_Extent]:
        """Of unknown length."""
        return (_Extent(),)

    @property
    def dtype(self) -> str:
        """`FLOAT` or `BOOL`."""
        return self.kind

    def __bool__(self) -> bool:
        """Refuse: the trace has no value to decide by."""
        msg = "a Python condition on a token's value (xp.where is an array operation)"
        raise UntraceableError(msg)

    def __pow__(self, exponent: int) -> Symbol:
        """Small whole powers, by multiplication."""
        if exponent not in (1, 2, 3, 4):
            msg = f"the power {exponent!r}"
            raise UntraceableError(msg)
        power = self
        for _ in range(1, exponent):
            power = self.trace.apply("multiply", power, self)
        return power

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: object, **options: object) -> Symbol:
        """NumPy's functions and scalars, by the name of the function."""
        if method != "__call__" or options:
            msg = f"numpy.{ufunc.__name__}"
            raise UntraceableError(msg)
        return getattr(self.trace.namespace, ufunc.__name__)(*inputs)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        """Refuse, naming the attribute."""
        msg = f"the array attribute {name}"
        if name.startswith("__"):
            raise AttributeError(msg)
        raise UntraceableError(msg)

    __add__ = _operator("add")
    __radd__ = _operator("add", reflected=True)
    __sub__ = _operator("subtract")
    __rsub__ = _operator("subtract", reflected=True)
    __mul__ = _operator("multiply")
    __rmul__ = _operator("multiply", reflected=True)
    __truediv__ = _operator("divide")
    __rtruediv__ = _operator("divide", reflected=True)
    __neg__ = _operator("negative")
    __abs__ = _operator("abs")
    __and__ = _operator("logical_and")
    __rand__ = _operator("logical_and", reflected=True)
    __or__ = _operator("logical_or")
    __ror__ = _operator("logical_or", reflected=True)
    __invert__ = _operator("logical_not")
    __lt__ = _operator("less")
    __le__ = _operator("less_equal")
    __gt__ = _operator("greater")
    __ge__ = _operator("greater_equal")
    __eq__ = _operator("equal")
    __ne__ = _operator("not_equal")
    __hash__ = object.__hash__


class _Extent:
    """How many tokens there are: more than none, and otherwise not known when they are recorded."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        """Whether it is another extent of this recording."""
        return isinstance(other, _Extent)

    def _refused(self, _: object) -> bool:
        msg = "what depends on how many tokens there are"
        raise UntraceableError(msg)

    __lt__ = __le__ = __gt__ = __ge__ = _refused


class TracedNamespace:
    """The part of the Array API that a trace knows; anything else raises `UntraceableError`."""

    inf, nan = float("inf"), float("nan")
    pi, e = math.pi, math.e
    float32 = float64 = int32 = int64 = FLOAT

    def __init__(self, trace: Trace, epsilon: float) -> None:
        """A namespace that records into a trace."""
        self._trace, self._epsilon = trace, epsilon
        # not in the class, where it would hide the built-in type
        self.bool = BOOL

    def __getattr__(self, name: str) -> Callable[..., Symbol]:
        """An elementwise function."""
        name = _ALIASES.get(name, name)
        if name not in _TEMPLATES:
            msg = f"xp.{name}"
            raise UntraceableError(msg)

        def function(*arguments: object) -> Symbol:
            return self._trace.apply(name, *arguments)

        return function

    def finfo(self, dtype: str) -> FloatInfo:  # noqa: ARG002
        """Of the floats that the recording will be run with."""
        return FloatInfo(self._epsilon)

    def isdtype(self, dtype: str, kind: str) -> bool:
        """Whether a dtype is of the kind ``"bool"`` or ``"real floating"``."""
        return kind == {FLOAT: "real floating", BOOL: "bool"}[dtype]

    def astype(self, x: Symbol, dtype: str, **_: object) -> Symbol:
        """Between truth values and numbers; there is one kind of number."""
        if x.kind == dtype:
            return x
        return self._trace.apply("not_equal", x, 0.0) if dtype == BOOL else self._trace.apply("where", x, 1.0, 0.0)

    def ones_like(self, x: Symbol) -> Symbol:
        """One."""
        return self.full_like(x, 1.0)

    def zeros_like(self, x: Symbol) -> Symbol:
        """Zero."""
        return self.full_like(x, 0.0)

    def full_like(self, x: Symbol, value: float) -> Symbol:  # noqa: ARG002
        """A constant."""
        return self._trace.symbol(value)

    def clip(self, x: Symbol, low: object, high: object) -> Symbol:
        """min(max(x, low), high)."""
        return self._trace.apply("minimum", self._trace.apply("maximum", x, low), high)

    def broadcast_to(self, x: Symbol, shape: object) -> Symbol:  # noqa: ARG002
        """The symbol: what is the same for all tokens of a row is there for each of them."""
        return x

    def sum(self, x: Symbol, *, axis: int | None = None, keepdims: bool = False) -> Symbol:
        """Over all tokens, or those of a row."""
        return self._trace.reduce(_over("sum", axis, keepdims=keepdims), x)

    def count_nonzero(self, x: Symbol) -> Symbol:
        """Over all tokens."""
        return self.sum(self.astype(self.astype(x, BOOL), FLOAT))

    def max(self, x: Symbol, *, axis: int | None = None, keepdims: bool = False) -> Symbol:
        """Over all tokens, or those of a row; −inf if there are none."""
        return self._trace.reduce(_over("max", axis, keepdims=keepdims), x)

    def min(self, x: Symbol) -> Symbol:
        """Over all tokens; +inf if there are none."""
        apply = self._trace.apply
        return apply("negative", self.max(apply("negative", x)))


def _over(operation: str, axis: int | None, *, keepdims: bool) -> str:
    """The reduction over all tokens, or over those of a row."""
    if axis is None and not keepdims:
        return operation
    if axis != -1 or not keepdims:
        msg = f"xp.{operation} over axis {axis}"
        raise UntraceableError(msg)
    return f"row_{operation}"


class FloatInfo(NamedTuple):
    """The part of the Array API's `finfo` that a trace knows."""

    eps: float


class RowStage(NamedTuple):
    """A pass over the tokens of a row: what is done for each, what is reduced of that, and what is made of the results."""

    per_token: list[str]
    reductions: list[Symbol]
    after: list[str]


class Statements(NamedTuple):
    """Source of a trace: what is done before the tokens, first for each row, for each token, and with the sums and maxima."""

    uniform: list[str]
    rows: list[RowStage]
    per_token: list[str]
    reduced: list[str]


class Trace:
    """What was done to the symbols of a token, each operation once."""

    def __init__(self, epsilon: float = 2.0**-52) -> None:
        """Nothing yet; `epsilon` is that of the floats it will be run with."""
        self.namespace = TracedNamespace(self, epsilon)
        self.constants: dict[str, float] = {}
        self._symbols: dict[tuple[object, ...], Symbol] = {}

    def input(self, name: str, kind: str = FLOAT) -> Symbol:
        """A symbol that stands for what the caller will pass for each token."""
        return self._shared(("input", name), "input", (), kind, name)

    def parameter(self, name: str) -> Symbol:
        """A symbol that stands for a number that the caller will pass."""
        return self._shared(("parameter", name), "parameter", (), FLOAT, name)

    def symbol(self, value: object) -> Symbol:
        """A symbol, or a constant as one."""
        if isinstance(value, Symbol):
            return value
        if isinstance(value, bool):
            return self._shared((value,), "constant", (), BOOL, repr(value))
        if not isinstance(value, numbers.Real):
            msg = f"a {type(value).__name__} among the operands"
            raise UntraceableError(msg)
        # by repr, because −0 is not 0 and NaN not NaN
        symbol = self._shared((repr(float(value)),), "constant", (), FLOAT, f"k{len(self.constants)}")
        self.constants[symbol.name] = float(value)
        return symbol

    def apply(self, operation: str, *operands: object) -> Symbol:
        """The result of an operation, or of a simpler one of the same value, recorded unless it was before."""
        arguments = tuple(self.symbol(operand) for operand in operands)
        if operation == "logical_not" and arguments[0].operation in _OPPOSITES:
            return self.apply(_OPPOSITES[arguments[0].operation], *arguments[0].arguments)
        if operation == "subtract" and all(self._is_cleared(argument) for argument in arguments):
            (condition, zero, x), (other, _, y) = (argument.arguments for argument in arguments)
            if condition is other:
                return self.apply("where", condition, zero, self.apply("subtract", x, y))
        kind = arguments[-1].kind if operation == "where" else BOOL if operation in _BOOL_TEMPLATES else FLOAT
        key = (operation, *(argument.name for argument in arguments))
        return self._shared(key, operation, arguments, kind, f"v{len(self._symbols)}")

    def reduce(self, operation: str, x: Symbol) -> Symbol:
        """A symbol's ``"sum"`` or ``"max"`` over all tokens, or its ``"row_sum"`` or ``"row_max"`` over those of a row."""
        if x.reduced:
            msg = "a sum or maximum over tokens in what is done for each token"
            raise UntraceableError(msg)
        if x.row:
            msg = "a sum or maximum over rows"
            raise UntraceableError(msg)
        return self.apply(operation, x)

    def reductions(self, operation: str) -> list[Symbol]:
        """All symbols that are a ``"sum"`` or ``"max"`` over tokens."""
        return [symbol for symbol in self._symbols.values() if symbol.operation == operation]

    def signature(self) -> tuple[Any, ...]:
        """All that was recorded, to be compared with another recording."""
        return tuple(self._symbols), tuple(self.constants.items())

    def uniforms(self) -> list[Symbol]:
        """Symbols other than constants that are known before the tokens and used for each of them."""
        used = {a.name: a for s in self._symbols.values() if not s.uniform for a in s.arguments if a.uniform}
        return [symbol for symbol in used.values() if symbol.operation != "constant"]

    def inputs(self) -> list[Symbol]:
        """All symbols that the caller passes for each token."""
        return [symbol for symbol in self._symbols.values() if symbol.operation == "input"]

    def statements(self, *outputs: Symbol) -> Statements:
        """Assignments in an order in which they can be executed; `outputs`: what is wanted of each token."""
        computed = [symbol for symbol in self._symbols.values() if symbol.operation in _TEMPLATES]
        over_rows = [symbol for symbol in self._symbols.values() if symbol.operation in ROW_REDUCTIONS]
        reduced = [s.arguments[0] for operation in ("sum", "max") for s in self.reductions(operation)]
        rows = []
        for stage in range(1, max((symbol.stage for symbol in over_rows), default=0) + 1):
            reductions = [symbol for symbol in over_rows if symbol.stage == stage]
            after = _source(s for s in computed if s.row and s.stage == stage)
            rows.append(RowStage(self._for_each_token(s.arguments[0] for s in reductions), reductions, after))
        return Statements(
            _source(s for s in computed if s.uniform),
            rows,
            self._for_each_token((*outputs, *reduced)),
            _source(s for s in computed if not s.uniform and s.reduced),
        )

    def _for_each_token(self, wanted: Iterable[Symbol]) -> list[str]:
        """Assignments of what these are made of, apart from what is the same for several tokens."""
        needed: dict[str, Symbol] = {}
        left = list(wanted)
        while left:
            symbol = left.pop()
            if symbol.name not in needed and not (symbol.uniform or symbol.row or symbol.operation == "input"):
                needed[symbol.name] = symbol
                left += symbol.arguments
        return _source(symbol for symbol in self._symbols.values() if symbol.name in needed)

    def on_host(self, statements: list[str], given: dict[str, Any]) -> dict[str, Any]:
        """All values by name, after statements on float64; `given` has those that they start from."""
        values = _ON_HOST | {name: np.float64(value) for name, value in (self.constants | given).items()}
        with np.errstate(all="ignore"):
            exec("\n".join(statements), values)  # noqa: S102
        return values

    def _is_cleared(self, symbol: Symbol) -> bool:
        """Whether it is 0 where some condition holds."""
        return symbol.operation == "where" and symbol.arguments[1] is self.symbol(0.0)

    def _shared(self, key: tuple[object, ...], operation: str, arguments: tuple[Symbol, ...], kind: str, name: str) -> Symbol:
        if key not in self._symbols:
            self._symbols[key] = Symbol(self, operation, arguments, kind, name)
        return self._symbols[key]


def parametrised(thing: Any, trace: Trace) -> Any:
    """A copy of an object whose attributes that are floats are parameters of the trace, in the order of `floats_of`.

    So are those of the dataclasses that it keeps, also in tuples. The object itself where it has none.
    """
    return _with_parameters(thing, trace, count())


def _with_parameters(thing: Any, trace: Trace, numbers: Iterator[int]) -> Any:
    if isinstance(thing, _FLOATS):
        return trace.parameter(f"p{next(numbers)}")
    if not floats_of(thing):
        return thing
    if type(thing) is tuple:
        return tuple(_with_parameters(part, trace, numbers) if _has_parts(part) else part for part in thing)
    attributes = {
        name: _with_parameters(value, trace, numbers) if isinstance(value, _FLOATS) or _has_parts(value) else value
        for name, value in _attributes(thing).items()
    }
    in_tuple = {name: attributes.pop(name) for name in getattr(type(thing), "_fields", ())}
    copy = thing._replace(**in_tuple) if in_tuple else object.__new__(type(thing))
    for name, value in attributes.items():
        object.__setattr__(copy, name, value)
    return copy


def floats_of(thing: Any) -> list[float]:
    """The values of an object's attributes that are floats, NumPy's included, and of the dataclasses that it keeps."""
    if type(thing) is tuple:
        return [number for part in thing if _has_parts(part) for number in floats_of(part)]
    found: list[float] = []
    for value in _attributes(thing).values():
        found += [float(value)] if isinstance(value, _FLOATS) else floats_of(value) if _has_parts(value) else []
    return found


def statics_of(thing: Any) -> tuple[Any, ...]:
    """An object's attributes, with a float's type in the place of its value."""
    if type(thing) is tuple:
        return tuple((type(part), statics_of(part)) if _has_parts(part) else part for part in thing)
    return tuple(
        (name, float if isinstance(value, _FLOATS) else (type(value), statics_of(value)) if _has_parts(value) else value)
        for name, value in _attributes(thing).items()
    )


def _has_parts(value: object) -> bool:
    """Whether it is a dataclass, whose numbers are parameters too, or a tuple, which may hold some."""
    return type(value) is tuple or (dataclasses.is_dataclass(value) and not isinstance(value, type))


_FLOATS = (float, np.floating)


def _attributes(thing: Any) -> dict[str, Any]:
    """All that an object keeps: in the fields of a named tuple, in slots and in its dict."""
    kind = type(thing)
    names = [*getattr(kind, "_fields", ()), *getattr(kind, "__dataclass_fields__", ())]
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        names += (slots,) if isinstance(slots, str) else slots
    kept = {name: getattr(thing, name) for name in names if not name.startswith("__") and hasattr(thing, name)}
    return kept | getattr(thing, "__dict__", {})


def _source(symbols: Iterable[Symbol]) -> list[str]:
    return [f"{s.name} = {_template(s).format(*(a.name for a in s.arguments))}" for s in symbols]


def _template(symbol: Symbol) -> str:
    """Of the operation; with a constant, an extremum is one instruction and still passes on a NaN."""
    if symbol.operation in _EXTREMA and symbol.arguments[1].operation == "constant":
        return _EXTREMA[symbol.operation]
    return _TEMPLATES[symbol.operation]
