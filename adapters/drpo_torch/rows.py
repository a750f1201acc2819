"""The engine ``"jit"`` at vocabulary scale: softmax statistics, gradients and divergences of rows, as numba loops.

A row is taken through a buffer of a few thousand numbers, in which the arithmetic is done: a vectorised loop reads and
writes it without asking whether the gradient lies in the logits' place, and bfloat16 becomes float32 on the way. Sums
over a buffer are in the dtype of the arithmetic, sums of these in float64.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np
import torch

from drpo_core.engines.elementary import functions, wide_vectors
from drpo_torch.divergence import LARGEST_LOG_RATIO
from drpo_torch.softmax import Normalizer, working_dtype
from drpo_torch.engines.threads import in_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["RowStatistics", "row_divergences", "row_gradients", "row_statistics"]

_BLOCK = 2048
# fewer logits than this are done before another thread has started
_LOGITS_PER_THREAD = 1 << 17


class RowStatistics(NamedTuple):
    """Per row of x = z/T, in the working dtype: max x, Σ e^(x − max x), and the entropy in nats."""

    maximum: torch.Tensor
    total: torch.Tensor
    entropy: torch.Tensor

    def normalizer(self) -> Normalizer:
        """The same as the eager engine has it."""
        return Normalizer(self.maximum, self.total.log(), self.entropy)


def row_statistics(logits: torch.Tensor, rows: torch.Tensor, temperature: float) -> RowStatistics:
    """Of the softmax of some rows of the logits (…, V)."""
    statistics = torch.empty((3, len(rows)), dtype=working_dtype(logits.dtype))
    kernel = _kernels(logits.dtype).statistics
    arguments = _Rows.of(logits, rows)
    out = statistics.numpy()
    _in_threads(lambda first, last: kernel(*arguments, temperature, first, last, out), len(rows), logits.shape[1])
    return RowStatistics(*statistics)


def row_gradients(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperature: float,
    *,
    statistics: RowStatistics,
    index: torch.Tensor,
    at_index: torch.Tensor,
    scale: torch.Tensor,
    slope: torch.Tensor | None = None,
    out: torch.Tensor,
) -> None:
    """∂/∂z of a function of softmaxes: (p (scale − slope (x − max x)) + at_index at the column `index`) / T.

    Of some rows of z, to the same rows of `out`, which may be z. Where scale, slope and at_index are 0 so is the result,
    whatever the row holds.
    """
    kernel = _kernels(logits.dtype).gradients
    arguments, places = _Rows.of(logits, rows), _Rows.of(out, rows)
    slope = torch.zeros_like(scale) if slope is None else slope
    coefficients = torch.stack((statistics.maximum, statistics.total, scale, slope, at_index)).numpy()
    columns = index.numpy()
    _in_threads(
        lambda first, last: kernel(*arguments, places.data, places.stride, temperature, first, last, coefficients, columns),
        len(rows),
        logits.shape[1],
    )


def row_divergences(
    logits: torch.Tensor, temperature: float, behavior_logits: torch.Tensor, behavior_temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Full TV and KL of each row (rows, V), and whether they hold: not where an inf, a NaN or a ratio above e^60 is."""
    kernel = _kernels(logits.dtype).divergences
    rows = torch.arange(len(logits))
    x, y = _Rows.of(logits, rows), _Rows.of(behavior_logits, rows)
    result = torch.empty((3, len(rows)), dtype=working_dtype(logits.dtype))
    out = result.numpy()
    _in_threads(
        lambda first, last: kernel(
            x.data, x.stride, temperature, y.data, y.stride, behavior_temperature, x.width, first, last, out
        ),
        len(rows),
        logits.shape[1],
    )
    return result[0], result[1], result[2] != 0.0


class _Rows(NamedTuple):
    """Rows of a matrix with contiguous rows, as numba takes them: its storage, the way from row to row, and which."""

    data: NDArray[Any]
    stride: int
    width: int
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, matrix: torch.Tensor, rows: torch.Tensor) -> _Rows:
        count, width = matrix.shape
        stride = matrix.stride(0)
        span = 0 if count == 0 else (count - 1) * stride + width
        flat = matrix.detach().as_strided((span,), (1,))
        if flat.dtype == torch.bfloat16:
            flat = flat.view(torch.uint16)
        return cls(flat.numpy(), stride, width, rows.numpy())


class _Kernels(NamedTuple):
    statistics: Callable[..., None]
    gradients: Callable[..., None]
    divergences: Callable[..., None]


class _Tools(NamedTuple):
    """What the loops are made of, for one dtype of the arithmetic and one of the logits."""

    dtype: np.dtype[Any]
    load: Callable[..., None]
    store: Callable[..., None]
    of_ordered: Callable[..., Any]
    largest_in: Callable[..., Any]


_jit = numba.njit(nogil=True, error_model="numpy")


