"""Any objective's loss, final gradient and diagnostics as one compiled loop over NumPy arrays (extra `compiled`: numba).

The pass over the tokens, the objective's own methods included, is run once on symbols (`drpo_core.engines.trace`). What it
did is compiled, so that every token is read once and nothing but the gradient is written. Thresholds are arguments of the
loop. Sums are taken in float64 over blocks of fixed size, so the result is the same for any number of threads. Where a
token's result depends on its whole row, as with the ratio of a sequence, the loop passes over each row as often as it must.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from drpo_core.diagnostics import map_diagnostics
from drpo_core.engines.elementary import functions, negated, wide_vectors
from drpo_core.engines.ordering import flipped, integer, lowest
from drpo_core.engines.recording import ARRAYS, MOST_PROGRAMS, program_of
from drpo_core.engines.threads import in_threads
from drpo_core.engines.trace import BOOL, UntraceableError, floats_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from drpo_core._arrays import Spread
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.engines.recording import Pass
    from drpo_core.engines.trace import RowStage, Statements, Symbol, Trace
    from drpo_core.objectives import Objective

__all__ = ["compilations", "run"]

BLOCK = 4096
"""Tokens summed in the dtype of the arithmetic, before float64 takes over."""

SEGMENTS = 64
"""Parts of the tokens whose sums are kept apart; what a thread is given is some of them."""

TOKENS_PER_THREAD = 1 << 16
"""Below so many, starting a thread takes longer than it saves."""


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
    program = program_of(Program, policy_pass, objective, gradient.dtype, diagnostics=diagnostics, names=names)
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
        self._lowest = lowest(dtype)
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
        most = np.full((parts, len(self._maxima)), self._lowest, integer(dtype))
        # by their bits: 0 and −0 are equal, and NaN is not
        known, uniforms = self._known(np.array(thresholds, np.float64).tobytes())
        flat = [array.view(np.uint8) if array.dtype == np.bool_ else array for array in map(arrays.__getitem__, self._inputs)]  # type: ignore[union-attr]

        def run(first: int, last: int) -> None:
            self._loop(*flat, uniforms, gradient, share, width, rows, first, last, totals, most)

        spread(run, parts, min(threads, max(1, n // TOKENS_PER_THREAD)))
        values = known | dict(zip(self._sums, totals.sum(axis=0), strict=True))
        if self._maxima:
            largest = flipped(np.max(most, axis=0, initial=self._lowest)).view(dtype)
            values |= dict(zip(self._maxima, largest, strict=True))
        with np.errstate(all="ignore"):
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

    def _prepare(self, thresholds: bytes) -> tuple[dict[str, Any], NDArray[Any]]:
        """All values that are known before the tokens, and those that the loop needs."""
        known = self._trace.on_host(self._before, {f"p{i}": value for i, value in enumerate(np.frombuffer(thresholds))})
        return known, np.array([known[name] for name in self._uniforms], self._dtype)


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
        "lowest": integer(dtype).type(lowest(dtype)),
        "empty": np.empty,
        "sqrt": np.sqrt,
        "tanh": np.tanh,
        "negated": negated,
        "wide_vectors": wide_vectors,
    }
    exec(source, namespace)  # noqa: S102
    number, index = numba.from_dtype(dtype), numba.types.intp
    readable, flags = (numba.types.Array(kind, 1, "C", readonly=True) for kind in (number, numba.types.uint8))
    totals, most = (numba.types.Array(numba.from_dtype(kind), 2, "C") for kind in (np.dtype(np.float64), integer(dtype)))
    arrays = [*(flags if name == "mask" else readable for name in inputs), readable]
    # NaN, inf and division by zero as in NumPy, and no other freedom: the formulas are accurate as they are written
    counts = (index,) * 5
    compiled = numba.njit((*arrays, number[::1], *counts, totals, most), nogil=True, error_model="numpy")
    loop: Callable[..., None] = compiled(namespace["loop"])
    return loop


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
