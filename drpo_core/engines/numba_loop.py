"""Any objective's loss, final gradient and diagnostics as one compiled loop over NumPy arrays (extra `compiled`: numba).

The pass over the tokens, the objective's own methods included, is run once on symbols (`drpo_core.engines.trace`). What it
did is compiled, so that every token is read once and nothing but the gradient is written. Thresholds are arguments of the
loop. Sums are taken in float64 over blocks of fixed size, so the result is the same for any number of threads.
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
from drpo_core.engines.trace import BOOL, FLOAT, Symbol, Trace, UntraceableError, floats_of, parametrised, statics_of
from drpo_core.objectives import is_known
from drpo_core.objectives.protocol import inside_of, loss_of, ratio_weight_of, weight_of
from drpo_core.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from drpo_core._arrays import Spread
    from drpo_core.diagnostics import Diagnostics
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

ARRAYS = ("log_prob", "behavior_log_prob", "advantages", "mask", "coefficients", "divergence")


def run(
    policy_pass: Pass,
    objective: Objective,
    arrays: tuple[NDArray[Any] | None, ...],
    gradient: NDArray[Any],
    *,
    diagnostics: bool,
    threads: int | None = None,
    spread: Spread = in_threads,
) -> tuple[np.floating[Any], Diagnostics | None]:
    """Σ m c L and diagnostics of flat, C-contiguous arrays of the gradient's dtype; m c ∂L/∂log π goes to `gradient`.

    `arrays` are `ARRAYS`: the mask is boolean, the coefficients are one, one a row of tokens or one a token, and the
    divergence may be None. Raises `UntraceableError` if the objective does something that can't be compiled.
    """
    *per_token, divergence = arrays
    _check_sizes(per_token, divergence, gradient.size)
    program = program_of(policy_pass, objective, gradient.dtype, diagnostics=diagnostics, measured=divergence is not None)
    log_prob, behavior_log_prob, advantages, mask, coefficients = per_token
    flags = mask.view(np.uint8)  # type: ignore[union-attr]
    measured = log_prob if divergence is None else divergence
    given = (log_prob, behavior_log_prob, advantages, flags, coefficients, measured)
    return program.run(given, gradient, tuple(floats_of(objective)), threads or _cpus(), spread)


def _check_sizes(per_token: list[Any], divergence: NDArray[Any] | None, size: int) -> None:
    """Raise `ValueError` where the loop would read beyond an array."""
    *tokens, coefficients = per_token
    sizes = [array.size for array in (*tokens, *([] if divergence is None else [divergence]))]
    fits = size == 0 or (coefficients.size > 0 and size % coefficients.size == 0)
    if any(one != size for one in sizes) or not fits:
        msg = f"expected arrays of {size} tokens and coefficients of a divisor of that, got {sizes} and {coefficients.size}"
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
        statements, uniforms = trace.statements(), trace.uniforms()
        sums, maxima = trace.reductions("sum"), trace.reductions("max")
        source = _source(statements.per_token, uniforms, result.gradient, sums, maxima)
        self._loop = _compile(source, tuple(trace.constants.items()), dtype)
        self._trace, self._before = trace, statements.uniform
        self._after = compile("\n".join(statements.reduced), "<trace>", "exec")
        self._uniforms = [symbol.name for symbol in uniforms]
        self._sums, self._maxima = [symbol.name for symbol in sums], [symbol.name for symbol in maxima]
        self._loss, self._dtype = result.loss.name, dtype
        self._statistics = None if result.diagnostics is None else map_diagnostics(lambda s: s.name, result.diagnostics)
        self._lowest = int(_flipped(np.asarray(-np.inf, dtype).view(_integer(dtype))))
        # a training run has one threshold, or a new one at each step
        self._known = lru_cache(maxsize=4)(self._prepare)

    def run(
        self,
        arrays: tuple[NDArray[Any] | None, ...],
        gradient: NDArray[Any],
        thresholds: tuple[float, ...],
        threads: int,
        spread: Spread,
    ) -> tuple[np.floating[Any], Diagnostics | None]:
        """See the module's `run`."""
        n, dtype = gradient.size, self._dtype
        row = max(1, n // max(1, arrays[4].size))  # type: ignore[union-attr]
        blocks = -(-n // BLOCK)
        segment = BLOCK * max(1, -(-blocks // SEGMENTS))
        segments = -(-n // segment)
        totals = np.zeros((segments, len(self._sums)))
        most = np.full((segments, len(self._maxima)), self._lowest, _integer(dtype))
        known, uniforms = self._known(thresholds)

        def run(first: int, last: int) -> None:
            self._loop(*arrays, uniforms, gradient, row, segment, first, last, totals, most)

        spread(run, segments, min(threads, max(1, n // TOKENS_PER_THREAD)))
        values = known | dict(zip(self._sums, totals.sum(axis=0).tolist(), strict=True))
        if self._maxima:
            largest = _flipped(np.max(most, axis=0, initial=self._lowest)).view(dtype)
            values |= dict(zip(self._maxima, largest.tolist(), strict=True))
        exec(self._after, values)  # noqa: S102
        number = dtype.type
        loss, statistics = number(values[self._loss]), self._statistics
        return loss, None if statistics is None else map_diagnostics(lambda name: number(values[name]), statistics)

    def _prepare(self, thresholds: tuple[float, ...]) -> tuple[dict[str, Any], NDArray[Any]]:
        """All values that are known before the tokens, and those that the loop needs."""
        known = self._trace.on_host(self._before, {f"p{i}": value for i, value in enumerate(thresholds)})
        return known, np.array([known[name] for name in self._uniforms], self._dtype)


_programs: dict[tuple[Any, ...], Program] = {}
_programs_lock = Lock()


def program_of(policy_pass: Pass, objective: Objective, dtype: np.dtype[Any], *, diagnostics: bool, measured: bool) -> Program:
    """The objective's program: one that was made before, if the objective is known to be the same but for its thresholds."""
    key = (*_identity(objective, measured=measured), dtype, diagnostics, measured)
    program = _programs.get(key)
    if program is None:
        program = _made(policy_pass, objective, dtype, diagnostics=diagnostics, measured=measured)
        with _programs_lock:
            while len(_programs) >= MOST_PROGRAMS:
                # the oldest: objectives whose methods need the values of their numbers have a program for each value
                del _programs[next(iter(_programs))]
            _programs[key] = program
    return program


def _identity(objective: Objective, *, measured: bool) -> tuple[Any, ...]:
    """What tells an objective from all others, apart from its thresholds.

    The library's are known by their class and what is not a threshold. Of any other, the methods are run on symbols at
    every call, because nothing else tells what they do now: they may read attributes and globals that have changed.
    """
    kind = type(objective)
    if is_known(objective):
        return (
            kind,
            *(getattr(kind, name, None) for name in ("loss", "weight", "ratio_weight", "inside")),
            statics_of(objective),
        )

    def recorded(trace: Trace, traced: Objective) -> tuple[Any, ...]:
        numbers = {name: trace.input(name) for name in Tokens._fields if name not in ("divergence", "xp")}
        tokens = Tokens(**numbers, divergence=trace.input("divergence") if measured else None, xp=trace.namespace)
        results = [function(traced, tokens) for function in (loss_of, weight_of, ratio_weight_of, inside_of)]
        return (*(None if result is None else result.name for result in results), *trace.signature())

    try:
        return _with_or_without_thresholds(recorded, objective, np.dtype(np.float64))
    except (AttributeError, TypeError, ValueError) as error:
        # what does not work on symbols may on arrays; if not, array operations say so
        msg = f"an objective that raises {error!r}"
        raise UntraceableError(msg) from error


def _made(policy_pass: Pass, objective: Objective, dtype: np.dtype[Any], *, diagnostics: bool, measured: bool) -> Program:
    def recorded(trace: Trace, traced: Objective) -> Program:
        inputs = [trace.input(name, BOOL if name == "mask" else FLOAT) for name in ARRAYS]
        if not measured:
            inputs[-1] = None  # type: ignore[call-overload]
        options: dict[str, Any] = {"dtype": FLOAT, "diagnostics": diagnostics, "select": False, "xp": trace.namespace}
        return Program(trace, policy_pass(traced, *inputs, **options), dtype)

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


def _source(per_token: list[str], uniforms: list[Symbol], gradient: Symbol, sums: list[Symbol], maxima: list[Symbol]) -> str:
    def lines(indent: int, statements: Iterable[str]) -> str:
        return ("\n" + " " * indent).join(statements) or "pass"

    return f"""
def loop({", ".join(f"all_{name}" for name in ARRAYS)}, uniforms, all_gradient, row, segment, first, last, totals, most):
    wide_vectors()
    {lines(4, (f"{s.name} = uniforms[{i}]" + (" != zero" if s.kind == BOOL else "") for i, s in enumerate(uniforms)))}
    buffer = empty({BLOCK}, dtype)
    for part in range(first, last):
        end = min((part + 1) * segment, all_gradient.size)
        for start in range(part * segment, end, {BLOCK}):
            stop = min(start + {BLOCK}, end)
            # one coefficient a token, in the cache: a loop that looked its row up would not vectorise
            filled = start
            while filled < stop:
                k = filled // row
                until = min((k + 1) * row, stop)
                buffer[filled - start : until - start] = all_coefficients[k]
                filled = until
            # slices, because indices with an offset would not vectorise either
            {lines(12, (f"block_{name} = all_{name}[start:stop]" for name in (*ARRAYS, "gradient")))}
            block_coefficients = buffer[: stop - start]
            {lines(12, (f"{s.name} = zero" for s in sums))}
            {lines(12, (f"{s.name} = most[part, {i}]" for i, s in enumerate(maxima)))}
            for i in range(stop - start):
                {lines(16, (f"{name} = block_{name}[i]" + (" != 0" if name == "mask" else "") for name in ARRAYS))}
                {lines(16, per_token)}
                block_gradient[i] = {gradient.name}
                {lines(16, (f"{s.name} = add({s.name}, {s.arguments[0].name})" for s in sums))}
                {lines(16, (f"{s.name} = largest({s.name}, ordered({s.arguments[0].name}))" for s in maxima))}
            {lines(12, (f"totals[part, {i}] += {s.name}" for i, s in enumerate(sums)))}
            {lines(12, (f"most[part, {i}] = {s.name}" for i, s in enumerate(maxima)))}
"""


@lru_cache(maxsize=MOST_PROGRAMS)
def _compile(source: str, constants: tuple[tuple[str, float], ...], dtype: np.dtype[Any]) -> Callable[..., None]:
    namespace: dict[str, Any] = {
        **functions(dtype)._asdict(),
        **{name: dtype.type(value) for name, value in constants},
        "zero": dtype.type(0),
        "one": dtype.type(1),
        "infinity": dtype.type(np.inf),
        "dtype": dtype,
        "empty": np.empty,
        "sqrt": np.sqrt,
        "tanh": np.tanh,
        "wide_vectors": wide_vectors,
    }
    exec(source, namespace)  # noqa: S102
    number, index = numba.from_dtype(dtype), numba.types.intp
    readable, flags = (numba.types.Array(kind, 1, "C", readonly=True) for kind in (number, numba.types.uint8))
    totals, most = (numba.types.Array(numba.from_dtype(kind), 2, "C") for kind in (np.dtype(np.float64), _integer(dtype)))
    arrays = [*(flags if name == "mask" else readable for name in ARRAYS), readable]
    # NaN, inf and division by zero as in NumPy, and no other freedom: the formulas are accurate as they are written
    compiled = numba.njit((*arrays, number[::1], index, index, index, index, totals, most), nogil=True, error_model="numpy")
    loop: Callable[..., None] = compiled(namespace["loop"])
    return loop


def _integer(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The integers of a float's width, in which maxima are taken."""
    return np.dtype(f"i{dtype.itemsize}")


def _flipped(bits: NDArray[Any]) -> NDArray[Any]:
    """From the bits of floats to integers in the order of the floats, or back."""
    return np.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
