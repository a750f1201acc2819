"""Any objective's loss, final gradient and diagnostics as one compiled loop over NumPy arrays (extra `jit`: numba).

`policy_loss_of`, the objective's own methods included, is run once on symbols (`drpo_core.trace`); what it did is
compiled, so that every token is read once and nothing but the gradient is written. Sums are taken in float64 over blocks
of fixed size, so that the result is the same for any number of threads.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numba
import numpy as np

from drpo_core.elementary import functions, wide_vectors
from drpo_core.policy_loss import policy_loss_of
from drpo_core.threads import in_threads
from drpo_core.trace import BOOL, FLOAT, Symbol, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import DTypeLike, NDArray

    from drpo_core.diagnostics import Diagnostics
    from drpo_core.objectives import Objective
    from drpo_core.types import Spread

__all__ = ["Kernel", "fused"]

BLOCK = 4096
"""Tokens summed in the dtype of the arithmetic, before float64 takes over."""

SEGMENTS = 64
"""Parts of the tokens whose sums are kept apart; what a thread is given is some of them."""

TOKENS_PER_THREAD = 1 << 16
"""Below so many, starting a thread takes longer than it saves."""

ARRAYS = ("log_prob", "behavior_log_prob", "advantages", "mask", "coefficients", "divergence")


class Kernel(Protocol):
    """A compiled objective, over flat C-contiguous NumPy arrays of its dtype.

    `coefficients` may have one element, one per row of tokens, or one per token. `gradient` is overwritten with
    m c ∂L/∂log π. `threads` defaults to the CPUs this process may use, and fewer for few tokens; `spread` is that of
    `drpo_core.policy_loss_and_gradient`.
    """

    def __call__(
        self,
        log_prob: NDArray[Any],
        behavior_log_prob: NDArray[Any],
        advantages: NDArray[Any],
        mask: NDArray[np.bool_],
        coefficients: NDArray[Any],
        *,
        divergence: NDArray[Any] | None = None,
        gradient: NDArray[Any],
        threads: int | None = None,
        spread: Spread | None = None,
    ) -> tuple[np.floating[Any], Diagnostics | None]:
        """Σ m c L, 0-d, and diagnostics."""
        ...


def fused(objective: Objective, *, dtype: DTypeLike, diagnostics: bool = True) -> Kernel:
    """One compiled pass over the tokens: the loss, the final gradient and the diagnostics of an objective.

    Compiled at the first call, in a second or a few, and kept for objectives that are equal.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``; hashable.
    dtype
        float32 or float64, of all arrays but the mask.
    diagnostics
        Whether the same pass computes them.

    Returns
    -------
    Kernel
        To call with flat arrays.

    Raises
    ------
    UntraceableError
        When called, if the objective does something that can't be compiled.
    ValueError
        When called, if the arrays' sizes don't fit or `threads` is less than 1.

    See Also
    --------
    drpo_core.policy_loss_and_gradient : with ``engine="jit"``, the same for arrays of any shape, checked.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import DRPO
    >>> from drpo_core.jit import fused
    >>> kernel = fused(DRPO(delta=0.5), dtype=np.float64, diagnostics=False)
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> advantages, mask, gradient = np.array([1.0, 1.0, -1.0]), np.ones(3, dtype=bool), np.empty(3)
    >>> loss, _ = kernel(log_prob, behavior, advantages, mask, np.array(0.5), gradient=gradient)
    >>> loss.round(6), gradient.round(6)
    (np.float64(-1.05), array([-0.5, -0.5,  0.1]))
    """
    dtype = np.dtype(dtype)

    def kernel(
        log_prob: NDArray[Any],
        behavior_log_prob: NDArray[Any],
        advantages: NDArray[Any],
        mask: NDArray[np.bool_],
        coefficients: NDArray[Any],
        *,
        divergence: NDArray[Any] | None = None,
        gradient: NDArray[Any],
        threads: int | None = None,
        spread: Spread | None = None,
    ) -> tuple[np.floating[Any], Diagnostics | None]:
        program = _compiled(objective, dtype, diagnostics=diagnostics, measured=divergence is not None)  # type: ignore[arg-type]
        measured = log_prob if divergence is None else divergence
        arrays = (log_prob, behavior_log_prob, advantages, mask.view(np.uint8), coefficients.reshape(-1), measured)
        return program(arrays, gradient, threads, spread or in_threads)

    return kernel


@lru_cache(maxsize=64)
def _compiled(
    objective: Objective,
    dtype: np.dtype[Any],
    *,
    diagnostics: bool,
    measured: bool,
) -> Callable[..., tuple[np.floating[Any], Diagnostics | None]]:
    """The objective's loop, and what prepares it and finishes its sums."""
    trace = Trace(float(np.finfo(dtype).eps))
    inputs = [trace.input(name, BOOL if name == "mask" else FLOAT) for name in ARRAYS]
    if not measured:
        inputs[-1] = None  # type: ignore[call-overload]
    result = policy_loss_of(objective, *inputs, dtype=FLOAT, diagnostics=diagnostics, select=False, xp=trace.namespace)
    sums, maxima = trace.reductions("sum"), trace.reductions("max")
    loop = _compile_loop(trace, result.gradient, sums, maxima, dtype)
    finish = _finisher(trace, sums, maxima)
    lowest = int(_flipped(np.asarray(-np.inf, dtype).view(_integer(dtype))))

    def program(
        arrays: tuple[NDArray[Any], ...], gradient: NDArray[Any], threads: int | None, spread: Spread
    ) -> tuple[np.floating[Any], Diagnostics | None]:
        if threads is not None and threads < 1:
            msg = f"threads: expected 1 or more, got {threads!r}"
            raise ValueError(msg)
        n, count = gradient.size, max(arrays[4].size, 1)
        sizes = [array.size for array, name in zip(arrays, ARRAYS, strict=True) if name != "coefficients"]
        if set(sizes) != {n} or n % count:
            msg = f"gradient: expected arrays of one size, a multiple of that of coefficients, got {[n, *sizes]} and {count}"
            raise ValueError(msg)
        blocks = -(-n // BLOCK)
        segment = BLOCK * max(1, -(-blocks // SEGMENTS))
        segments = -(-n // segment)
        totals, most = np.zeros((segments, len(sums))), np.full((segments, len(maxima)), lowest, _integer(dtype))
        row = max(1, n // count)

        def run(first: int, last: int) -> None:
            loop(*arrays, gradient, row, segment, first, last, totals, most)

        spread(run, segments, min(threads or _cpus(), max(1, n // TOKENS_PER_THREAD)))
        largest = _flipped(np.max(most, axis=0, initial=lowest)).view(dtype) if maxima else ()
        values = finish([*totals.sum(axis=0), *largest])

        def value(symbol: Symbol) -> np.floating[Any]:
            return dtype.type(values[symbol.name])  # type: ignore[no-any-return]

        statistics = result.diagnostics
        if statistics is not None:
            statistics = {name: type(s)(*map(value, s)) for name, s in statistics.items()}
        return value(result.loss), statistics

    return program


def _compile_loop(
    trace: Trace, gradient: Symbol, sums: list[Symbol], maxima: list[Symbol], dtype: np.dtype[Any]
) -> Callable[..., None]:
    def lines(indent: int, statements: Iterable[str]) -> str:
        return ("\n" + " " * indent).join(statements) or "pass"

    source = f"""
def loop({", ".join(f"all_{name}" for name in ARRAYS)}, all_gradient, row, segment, first, last, totals, most):
    wide_vectors()
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
                {lines(16, trace.statements().per_token)}
                block_gradient[i] = {gradient.name}
                {lines(16, (f"{s.name} = add({s.name}, {s.arguments[0].name})" for s in sums))}
                {lines(16, (f"{s.name} = largest({s.name}, ordered({s.arguments[0].name}))" for s in maxima))}
            {lines(12, (f"totals[part, {i}] += {s.name}" for i, s in enumerate(sums)))}
            {lines(12, (f"most[part, {i}] = {s.name}" for i, s in enumerate(maxima)))}
"""
    constants = {name: dtype.type(value) for name, value in trace.constants.items()}
    constants |= {"zero": dtype.type(0), "one": dtype.type(1), "infinity": dtype.type(np.inf)}
    namespace: dict[str, Any] = {
        **functions(dtype)._asdict(),
        **constants,
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
    arrays = [flags if name == "mask" else readable for name in ARRAYS]
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


def _finisher(trace: Trace, sums: list[Symbol], maxima: list[Symbol]) -> Callable[[list[float]], dict[str, Any]]:
    """What is left to do with the sums and maxima, as a function of them to all values by name."""
    names = [symbol.name for symbol in (*sums, *maxima)]
    code = compile("\n".join(trace.statements().reduced), "<trace>", "exec")

    def finish(values: list[float]) -> dict[str, Any]:
        namespace: dict[str, Any] = trace.constants | dict(zip(names, values, strict=True))
        exec(code, namespace)  # noqa: S102
        return namespace

    return finish


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