@cache
def _kernels(stored: torch.dtype) -> _Kernels:
    """The loops for logits of this dtype."""
    dtype = np.dtype(str(working_dtype(stored)).removeprefix("torch."))
    integer = np.dtype(f"i{dtype.itemsize}").type
    lowest, every_bit = integer(np.iinfo(integer).min), integer(np.iinfo(integer).max)
    largest, ordered = functions(dtype).largest, functions(dtype).ordered

    @_jit
    def of_ordered(value: Any, scratch: Any) -> Any:
        """The number whose `ordered` this is."""
        scratch[0] = value if value >= 0 else value ^ every_bit
        return scratch.view(dtype)[0]

    @_jit
    def largest_in(x: Any, scratch: Any) -> Any:
        wide_vectors()
        most = lowest
        for i in range(x.size):
            most = largest(most, ordered(x[i]))
        return of_ordered(most, scratch)

    load, store = (_bfloat16 if stored == torch.bfloat16 else _as_they_are)(dtype.type)
    tools = _Tools(dtype, load, store, of_ordered, largest_in)
    return _Kernels(_statistics(tools), _gradients(tools), _divergences(tools))


def _least(dtype: np.dtype[Any]) -> Any:
    """Some x below which e^x is 0 or next to it, to multiply e^x with instead of x: −inf · 0 is a NaN."""
    return np.ceil(np.log(np.finfo(dtype).tiny))


def _statistics(tools: _Tools) -> Callable[..., None]:
    """Maximum, Σ e^(x − maximum) and entropy of rows, read once: what is summed is rescaled when the maximum moves."""
    dtype, load, largest_in = tools.dtype, tools.load, tools.largest_in
    decay, add, select = functions(dtype).decay, functions(dtype).add, functions(dtype).select
    number, integer, zero, least = dtype.type, np.dtype(f"i{dtype.itemsize}"), dtype.type(0), _least(dtype)
    block = _BLOCK

    @_jit
    def statistics(z: Any, stride: Any, width: Any, rows: Any, temperature: Any, first: Any, last: Any, out: Any) -> None:
        wide_vectors()
        buffer, scratch = np.empty(block, dtype), np.empty(1, integer)
        for r in range(first, last):
            row = z[rows[r] * stride : rows[r] * stride + width]
            maximum, total, weighted = -np.inf, 0.0, 0.0
            for start in range(0, width, block):
                part = row[start : start + block]
                x = buffer[: part.size]
                load(x, part, number(temperature))
                most = largest_in(x, scratch)
                if most == -np.inf:
                    continue
                if most > maximum:
                    if total > 0.0:
                        rescale = np.exp(maximum - most)
                        weighted = (weighted + total * (maximum - most)) * rescale
                        total *= rescale
                    maximum = float(most)
                m, part_total, part_weighted = number(maximum), zero, zero
                for i in range(x.size):
                    d = x[i] - m
                    e = decay(d)
                    part_total = add(part_total, e)
                    part_weighted = add(part_weighted, e * select(d < least, least, d))
                total += part_total
                weighted += part_weighted
            out[0, r] = maximum
            # of a row of −inf, 0/0
            out[1, r] = total if total != 0.0 else np.nan
            out[2, r] = np.log(total) - weighted / total

    return statistics


def _gradients(tools: _Tools) -> Callable[..., None]:
    """(p (scale − slope (x − max x)) + at_index at a column) / T, in the rows of another matrix or the same."""
    dtype, load, store = tools.dtype, tools.load, tools.store
    decay, select = functions(dtype).decay, functions(dtype).select
    number, least, block = dtype.type, _least(dtype), _BLOCK

    @_jit
    def gradients(
        z: Any,
        stride: Any,
        width: Any,
        rows: Any,
        out: Any,
        out_stride: Any,
        temperature: Any,
        first: Any,
        last: Any,
        coefficients: Any,
        columns: Any,
    ) -> None:
        wide_vectors()
        buffer = np.empty(block, dtype)
        for r in range(first, last):
            row = z[rows[r] * stride : rows[r] * stride + width]
            place = out[rows[r] * out_stride : rows[r] * out_stride + width]
            maximum, total, scale, slope, at_column = coefficients[:, r]
            if scale == 0.0 and slope == 0.0 and at_column == 0.0:
                place[:] = 0
                continue
            t = number(temperature)
            scale, slope, at_column = scale / total / t, slope / total / t, at_column / t
            for start in range(0, width, block):
                part = row[start : start + block]
                x = buffer[: part.size]
                load(x, part, number(temperature))
                for i in range(x.size):
                    d = x[i] - maximum
                    x[i] = decay(d) * (scale - slope * select(d < least, least, d))
                column = columns[r] - start
                if 0 <= column < x.size:
                    x[column] += at_column
                store(place[start : start + block], x)

    return gradients


