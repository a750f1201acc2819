"""Any objective's loss, final gradient and diagnostics as one compiled loop over NumPy arrays (extra `compiled`: numba).

The pass over the tokens, the objective's own methods included, is run once on symbols (`drpo_core.engines.trace`). What it
did is compiled, so that every token is read once and nothing but the gradient is written. Thresholds are arguments of the
loop. Sums are taken in float64 over blocks of fixed size, so the result is the same for any number of threads. Where a
token's result depends on its whole row, as with the ratio of a sequence, the loop passes over each row as often as it must.
"""

from __future__ import annotations

import os
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np

from drpo_core.diagnostics import map_diagnostics
from drpo_core.engines.elementary import functions, wide_vectors
from drpo_core.engines.threads import in_threads
from drpo_core.engines.trace import BOOL, FLOAT, Trace, UntraceableError, floats_of, parametrised, statics_of
from drpo_core.modes.mode import Mode, is_known, parts_of
from drpo_core.objectives.protocol import inside_of, loss_of, ratio_weight_of, weight_of
from drpo_core.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from drpo_core._arrays import Spread
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.engines.trace import RowStage, Statements, Symbol
    from drpo_core.objectives import Objective

    Pass = Callable[..., Any]
    """`drpo_core.loss.policy_pass`."""

__all__ = ["compilations", "run"]

Result = TypeVar("Result")

BLOCK = 4096
"""Tokens summed in the dtype of the arithmetic, before float64 takes over."""

SEGMENTS = 64
"""Parts of the tokens whose sums are kept apart; what a thread is given is some of them."""

TOKENS_PER_THREAD = 1 << 16
"""Below so many, starting a thread takes longer than it saves."""

MOST_PROGRAMS = 256
"""Compiled loops that a process keeps."""

ARRAYS = (
    "log_prob",
    "behavior_log_prob",
    "advantages",
    "mask",
    "coefficients",
    "divergence",
    "proximal_log_prob",
    "reference_log_prob",
)


def run(
    policy_pass: Pass,
    objective: Objective,
    arrays: tuple[NDArray[Any] | None, ...],
    gradient: NDArray[Any],
    *,
    diagnostics: bool,
    width: int | None = None,
    threads: int | None = None,
    spread: Spread = in_threads,
) -> tuple[np.floating[Any], Diagnostics | None]:
    """Σ m c L and diagnostics of flat, C-contiguous arrays of the gradient's dtype; m c ∂L/∂log π goes to `gradient`.

    `arrays` are `ARRAYS`: the mask is boolean, the coefficients are one, one a row of tokens or one a token, and those after
    them may be None or left out. `width`: the tokens of a row, where an objective looks at rows. Raises
    `UntraceableError` if the objective does something that can't be compiled.
    """
    given = dict(zip(ARRAYS, arrays, strict=False))
    _check_sizes(given, gradient.size, width)
    names = tuple(name for name, array in given.items() if array is not None)
    program = program_of(policy_pass, objective, gradient.dtype, diagnostics=diagnostics, names=names)
    return program.run(given, gradient, tuple(floats_of(objective)), width, threads or _cpus(), spread)


def _check_sizes(given: dict[str, Any], size: int, width: int | None) -> None:
    """Raise `ValueError` where the loop would read beyond an array."""
    sizes = {name: array.size for name, array in given.items() if array is not None}
    coefficients = sizes.pop("coefficients")
    fits = size == 0 or (coefficients > 0 and size % coefficients == 0)
    if any(one != size for one in sizes.values()) or not fits:
        msg = f"expected arrays of {size} tokens and coefficients of a divisor of that, got {sizes} and {coefficients}"
        raise ValueError(msg)
    if width is not None and size and (width < 1 or size % width):
        msg = f"width: expected a divisor of {size} tokens, got {width}"
        raise ValueError(msg)


def compilations() -> int:
    """How many loops this process has compiled."""
    return _compile.cache_info().misses


