"""The compiled engine at vocabulary scale: softmax statistics, gradients and divergences of rows, as numba loops.

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
from torch.autograd.graph import increment_version

from drpo_core.engines.elementary import functions, wide_vectors
from drpo_torch.engines.threads import in_threads
from drpo_torch.vocabulary.softmax import (
    LARGEST_LOG_RATIO,
    ArrayRows,
    Places,
    Pull,
    Softmaxes,
    Statistics,
    Tempering,
    Wanted,
    working_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["LoopRows", "row_divergences"]

_BLOCK = 2048
# fewer logits than this are done before another thread has started
_LOGITS_PER_THREAD = 1 << 17


class LoopRows:
    """`drpo_torch.vocabulary.softmax.RowKernels` of CPU tensors whose rows lie in memory as they are read."""

    keeps = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.kernels = working_dtype(dtype), _kernels(dtype)

    def softmaxes(
        self,
        z: torch.Tensor,
        places: Places,
        tempering: Tempering,
        wanted: Wanted,
        *,
        entropy: bool = False,
        keep: torch.Tensor | None = None,  # noqa: ARG002 -- a softmax taken again costs no more than one that is read
    ) -> Softmaxes:
        """See `RowKernels`."""
        rows, out = _Rows.of(z, places), np.empty((3, len(places)), self.kernels.dtype)
        step = _numbers(tempering, len(places)), _Columns.of(tempering, len(places))
        _in_threads(lambda first, last: self.kernels.statistics(*rows, *step, first, last, out), places, z)
        maximum, total, entropies = (torch.from_numpy(row.copy()) for row in out)
        statistics = Statistics(maximum, total.log(), entropies if entropy else None, total)
        return Softmaxes.of(statistics, places, wanted, wanted.logits(z, places, tempering))

    def gradients(
        self,
        z: torch.Tensor,
        places: Places,
        tempering: Tempering,
        pull: Pull,
        *,
        statistics: Statistics,
        out: torch.Tensor,
        kept: bool = False,  # noqa: ARG002
    ) -> None:
        """See `RowKernels`; where `pull` is 0 so is the result, whatever the row holds."""
        if pull.everywhere is not None:
            others = ArrayRows(z.shape[-1], z.dtype, z.device)
            others.gradients(z, places, tempering, pull, statistics=statistics, out=out)
            return
        rows, into = _Rows.of(z, places), _Rows.of(out, places)
        scale = pull.of_softmax
        slope = torch.zeros_like(scale) if pull.slope is None else pull.slope
        every = (statistics.maximum, statistics.total, scale, slope)
        coefficients = np.stack([field.detach().to(self.dtype).numpy() for field in every])
        at, columns = pull.at.detach().to(self.dtype).numpy(), pull.columns.numpy()
        step = _numbers(tempering, len(places)), _Columns.of(tempering, len(places))
        _in_threads(
            lambda first, last: self.kernels.gradients(
                *rows, into.data, into.stride, *step, first, last, coefficients, at, columns
            ),
            places,
            z,
        )
        # autograd must learn of what no operation of torch's has written
        if not out.is_inference():
            increment_version(out)


ROWS = LoopRows
"""What `drpo_torch.vocabulary.engines` takes of this module."""


def row_divergences(
    logits: torch.Tensor,
    places: Places,
    tempering: Tempering,
    behavior_logits: torch.Tensor,
    behavior_places: Places,
    behavior: Tempering,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Full TV and KL of rows, and whether they hold: not where an inf, a NaN or a ratio above e^60 is.

    Both policies have the support of `tempering`.
    """
    kernel, dtype = _divergences(logits.dtype, behavior_logits.dtype)
    x, y = _Rows.of(logits, places), _Rows.of(behavior_logits, behavior_places)
    out = np.empty((3, len(places)), dtype)
    count = len(places)
    numbers, behavior_numbers, columns = _numbers(tempering, count), _numbers(behavior, count), _Columns.of(tempering, count)
    _in_threads(lambda first, last: kernel(*x, numbers, *y, behavior_numbers, columns, first, last, out), places, logits)
    tv, kl, near = (torch.from_numpy(row.copy()) for row in out)
    return tv, kl, near != 0.0


