"""exp, expm1, log and log1p for numba, as straight-line code that LLVM can vectorise: numba calls libm one by one.

Error against the exact value, in units of the last place, float32 and float64 alike, on hardware with fused
multiply-add: exp 1, expm1 1.5, log 1, log1p 1.5 (`tests/core/engines/test_elementary.py`). NaN and infinite arguments
are those of IEEE arithmetic. exp has no subnormal results, 0 instead, and overflows at 2¹²⁷ or 2¹⁰²³: every test less is
a tenth of a loop. Series are plain Taylor: their coefficients need no table.
"""

from __future__ import annotations

from functools import cache
from math import factorial
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Functions", "functions", "wide_vectors"]


class Functions(NamedTuple):
    """Compiled scalar functions of one dtype, to be inlined into loops.

    `decay` is exp for arguments that are not positive. `add` and `largest` are the steps of a sum and a maximum that LLVM
    may spread over the lanes of a vector. `largest` works on integers in the order of the floats, as `ordered` makes them and
    `unordered` takes them, in which NaN is the largest of all.
    """

    exp: Callable[..., Any]
    decay: Callable[..., Any]
    expm1: Callable[..., Any]
    log: Callable[..., Any]
    log1p: Callable[..., Any]
    add: Callable[..., Any]
    largest: Callable[..., Any]
    ordered: Callable[..., Any]
    unordered: Callable[..., Any]
    select: Callable[..., Any]


class _Format(NamedTuple):
    """What the algorithms need to know of a binary floating-point format."""

    width: int
    fraction: int  # stored bits of the significand
    ln2_high: float  # so few bits that its product with an exponent is exact
    ln2_low: float
    largest_log: float  # exp is inf above it, half of the largest number
    smallest_log: float  # exp is 0 below it, half of the smallest normal number
    exp_terms: int
    log_terms: int


_FORMATS = {
    np.dtype(np.float32): _Format(32, 23, 0.693359375, -2.12194440054690583e-4, 88.02, -87.68, 7, 6),
    np.dtype(np.float64): _Format(64, 52, 0.693147180369123816490, 1.90821492927058770002e-10, 709.08, -708.74, 13, 12),
}


@cache
def functions(dtype: np.dtype[Any]) -> Functions:
    """The functions for float32 or float64."""
    form, number = _FORMATS[dtype], dtype.type
    zero, half, one, two, inf, nan = (number(x) for x in (0.0, 0.5, 1.0, 2.0, np.inf, np.nan))
    # adding it rounds to an integer, which then sits in the low bits
    magic = number(1.5 * 2.0**form.fraction)
    log2_e, ln2_high, ln2_low = number(1.0 / np.log(2.0)), number(form.ln2_high), number(form.ln2_low)
    top, bottom = number(form.largest_log), number(form.smallest_log)
    smallest_normal, scale, log2_scale = np.finfo(dtype).tiny, number(2.0 ** (form.fraction + 1)), number(form.fraction + 1)
    exp_series = _horner([1.0 / factorial(n) for n in range(2, form.exp_terms + 1)], number)
    log_series = _horner([2.0 / (2 * n + 1) for n in range(1, form.log_terms)], number)
    power_of_two, exponent, significand, ordered_bits, unordered = _bit_operations(form)
    jit = numba.njit(error_model="numpy", fastmath={"contract"})

    @jit
    def reduced(x: Any) -> Any:
        """2ⁿ and expm1(x − n ln 2), with n as near as it gets; arbitrary where 2ⁿ is not a normal number."""
        shifted = x * log2_e + magic
        n = shifted - magic
        r = (x - n * ln2_high) - n * ln2_low
        return power_of_two(shifted), r + r * r * exp_series(r)

    @jit
    def decay(x: Any) -> Any:
        power, p = reduced(x)
        return select(x < bottom, zero, p * power + power)

    @jit
    def exp(x: Any) -> Any:
        return select(x > top, inf, decay(x))

    @jit
    def expm1(x: Any) -> Any:
        power, p = reduced(x)
        return select(x > top, inf, select(x < bottom, -one, p * power + (power - one)))

    @jit
    def log(x: Any) -> Any:
        subnormal = x < smallest_normal
        scaled = select(subnormal, x * scale, x)
        n = exponent(scaled) - select(subnormal, log2_scale, zero)
        f = significand(scaled) - one
        s = f / (two + f)
        z, square = s * s, half * f * f
        y = n * ln2_high - ((square - (s * (square + z * log_series(z)) + n * ln2_low)) - f)
        y = select(x == zero, -inf, select(x < zero, nan, y))
        return select(x < inf, y, x)

    @jit
    def log1p(x: Any) -> Any:
        u = one + x
        # what rounding took away from 1 + x
        lost = x - (u - one)
        return log(u) + select((u > zero) & (u < inf), lost / u, zero)

    @numba.njit(fastmath={"reassoc", "nsz"})
    def add(total: Any, x: Any) -> Any:
        return total + x

    @numba.njit
    def largest(most: Any, x: Any) -> Any:
        return select(x > most, x, most)

    @numba.njit
    def ordered(x: Any) -> Any:
        # the NaN of an invalid operation is negative
        return ordered_bits(select(x == x, x, nan))

    return Functions(exp, decay, expm1, log, log1p, add, largest, ordered, unordered, select)