def _divergences(tools: _Tools) -> Callable[..., None]:  # noqa: C901 -- the steps of one pass
    """Full TV and KL, as `drpo_torch.divergence.full_divergence_rows` has them, in two rows that stay in the cache."""
    dtype, load = tools.dtype, tools.load
    of_ordered, largest_in = tools.of_ordered, tools.largest_in
    decay, expm1, add, largest, ordered = (
        getattr(functions(dtype), name) for name in ("decay", "expm1", "add", "largest", "ordered")
    )
    number, integer, zero, block = dtype.type, np.dtype(f"i{dtype.itemsize}").type, dtype.type(0), _BLOCK
    lowest, largest_ratio = np.iinfo(integer).min, number(LARGEST_LOG_RATIO)

    @_jit
    def exponentiate(y: Any, x: Any, m: Any) -> Any:
        """From y and x to e^(y − m) and x − y, in place; Σ e^(y − m) and Σ e^(y − m) (x − y)."""
        wide_vectors()
        total, weighted = zero, zero
        for i in range(y.size):
            gap, e = x[i] - y[i], decay(y[i] - m)
            total = add(total, e)
            weighted = add(weighted, e * gap)
            y[i], x[i] = e, gap
        return total, weighted

    @_jit
    def compare(q: Any, d: Any, center: Any) -> Any:
        """From d to q (e^(d − center) − 1), in place; Σ q φ(d − center), and the largest d as an integer."""
        wide_vectors()
        total, most = zero, integer(lowest)
        for i in range(q.size):
            gap = d[i] - center
            most = largest(most, ordered(gap))
            e = expm1(gap)
            total = add(total, q[i] * (e - gap))
            d[i] = q[i] * e
        return total, most

    @_jit
    def distance(q: Any, d: Any, k: Any) -> Any:
        """Σ abs(d − q k)."""
        wide_vectors()
        total = zero
        for i in range(q.size):
            total = add(total, abs(d[i] - q[i] * k))
        return total

    @_jit
    def divergences(
        x: Any,
        x_stride: Any,
        temperature: Any,
        y: Any,
        y_stride: Any,
        behavior_temperature: Any,
        width: Any,
        first: Any,
        last: Any,
        out: Any,
    ) -> None:
        wide_vectors()
        q, d, scratch = np.empty(width, dtype), np.empty(width, dtype), np.empty(1, integer)
        for r in range(first, last):
            load(q, y[r * y_stride : r * y_stride + width], number(behavior_temperature))
            load(d, x[r * x_stride : r * x_stride + width], number(temperature))
            maximum = largest_in(q, scratch)
            total = weighted = 0.0
            for start in range(0, width, block):
                part_total, part_weighted = exponentiate(q[start : start + block], d[start : start + block], maximum)
                total += part_total
                weighted += part_weighted
            # d is x − y − Σ μ (x − y) from here on
            center, excess, most = number(weighted / total), 0.0, integer(lowest)
            for start in range(0, width, block):
                part_excess, part_most = compare(q[start : start + block], d[start : start + block], center)
                excess += part_excess
                most = max(most, part_most)
            k, moved = excess / total, 0.0
            for start in range(0, width, block):
                moved += distance(q[start : start + block], d[start : start + block], number(k))
            out[0, r], out[1, r] = moved / total / (2.0 * (1.0 + k)), np.log1p(k)
            out[2, r] = of_ordered(most, scratch) <= largest_ratio

    return divergences


def _as_they_are(number: Any) -> tuple[Callable[..., None], Callable[..., None]]:
    one = number(1)

    @numba.njit(error_model="numpy")
    def load(x: Any, z: Any, temperature: Any) -> None:
        if temperature == one:
            for i in range(x.size):
                x[i] = z[i]
        else:
            for i in range(x.size):
                x[i] = z[i] / temperature

    @numba.njit
    def store(z: Any, x: Any) -> None:
        for i in range(x.size):
            z[i] = x[i]

    return load, store


def _bfloat16(number: Any) -> tuple[Callable[..., None], Callable[..., None]]:
    """The upper halves of float32, which numba knows as integers only."""
    one = number(1)

    @numba.njit(error_model="numpy")
    def load(x: Any, z: Any, temperature: Any) -> None:
        bits = x.view(np.uint32)
        for i in range(x.size):
            bits[i] = np.uint32(z[i]) << np.uint32(16)
        if temperature != one:
            for i in range(x.size):
                x[i] /= temperature

    @numba.njit
    def store(z: Any, x: Any) -> None:
        bits = x.view(np.uint32)
        for i in range(x.size):
            b = bits[i]
            # to nearest, ties to even; a NaN of a hidden sum must not carry over into infinity or 0
            rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            z[i] = np.uint16(rounded if x[i] == x[i] else np.uint32(0x7FC0))

    return load, store


def _in_threads(run: Callable[[int, int], None], rows: int, width: int) -> None:
    """Cover the rows, in as many threads as torch has and pay."""
    in_threads(run, rows, max(1, min(torch.get_num_threads(), rows, rows * width // _LOGITS_PER_THREAD)))