class _Rows(NamedTuple):
    """Rows of a matrix with contiguous rows, as numba takes them: its storage, the way from row to row, and which."""

    data: NDArray[Any]
    stride: int
    width: int
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, matrix: torch.Tensor, places: Places) -> _Rows:
        count, width = matrix.shape
        stride = matrix.stride(0)
        span = 0 if count == 0 else (count - 1) * stride + width
        flat = matrix.detach().as_strided((span,), (1,))
        if flat.dtype == torch.bfloat16:
            flat = flat.view(torch.uint16)
        return cls(flat.numpy(), stride, width, places.on_host)


class _Columns(NamedTuple):
    """The supports of rows as numba takes them: see `drpo_torch.vocabulary.support.SupportRows`."""

    whole: NDArray[np.bool_]
    keys: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    base: NDArray[np.int64]
    words: NDArray[np.int32]
    words_per_row: int
    rows: NDArray[np.int64]
    start: int

    @classmethod
    def of(cls, tempering: Tempering, count: int) -> _Columns:
        support, none = tempering.support, np.empty(0, np.int64)
        if support is None:
            return cls(np.ones(count, np.bool_), none, none, none, none, np.empty(0, np.int32), 0, none, 0)
        whole, rows, start = support.whole.numpy().copy(), support.rows.numpy().copy(), support.columns.start
        base = rows * support.vocabulary + start
        if support.words is not None:
            words = support.words.contiguous()
            return cls(whole, none, none, none, base, words.numpy().reshape(-1), words.shape[1], rows, start)
        low, high = (end.numpy() for end in support.ends)
        return cls(whole, support.keys.numpy(), low, high, base, np.empty(0, np.int32), 0, rows, start)


class _Kernels(NamedTuple):
    dtype: np.dtype[Any]
    statistics: Callable[..., None]
    gradients: Callable[..., None]


class _Tools(NamedTuple):
    """Functions that the loops share, for one dtype of the arithmetic."""

    dtype: np.dtype[Any]
    of_ordered: Callable[..., Any]
    largest_in: Callable[..., Any]
    squash: Callable[..., None]


_jit = numba.njit(nogil=True, error_model="numpy")


def _numbers(tempering: Tempering, count: int) -> NDArray[np.float64]:
    """Temperature and soft-cap, or 0 for none, a row."""
    numbers, temperature = np.empty((count, 2), np.float64), tempering.temperature
    numbers[:, 0] = temperature.double().numpy() if isinstance(temperature, torch.Tensor) else temperature
    numbers[:, 1] = tempering.softcap or 0.0
    return numbers


@_jit
def _columns_of(support: Any, r: Any, width: Any, columns: Any) -> Any:
    """The columns of a row that has a support of its own, increasing, and how many."""
    n = 0
    if support.words_per_row == 0:
        for j in range(support.low[r], support.high[r]):
            columns[n] = support.keys[j] - support.base[r]
            n += 1
        return n
    row = support.rows[r] * support.words_per_row
    for column in range(width):
        v = column + support.start
        # branch-free: a column that is not in it is overwritten by the next
        columns[n] = column
        n += (support.words[row + (v >> 5)] >> (v & 31)) & 1
    return n


@_jit
def _picked(row: Any, columns: Any, into: Any) -> Any:
    """The entries of a row at some columns, one after the other."""
    for i in range(columns.size):
        into[i] = row[columns[i]]
    return into[: columns.size]


@_jit
def _room(support: Any, first: Any, last: Any, width: Any) -> Any:
    """The size of a buffer for the entries of a support: 0 if no row has one."""
    return 0 if support.whole[first:last].all() else width


@cache
def _kernels(stored: torch.dtype) -> _Kernels:
    """The loops for logits of this dtype."""
    tools = _tools(working_dtype(stored))
    load, store = _memory(stored, tools.dtype)
    return _Kernels(tools.dtype, _statistics(tools, load), _gradients(tools, load, store))