class Program:
    """A compiled objective without its thresholds."""

    def __init__(self, trace: Trace, result: Any, dtype: np.dtype[Any]) -> None:
        """Compile what the trace has recorded, unless a loop of the same source was; `result` is made of its symbols."""
        if result.gradient.reduced:
            msg = "a sum or maximum over tokens in what is done for each token"
            raise UntraceableError(msg)
        statements, uniforms = trace.statements(result.gradient), trace.uniforms()
        sums, maxima = trace.reductions("sum"), trace.reductions("max")
        self._inputs = tuple(symbol.name for symbol in trace.inputs())
        self._rows = bool(statements.rows)
        source = _source(statements, self._inputs, uniforms, result.gradient, sums, maxima)
        self._loop = _compile(source, self._inputs, tuple(trace.constants.items()), dtype)
        self._trace, self._before = trace, statements.uniform
        self._after = compile("\n".join(statements.reduced), "<trace>", "exec")
        self._uniforms = [symbol.name for symbol in uniforms]
        self._sums, self._maxima = [symbol.name for symbol in sums], [symbol.name for symbol in maxima]
        self._loss, self._dtype = result.loss.name, dtype
        self._statistics = None if result.diagnostics is None else map_diagnostics(lambda s: s.name, result.diagnostics)
        self._lowest = _lowest(dtype)
        # a training run has one threshold, or a new one at each step
        self._known = lru_cache(maxsize=4)(self._prepare)

    def run(
        self,
        arrays: dict[str, NDArray[Any] | None],
        gradient: NDArray[Any],
        thresholds: tuple[float, ...],
        width: int | None,
        threads: int,
        spread: Spread,
    ) -> tuple[np.floating[Any], Diagnostics | None]:
        """See the module's `run`."""
        n, dtype = gradient.size, self._dtype
        share = max(1, n // max(1, arrays["coefficients"].size))  # type: ignore[union-attr]
        # the rows of a part; where nothing looks at rows, a part is one of them
        rows, width = self._parts(n, width)
        parts = -(-n // (rows * width))
        totals = np.zeros((parts, len(self._sums)))
        most = np.full((parts, len(self._maxima)), self._lowest, _integer(dtype))
        known, uniforms = self._known(thresholds)
        flat = [array.view(np.uint8) if array.dtype == np.bool_ else array for array in map(arrays.__getitem__, self._inputs)]  # type: ignore[union-attr]

        def run(first: int, last: int) -> None:
            self._loop(*flat, uniforms, gradient, share, width, rows, first, last, totals, most)

        spread(run, parts, min(threads, max(1, n // TOKENS_PER_THREAD)))
        values = known | dict(zip(self._sums, totals.sum(axis=0).tolist(), strict=True))
        if self._maxima:
            largest = _flipped(np.max(most, axis=0, initial=self._lowest)).view(dtype)
            values |= dict(zip(self._maxima, largest.tolist(), strict=True))
        exec(self._after, values)  # noqa: S102
        number = dtype.type
        loss, statistics = number(values[self._loss]), self._statistics
        return loss, None if statistics is None else map_diagnostics(lambda name: number(values[name]), statistics)

    def _parts(self, n: int, width: int | None) -> tuple[int, int]:
        """How many rows of how many tokens a part has, whose sums are kept apart."""
        if not self._rows:
            return 1, BLOCK * max(1, -(-n // (BLOCK * SEGMENTS)))
        if width is None:
            msg = "width: expected the tokens of a row, because the objective looks at rows, got None"
            raise ValueError(msg)
        return max(-(-n // (width * SEGMENTS)), -(-BLOCK // width)), width

    def _prepare(self, thresholds: tuple[float, ...]) -> tuple[dict[str, Any], NDArray[Any]]:
        """All values that are known before the tokens, and those that the loop needs."""
        known = self._trace.on_host(self._before, {f"p{i}": value for i, value in enumerate(thresholds)})
        return known, np.array([known[name] for name in self._uniforms], self._dtype)


_programs: dict[tuple[Any, ...], Program | UntraceableError] = {}
_programs_lock = Lock()


def program_of(
    policy_pass: Pass, objective: Objective, dtype: np.dtype[Any], *, diagnostics: bool, names: tuple[str, ...]
) -> Program:
    """The objective's program: one that was made before, if the objective is known to be the same but for its thresholds."""
    key = (policy_pass, *_identity(policy_pass, objective, diagnostics=diagnostics, names=names), dtype, diagnostics, names)
    program = _programs.get(key)
    if program is None:
        try:
            program = _made(policy_pass, objective, dtype, diagnostics=diagnostics, names=names)
        except UntraceableError as error:
            # remembered too: to find out takes some milliseconds
            program = error
        with _programs_lock:
            while len(_programs) >= MOST_PROGRAMS:
                # the oldest: objectives whose methods need the values of their numbers have a program for each value
                del _programs[next(iter(_programs))]
            _programs[key] = program
    if isinstance(program, UntraceableError):
        raise program
    return program


_METHODS = ("loss", "weight", "ratio_weight", "inside", "log_prob", "factor", "value_and_gradient")
"""Of objectives, anchors, corrections and penalties."""


def _identity(policy_pass: Pass, objective: Objective, *, diagnostics: bool, names: tuple[str, ...]) -> tuple[Any, ...]:
    """What tells an objective from all others, apart from its thresholds.

    The library's are known by their class and what is not a threshold. Any other is run on symbols at every call, because
    nothing else tells what it does now: it may read attributes and globals that have changed.
    """
    if is_known(objective):
        kinds = [type(part) for part in parts_of(objective)]
        return (*kinds, *(getattr(kind, name, None) for kind in kinds for name in _METHODS), statics_of(objective))

    def recorded(trace: Trace, traced: Objective) -> tuple[Any, ...]:
        if isinstance(objective, Mode):
            result = _recorded(policy_pass, trace, traced, diagnostics=diagnostics, names=names)
            return (result.loss.name, result.gradient.name, *trace.signature())
        numbers = {name: trace.input(name) for name in Tokens._fields if name not in ("divergence", "xp")}
        divergence = trace.input("divergence") if "divergence" in names else None
        tokens = Tokens(**numbers, divergence=divergence, xp=trace.namespace)
        results = [function(traced, tokens) for function in (loss_of, weight_of, ratio_weight_of, inside_of)]
        return (*(None if result is None else result.name for result in results), *trace.signature())

    try:
        return _with_or_without_thresholds(recorded, objective, np.dtype(np.float64))
    except (AttributeError, TypeError, ValueError) as error:
        # what does not work on symbols may on arrays; if not, array operations say so
        msg = f"an objective that raises {error!r}"
        raise UntraceableError(msg) from error


def _recorded(policy_pass: Pass, trace: Trace, traced: Objective, *, diagnostics: bool, names: tuple[str, ...]) -> Any:
    """What the pass does, on symbols."""
    inputs = {name: trace.input(name, BOOL if name == "mask" else FLOAT) for name in names}
    given = [inputs.get(name) for name in ARRAYS[: ARRAYS.index(names[-1]) + 1]]
    return policy_pass(traced, *given, dtype=FLOAT, diagnostics=diagnostics, select=False, xp=trace.namespace)


def _made(
    policy_pass: Pass, objective: Objective, dtype: np.dtype[Any], *, diagnostics: bool, names: tuple[str, ...]
) -> Program:
    def recorded(trace: Trace, traced: Objective) -> Program:
        return Program(trace, _recorded(policy_pass, trace, traced, diagnostics=diagnostics, names=names), dtype)

    return _with_or_without_thresholds(recorded, objective, dtype)


def _with_or_without_thresholds(record: Callable[[Trace, Any], Result], objective: Objective, dtype: np.dtype[Any]) -> Result:
    """What is recorded of an objective whose thresholds are symbols; or numbers, where its methods need their values."""
    epsilon = float(np.finfo(dtype).eps)
    if floats_of(objective):
        trace = Trace(epsilon)
        try:
            return record(trace, parametrised(objective, trace))
        except Exception:  # noqa: BLE001, S110 -- it can't be copied, or needs the value of a number
            pass
    return record(Trace(epsilon), objective)


def _source(
    statements: Statements,
    inputs: tuple[str, ...],
    uniforms: list[Symbol],
    gradient: Symbol,
    sums: list[Symbol],
    maxima: list[Symbol],
) -> str:
    stages = "".join(_stage(stage, inputs) for stage in statements.rows)
    return f"""
def loop({", ".join(f"all_{name}" for name in inputs)}, uniforms, all_gradient, share, width, rows, first, last, totals, most):
    wide_vectors()
    {_lines(4, (f"{s.name} = uniforms[{i}]" + (" != zero" if s.kind == BOOL else "") for i, s in enumerate(uniforms)))}
    buffer = empty({BLOCK}, dtype)
    for part in range(first, last):
        for row in range(part * rows, min((part + 1) * rows, -(-all_gradient.size // width))):
            begin, end = row * width, min((row + 1) * width, all_gradient.size)
            {stages}
            for start in range(begin, end, {BLOCK}):
                stop = min(start + {BLOCK}, end)
                # one coefficient a token, in the cache: a loop that looked its row up would not vectorise
                filled = start
                while filled < stop:
                    k = filled // share
                    until = min((k + 1) * share, stop)
                    buffer[filled - start : until - start] = all_coefficients[k]
                    filled = until
                # slices, because indices with an offset would not vectorise either
                {_lines(16, (f"block_{name} = all_{name}[start:stop]" for name in (*inputs, "gradient")))}
                block_coefficients = buffer[: stop - start]
                {_lines(16, (f"{s.name} = zero" for s in sums))}
                {_lines(16, (f"{s.name} = most[part, {i}]" for i, s in enumerate(maxima)))}
                for i in range(stop - start):
                    {_lines(20, _loaded(inputs))}
                    {_lines(20, statements.per_token)}
                    block_gradient[i] = {gradient.name}
                    {_lines(20, map(_reduced, (*sums, *maxima)))}
                {_lines(16, (f"totals[part, {i}] += {s.name}" for i, s in enumerate(sums)))}
                {_lines(16, (f"most[part, {i}] = {s.name}" for i, s in enumerate(maxima)))}
"""


def _stage(stage: RowStage, inputs: tuple[str, ...]) -> str:
    """A pass over the tokens of a row, which leaves the results of its reductions."""
    inputs = tuple(name for name in inputs if name != "coefficients")
    sums = [symbol for symbol in stage.reductions if symbol.operation == "row_sum"]
    maxima = [symbol for symbol in stage.reductions if symbol.operation == "row_max"]
    return f"""
            {_lines(12, (f"total_{s.name} = 0.0" for s in sums))}
            {_lines(12, (f"most_{s.name} = lowest" for s in maxima))}
            for start in range(begin, end, {BLOCK}):
                stop = min(start + {BLOCK}, end)
                {_lines(16, (f"block_{name} = all_{name}[start:stop]" for name in inputs))}
                {_lines(16, (f"{s.name} = zero" for s in sums))}
                {_lines(16, (f"{s.name} = most_{s.name}" for s in maxima))}
                for i in range(stop - start):
                    {_lines(20, _loaded(inputs))}
                    {_lines(20, stage.per_token)}
                    {_lines(20, map(_reduced, (*sums, *maxima)))}
                {_lines(16, (f"total_{s.name} += {s.name}" for s in sums))}
                {_lines(16, (f"most_{s.name} = {s.name}" for s in maxima))}
            {_lines(12, (f"{s.name} = number(total_{s.name})" for s in sums))}
            {_lines(12, (f"{s.name} = unordered(most_{s.name})" for s in maxima))}
            {_lines(12, stage.after)}
"""


def _lines(indent: int, statements: Iterable[str]) -> str:
    return ("\n" + " " * indent).join(statements) or "pass"


def _loaded(inputs: tuple[str, ...]) -> Iterable[str]:
    return (f"{name} = block_{name}[i]" + (" != 0" if name == "mask" else "") for name in inputs)


def _reduced(symbol: Symbol) -> str:
    """One token more in a sum or maximum."""
    x, name = symbol.arguments[0].name, symbol.name
    return f"{name} = add({name}, {x})" if symbol.operation.endswith("sum") else f"{name} = largest({name}, ordered({x}))"


@lru_cache(maxsize=MOST_PROGRAMS)
def _compile(
    source: str, inputs: tuple[str, ...], constants: tuple[tuple[str, float], ...], dtype: np.dtype[Any]
) -> Callable[..., None]:
    namespace: dict[str, Any] = {
        **functions(dtype)._asdict(),
        **{name: dtype.type(value) for name, value in constants},
        "zero": dtype.type(0),
        "one": dtype.type(1),
        "infinity": dtype.type(np.inf),
        "dtype": dtype,
        "number": dtype.type,
        "lowest": _integer(dtype).type(_lowest(dtype)),
        "empty": np.empty,
        "sqrt": np.sqrt,
        "tanh": np.tanh,
        "wide_vectors": wide_vectors,
    }
    exec(source, namespace)  # noqa: S102
    number, index = numba.from_dtype(dtype), numba.types.intp
    readable, flags = (numba.types.Array(kind, 1, "C", readonly=True) for kind in (number, numba.types.uint8))
    totals, most = (numba.types.Array(numba.from_dtype(kind), 2, "C") for kind in (np.dtype(np.float64), _integer(dtype)))
    arrays = [*(flags if name == "mask" else readable for name in inputs), readable]
    # NaN, inf and division by zero as in NumPy, and no other freedom: the formulas are accurate as they are written
    counts = (index,) * 5
    compiled = numba.njit((*arrays, number[::1], *counts, totals, most), nogil=True, error_model="numpy")
    loop: Callable[..., None] = compiled(namespace["loop"])
    return loop


def _integer(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The integers of a float's width, in which maxima are taken."""
    return np.dtype(f"i{dtype.itemsize}")


def _lowest(dtype: np.dtype[Any]) -> int:
    """−inf among those integers."""
    return int(_flipped(np.asarray(-np.inf, dtype).view(_integer(dtype))))


def _flipped(bits: NDArray[Any]) -> NDArray[Any]:
    """From the bits of floats to integers in the order of the floats, or back."""
    return np.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