def _horner(coefficients: list[float], number: type[np.floating[Any]]) -> Callable[..., Any]:
    """Σ cₙ xⁿ as straight-line code."""
    constants = {f"c{n}": number(c) for n, c in enumerate(coefficients)}
    body = f"c{len(coefficients) - 1}"
    for n in reversed(range(len(coefficients) - 1)):
        body = f"({body} * x + c{n})"
    namespace: dict[str, Any] = dict(constants)
    exec(f"def polynomial(x):\n    return {body}\n", namespace)  # noqa: S102
    compiled: Callable[..., Any] = numba.njit(fastmath={"contract"})(namespace["polynomial"])
    return compiled


def _select(typing: Any, condition: Any, x: Any, y: Any) -> Any:  # noqa: ARG001
    """X where the condition holds, else y, both evaluated: a branch would have to be found to be none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.select(*arguments)

    return x(numba.types.boolean, x, x), generate


select: Any = intrinsic(_select)

negated: Any = numba.njit(lambda condition: not condition)


def _wide_vectors(typing: Any) -> Any:  # noqa: ARG001
    """Let LLVM vectorise the calling function with 512 bits where the processor has them: it takes 256 by default."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        # llvmlite's own `add` knows no attributes with a value
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return numba.types.void(), generate


wide_vectors: Any = intrinsic(_wide_vectors)


def _bit_operations(form: _Format) -> tuple[Callable[..., Any], ...]:
    """Functions on the bit patterns of floats."""
    integer, floating = ir.IntType(form.width), ir.FloatType() if form.width == 32 else ir.DoubleType()
    of_float = numba.types.float32 if form.width == 32 else numba.types.float64
    of_int = numba.types.int32 if form.width == 32 else numba.types.int64
    bias = (1 << (form.width - form.fraction - 2)) - 1
    # of √½, so that significands lie around 1
    lowest = int(np.array(np.sqrt(0.5), f"f{form.width // 8}").view(f"i{form.width // 8}"))

    def operation(source: Any, result: Any, emit: Callable[..., Any]) -> Callable[..., Any]:
        def typed(typing: Any, x: Any) -> Any:  # noqa: ARG001
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
                return emit(builder, arguments[0])

            return result(source), generate

        compiled: Callable[..., Any] = intrinsic(typed)
        return compiled

    def number(n: int) -> Any:
        return ir.Constant(integer, n)

    def power_of_two(builder: Any, x: Any) -> Any:
        shifted = builder.shl(builder.bitcast(x, integer), number(form.fraction))
        return builder.bitcast(builder.add(shifted, number(bias << form.fraction)), floating)

    def exponent_bits(builder: Any, x: Any) -> Any:
        return builder.ashr(builder.sub(builder.bitcast(x, integer), number(lowest)), number(form.fraction))

    def exponent(builder: Any, x: Any) -> Any:
        return builder.sitofp(exponent_bits(builder, x), floating)

    def significand(builder: Any, x: Any) -> Any:
        shifted = builder.shl(exponent_bits(builder, x), number(form.fraction))
        return builder.bitcast(builder.sub(builder.bitcast(x, integer), shifted), floating)

    def ordered(builder: Any, x: Any) -> Any:
        """Negative floats, whose bits count down, made to count up."""
        bits = builder.bitcast(x, integer)
        sign = builder.ashr(bits, number(form.width - 1))
        return builder.xor(bits, builder.lshr(sign, number(1)))

    return (
        operation(of_float, of_float, power_of_two),
        operation(of_float, of_float, exponent),
        operation(of_float, of_float, significand),
        operation(of_float, of_int, ordered),
        # the same again undoes it
        operation(of_int, of_float, lambda b, x: b.bitcast(ordered(b, b.bitcast(x, floating)), floating)),
    )