@cache
def _tools(working: torch.dtype) -> _Tools:
    dtype = np.dtype(str(working).removeprefix("torch."))
    integer, number = np.dtype(f"i{dtype.itemsize}").type, dtype.type
    lowest, every_bit = integer(np.iinfo(integer).min), integer(np.iinfo(integer).max)
    largest, ordered, expm1, select = (getattr(functions(dtype), name) for name in ("largest", "ordered", "expm1", "select"))
    zero, two = number(0), number(2)

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

    @_jit
    def squash(x: Any, cap: Any) -> None:
        """Replace z by cap·tanh(z/cap); tanh u = −e/(e + 2) with e = expm1(−2u), u ≥ 0."""
        wide_vectors()
        for i in range(x.size):
            u = x[i] / cap
            e = expm1(-two * abs(u))
            t = cap * e / (e + two)
            x[i] = select(u < zero, t, -t)

    return _Tools(dtype, of_ordered, largest_in, squash)


def _least(dtype: np.dtype[Any]) -> Any:
    """Some x below which e^x is 0 or next to it, to multiply e^x with instead of x: −inf · 0 is a NaN."""
    return np.ceil(np.log(np.finfo(dtype).tiny))


def _statistics(tools: _Tools, load: Callable[..., None]) -> Callable[..., None]:
    """Maximum, Σ e^(x − maximum) and entropy of rows, read once: what is summed is rescaled when the maximum moves."""
    dtype, largest_in, tempered = tools.dtype, tools.largest_in, _tempered(tools, load)
    decay, add, select = functions(dtype).decay, functions(dtype).add, functions(dtype).select
    number, integer, zero, least = dtype.type, np.dtype(f"i{dtype.itemsize}"), dtype.type(0), _least(dtype)
    block = _BLOCK

    @_jit
    def statistics(
        z: Any, stride: Any, width: Any, rows: Any, numbers: Any, support: Any, first: Any, last: Any, out: Any
    ) -> None:
        wide_vectors()
        buffer, scratch = np.empty(block, dtype), np.empty(1, integer)
        room = _room(support, first, last, width)
        columns, taken = np.empty(room, np.int64), np.empty(room, z.dtype)
        for r in range(first, last):
            row = z[rows[r] * stride : rows[r] * stride + width]
            if not support.whole[r]:
                row = _picked(row, columns[: _columns_of(support, r, width, columns)], taken)
            maximum, total, weighted = -np.inf, 0.0, 0.0
            for start in range(0, row.size, block):
                part = row[start : start + block]
                x = buffer[: part.size]
                tempered(x, part, numbers[r])
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


def _gradients(tools: _Tools, load: Callable[..., None], store: Callable[..., None]) -> Callable[..., None]:  # noqa: C901 -- the steps of one pass
    """(p (scale − slope (x − max x)) + `at` some columns) ∂x/∂z, in the rows of another matrix or the same."""
    dtype, tempered = tools.dtype, _tempered(tools, load)
    decay, select = functions(dtype).decay, functions(dtype).select
    number, least, one, two, block = dtype.type, _least(dtype), dtype.type(1), dtype.type(2), _BLOCK

    @_jit
    def add_at(x: Any, columns: Any, at: Any, start: Any, t: Any) -> None:
        for c in range(columns.size):
            column = columns[c] - start
            if 0 <= column < x.size:
                x[column] += at[c] / t

    @_jit
    def places_of(wanted: Any, columns: Any, into: Any) -> Any:
        """Where some columns are among increasing ones; −1 for one that is not."""
        for c in range(wanted.size):
            i = np.searchsorted(columns, wanted[c])
            into[c] = i if i < columns.size and columns[i] == wanted[c] else -1
        return into

    @_jit
    def gradients(  # noqa: C901 -- the steps of one pass
        z: Any,
        stride: Any,
        width: Any,
        rows: Any,
        out: Any,
        out_stride: Any,
        numbers: Any,
        support: Any,
        first: Any,
        last: Any,
        coefficients: Any,
        at: Any,
        columns: Any,
    ) -> None:
        wide_vectors()
        buffer, steepness = np.empty(block, dtype), np.empty(block, dtype)
        room = _room(support, first, last, width)
        inside, taken, made = np.empty(room, np.int64), np.empty(room, z.dtype), np.empty(room, out.dtype)
        among = np.empty(columns.shape[1], np.int64)
        for r in range(first, last):
            t, cap = number(numbers[r, 0]), number(numbers[r, 1])
            row = z[rows[r] * stride : rows[r] * stride + width]
            place = out[rows[r] * out_stride : rows[r] * out_stride + width]
            maximum, total, scale, slope = coefficients[:, r]
            if scale == 0.0 and slope == 0.0 and not at[r].any():
                place[:] = 0
                continue
            scale, slope = scale / total / t, slope / total / t
            wanted, into, n = columns[r], place, width
            if not support.whole[r]:
                n = _columns_of(support, r, width, inside)
                row, into = _picked(row, inside[:n], taken), made
                wanted = places_of(wanted, inside[:n], among)
                # the row may lie here, but what it needs is taken
                place[:] = 0
            for start in range(0, n, block):
                part = row[start : start + block]
                x = buffer[: part.size]
                tempered(x, part, numbers[r])
                if cap != 0.0:
                    # sech²(z/cap) of z itself: 1 − tanh² has lost its digits where the logit is some times the cap
                    load(steepness[: x.size], part)
                    for i in range(x.size):
                        e = decay(-two * abs(steepness[i] / cap))
                        steepness[i] = two * (e / (one + e)) * (two / (one + e))
                for i in range(x.size):
                    d = x[i] - maximum
                    x[i] = decay(d) * (scale - slope * select(d < least, least, d))
                add_at(x, wanted, at[r], start, t)
                if cap != 0.0:
                    for i in range(x.size):
                        x[i] *= steepness[i]
                store(into[start : start + part.size], x)
            if not support.whole[r]:
                for i in range(n):
                    place[inside[i]] = made[i]

    return gradients


@cache
def _divergences(stored: torch.dtype, behavior_stored: torch.dtype) -> tuple[Callable[..., None], np.dtype[Any]]:
    """Full TV and KL, as `drpo_torch.vocabulary.divergences` has them, in two rows that stay in the cache; their dtype."""
    tools = _tools(working_dtype(stored, behavior_stored))
    dtype, of_ordered, largest_in = tools.dtype, tools.of_ordered, tools.largest_in
    load, behavior_load = (_tempered(tools, _memory(s, dtype)[0]) for s in (stored, behavior_stored))
    exponentiate, compare, distance = _divergence_steps(dtype)
    number, integer, block = dtype.type, np.dtype(f"i{dtype.itemsize}").type, _BLOCK
    lowest, largest_ratio = np.iinfo(integer).min, number(LARGEST_LOG_RATIO)

    @_jit
    def divergences(
        x: Any,
        x_stride: Any,
        width: Any,
        x_rows: Any,
        x_numbers: Any,
        y: Any,
        y_stride: Any,
        _: Any,
        y_rows: Any,
        y_numbers: Any,
        support: Any,
        first: Any,
        last: Any,
        out: Any,
    ) -> None:
        wide_vectors()
        q_buffer, d_buffer, scratch = np.empty(width, dtype), np.empty(width, dtype), np.empty(1, integer)
        room = _room(support, first, last, width)
        columns, x_taken, y_taken = np.empty(room, np.int64), np.empty(room, x.dtype), np.empty(room, y.dtype)
        for r in range(first, last):
            x_row = x[x_rows[r] * x_stride : x_rows[r] * x_stride + width]
            y_row = y[y_rows[r] * y_stride : y_rows[r] * y_stride + width]
            if not support.whole[r]:
                inside = columns[: _columns_of(support, r, width, columns)]
                x_row, y_row = _picked(x_row, inside, x_taken), _picked(y_row, inside, y_taken)
            q, d, n = q_buffer[: x_row.size], d_buffer[: x_row.size], x_row.size
            behavior_load(q, y_row, y_numbers[r])
            load(d, x_row, x_numbers[r])
            maximum = largest_in(q, scratch)
            total = weighted = 0.0
            for start in range(0, n, block):
                part_total, part_weighted = exponentiate(q[start : start + block], d[start : start + block], maximum)
                total += part_total
                weighted += part_weighted
            # d is x − y − Σ μ (x − y) from here on
            center, excess, most = number(weighted / total), 0.0, integer(lowest)
            for start in range(0, n, block):
                part_excess, part_most = compare(q[start : start + block], d[start : start + block], center)
                excess += part_excess
                most = max(most, part_most)
            k, moved = excess / total, 0.0
            for start in range(0, n, block):
                moved += distance(q[start : start + block], d[start : start + block], number(k))
            out[0, r], out[1, r] = moved / total / (2.0 * (1.0 + k)), np.log1p(k)
            out[2, r] = of_ordered(most, scratch) <= largest_ratio

    return divergences, dtype


@cache
def _divergence_steps(dtype: np.dtype[Any]) -> tuple[Callable[..., Any], ...]:
    """The three passes over a block of two rows."""
    decay, expm1, add, largest, ordered = (
        getattr(functions(dtype), name) for name in ("decay", "expm1", "add", "largest", "ordered")
    )
    integer, zero = np.dtype(f"i{dtype.itemsize}").type, dtype.type(0)
    lowest = np.iinfo(integer).min

    @_jit
    def exponentiate(y: Any, x: Any, m: Any) -> Any:
        """Replace y and x by e^(y − m) and x − y; returns Σ e^(y − m) and Σ e^(y − m) (x − y)."""
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
        """Replace d by q (e^(d − center) − 1); returns Σ q φ(d − center), and the largest d as an integer."""
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

    return exponentiate, compare, distance


def _tempered(tools: _Tools, load: Callable[..., None]) -> Callable[..., None]:
    """Load stored logits z as x = cap·tanh(z/cap) / T."""
    number, squash = tools.dtype.type, tools.squash
    zero, one = number(0), number(1)

    @_jit
    def tempered(x: Any, z: Any, numbers: Any) -> None:
        wide_vectors()
        temperature, cap = number(numbers[0]), number(numbers[1])
        load(x, z)
        if cap != zero:
            squash(x, cap)
        if temperature != one:
            for i in range(x.size):
                x[i] /= temperature

    return tempered


@cache
def _memory(stored: torch.dtype, dtype: np.dtype[Any]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Functions that load stored numbers into a buffer of the arithmetic's dtype, and store them again."""
    if stored == torch.bfloat16:
        return _bfloat16(dtype)

    @numba.njit
    def copy(to: Any, of: Any) -> None:
        for i in range(to.size):
            to[i] = of[i]

    return copy, copy


def _bfloat16(dtype: np.dtype[Any]) -> tuple[Callable[..., None], Callable[..., None]]:
    """The upper halves of float32, which numba knows as integers only."""
    if dtype == np.float64:
        # beside float64 logits of the other policy
        @numba.njit
        def widen(x: Any, z: Any) -> None:
            narrow = np.empty(x.size, np.float32)
            load(narrow, z)
            for i in range(x.size):
                x[i] = narrow[i]

    @numba.njit
    def load(x: Any, z: Any) -> None:
        bits = x.view(np.uint32)
        for i in range(x.size):
            bits[i] = np.uint32(z[i]) << np.uint32(16)

    @numba.njit
    def store(z: Any, x: Any) -> None:
        bits = x.view(np.uint32)
        for i in range(x.size):
            b = bits[i]
            # to nearest, ties to even; a NaN of a hidden sum must not carry over into infinity or 0
            rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            z[i] = np.uint16(rounded if x[i] == x[i] else np.uint32(0x7FC0))

    return (widen if dtype == np.float64 else load), store


def _in_threads(run: Callable[[int, int], None], places: Places, logits: torch.Tensor) -> None:
    """Cover the rows, in as many threads as torch has and pay."""
    rows = len(places)
    threads = min(torch.get_num_threads(), rows, rows * logits.shape[1] // _LOGITS_PER_THREAD)
    in_threads(run, rows, max(1, threads))
