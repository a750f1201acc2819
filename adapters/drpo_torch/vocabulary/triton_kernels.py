"""Triton kernels over rows of logits, one program a row: what `drpo_torch.vocabulary.triton_rows` runs.

Names in capitals are known when a kernel is compiled. A name that ends in ``_at`` is an address; what there is not, such as
the words of a support, is 0 there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drpo_core.engines.triton_source import FUNCTIONS
from drpo_torch.engines.triton_loop import module_of

__all__ = ["gradients", "statistics"]

tanh = module_of(FUNCTIONS)["tanh"]


@triton.jit
def _exact(value, number: tl.constexpr):
    """A number in the dtype of the arithmetic; float64 comes as its bits, because a float may arrive as float32."""
    if number == tl.float64:
        return tl.cast(value, tl.int64).to(tl.float64, bitcast=True)
    return tl.cast(value, number)


@triton.jit
def _logits(
    z_at,
    begin,
    column_stride: tl.int64,
    column,
    inside,
    temperature,
    cap,
    word_row,
    words_start,
    whole,
    CAPPED: tl.constexpr,
    SUPPORTED: tl.constexpr,
):
    """The logits x of some columns of a row, −inf outside the support, and z, both in the working dtype."""
    z = tl.load(z_at + begin + column * column_stride, mask=inside, other=-float("inf")).to(temperature.dtype)
    x = z
    if CAPPED:
        x = cap * tanh(z / cap)
    x = x / temperature
    if SUPPORTED:
        v = column + words_start
        word = tl.load(word_row + (v >> 5), mask=inside, other=0)
        x = tl.where((((word >> (v & 31)) & 1) != 0) | whole, x, -float("inf"))
    # a column beyond the row would be −cap
    return tl.where(inside, x, -float("inf")), z


@triton.jit
def row_of(rows, r, number: tl.constexpr):
    """Where row r of some `Rows` begins, its temperature and its soft-cap."""
    begin = tl.load(rows.places + r) * tl.cast(rows.row_stride, tl.int64)
    temperature, cap = _exact(rows.temperature_of_all, number), tl.full((), 0.0, number)
    if rows.temperature is not None:
        temperature = tl.load(rows.temperature + r)
    if rows.cap is not None:
        cap = _exact(rows.cap, number)
    return begin, temperature, cap


@triton.jit
def words_of(support, r):
    """The words of row r of a support, if there is one, and whether the row has none of its own."""
    words, whole = 0, False
    if support is not None:
        words = support.words + tl.load(support.rows + r) * support.stride
        whole = tl.load(support.whole + r) != 0
    return words, whole


@triton.jit
def tempered(rows, row, support, words, column, inside):
    """The logits x of some columns of a row, −inf outside the support, and z, both in the working dtype."""
    start = 0
    if support is not None:
        start = support.start
    return _logits(
        rows.z,
        row[0],
        tl.cast(rows.column_stride, tl.int64),
        column,
        inside,
        row[1],
        row[2],
        words[0],
        start,
        words[1],
        rows.cap is not None,
        support is not None,
    )


@triton.jit(do_not_specialize=["temperature_of_all", "cap_of_all"])
def statistics(
    z_at,
    row_stride: tl.int64,
    column_stride: tl.int64,
    width,
    index_at,
    temperature_at,
    temperature_of_all,
    cap_of_all,
    PER_ROW: tl.constexpr,
    CAPPED: tl.constexpr,
    SUPPORTED: tl.constexpr,
    words_at,
    words_stride,
    support_rows_at,
    whole_at,
    words_start,
    found_at,
    rows,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each row max x, log Σ e^(x − max x), that sum and the entropy, to the rows of a matrix (4, rows)."""
    r = tl.program_id(0)
    number = found_at.dtype.element_ty
    begin = tl.load(index_at + r) * row_stride
    temperature = _exact(temperature_of_all, number)
    if PER_ROW:
        temperature = tl.load(temperature_at + r)
    cap = _exact(cap_of_all, number)
    word_row, whole = words_at, False
    if SUPPORTED:
        word_row = words_at + tl.load(support_rows_at + r) * words_stride
        whole = tl.load(whole_at + r) != 0
    lane = tl.arange(0, BLOCK)
    # each lane has a maximum of its own, and sums of exponentials that are relative to it
    most = tl.full((BLOCK,), -float("inf"), number)
    total = tl.zeros((BLOCK,), number)
    weighted = tl.zeros((BLOCK,), number)
    for start in range(0, width, BLOCK):
        column = start + lane
        x, _ = _logits(
            z_at,
            begin,
            column_stride,
            column,
            column < width,
            temperature,
            cap,
            word_row,
            words_start,
            whole,
            CAPPED,
            SUPPORTED,
        )
        higher = tl.maximum(most, x)
        # NaN where nothing is finite yet
        fall = tl.where(most == higher, 0.0, most - higher)
        d = tl.where(x == higher, 0.0, x - higher)
        shrink, e = tl.exp(fall), tl.exp(d)
        # of −inf as the highest, e^0
        e = tl.where(x == -float("inf"), 0.0, e)
        if ENTROPY:
            # where the exponential is 0, −inf times it would be a NaN
            weighted = shrink * (weighted + tl.where(total == 0.0, 0.0, total * fall)) + tl.where(e == 0.0, 0.0, e * d)
        total = total * shrink + e
        # +inf less itself
        total = tl.where(x == float("inf"), float("nan"), total)
        total = tl.where(x == x, total, x)
        most = higher
    maximum = tl.max(most, 0)
    fall = tl.where(most == maximum, 0.0, most - maximum)
    shrink = tl.exp(fall)
    if ENTROPY:
        weighted = tl.sum(shrink * (weighted + tl.where(total == 0.0, 0.0, total * fall)), 0)
    total = tl.sum(total * shrink, 0)
    # of a row of −inf, 0/0
    total = tl.where(total == 0.0, float("nan"), total)
    log_sum = tl.log(total)
    tl.store(found_at + r, maximum)
    tl.store(found_at + rows + r, log_sum)
    tl.store(found_at + 2 * rows + r, total)
    if ENTROPY:
        tl.store(found_at + 3 * rows + r, log_sum - weighted / total)


@triton.jit
def _steepness(z, temperature, cap, CAPPED: tl.constexpr):
    """The derivative of x in z."""
    steepness = 1.0 / temperature
    if CAPPED:
        # of z itself: 1 − tanh² has lost its digits where the logit is some times the cap
        t = tl.exp(-2.0 * tl.abs(z / cap))
        steepness = 4.0 * t / ((1.0 + t) * (1.0 + t)) / temperature
    return steepness


@triton.jit
def _derivative(x, z, maximum, log_sum, scale, slope, temperature, cap, SLOPED: tl.constexpr, CAPPED: tl.constexpr):
    """The derivative in x, p (scale − slope (x − max x)), and ∂x/∂z."""
    d = tl.minimum(x - maximum, 0.0)
    p = tl.exp(d - log_sum)
    factor = scale
    if SLOPED:
        # where p is 0, −inf times it would be a NaN
        factor = scale - slope * tl.maximum(d, -1000.0)
    return tl.where(p == 0.0, 0.0, p * factor), _steepness(z, temperature, cap, CAPPED)


@triton.jit(do_not_specialize=["temperature_of_all", "cap_of_all"])
def gradients(
    z_at,
    row_stride: tl.int64,
    column_stride: tl.int64,
    width,
    index_at,
    out_at,
    out_row_stride: tl.int64,
    out_column_stride: tl.int64,
    temperature_at,
    temperature_of_all,
    cap_of_all,
    PER_ROW: tl.constexpr,
    CAPPED: tl.constexpr,
    SUPPORTED: tl.constexpr,
    words_at,
    words_stride,
    support_rows_at,
    whole_at,
    words_start,
    maximum_at,
    log_sum_at,
    scale_at,
    slope_at,
    columns_at,
    at_at,
    columns,
    SLOPED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """∂/∂z of each row: (p (scale − slope (x − max x)) + `at` some columns) ∂x/∂z."""
    r = tl.program_id(0)
    number = scale_at.dtype.element_ty
    row = tl.load(index_at + r)
    begin, into = row * row_stride, row * out_row_stride
    scale, slope = tl.load(scale_at + r), tl.load(slope_at + r)
    c = tl.arange(0, COLUMNS)
    wanted = c < columns
    at = tl.load(at_at + r * columns + c, mask=wanted, other=0.0)
    lane = tl.arange(0, BLOCK)
    moves = (tl.sum((at != 0.0).to(tl.int32), 0) > 0) | (scale != 0.0)
    if SLOPED:
        moves = moves | (slope != 0.0)
    if moves:
        maximum, log_sum = tl.load(maximum_at + r), tl.load(log_sum_at + r)
        temperature = _exact(temperature_of_all, number)
        if PER_ROW:
            temperature = tl.load(temperature_at + r)
        cap = _exact(cap_of_all, number)
        word_row, whole = words_at, False
        if SUPPORTED:
            word_row = words_at + tl.load(support_rows_at + r) * words_stride
            whole = tl.load(whole_at + r) != 0
        # the few columns with more to them, before the row is overwritten; those of other parts are not here
        some = tl.load(columns_at + r * columns + c, mask=wanted, other=-1)
        here = wanted & (some >= 0) & (some < width)
        x_some, z_some = _logits(
            z_at, begin, column_stride, some, here, temperature, cap, word_row, words_start, whole, CAPPED, SUPPORTED
        )
        # a column may come several times: each of them gets all that is at it
        same = (some[:, None] == some[None, :]) & here[None, :]
        more = tl.sum(tl.where(same, at[None, :], 0.0), 1)
        y_some, steep = _derivative(x_some, z_some, maximum, log_sum, scale, slope, temperature, cap, SLOPED, CAPPED)
        of_some = (y_some + more) * steep
        if SUPPORTED:
            v = some + words_start
            word = tl.load(word_row + (v >> 5), mask=here, other=0)
            of_some = tl.where((((word >> (v & 31)) & 1) != 0) | whole, of_some, 0.0)
        # `out` may be z: no warp may write before all have read
        tl.debug_barrier()
        for start in range(0, width, BLOCK):
            column = start + lane
            inside = column < width
            x, z = _logits(
                z_at, begin, column_stride, column, inside, temperature, cap, word_row, words_start, whole, CAPPED, SUPPORTED
            )
            y, steepness = _derivative(x, z, maximum, log_sum, scale, slope, temperature, cap, SLOPED, CAPPED)
            tl.store(out_at + into + column * out_column_stride, y * steepness, mask=inside)
        tl.debug_barrier()
        tl.store(out_at + into + some * out_column_stride, of_some, mask=here)
    else:
        for start in range(0, width, BLOCK):
            column = start + lane
            zero = tl.zeros((BLOCK,), number)
            tl.store(out_at + into + column * out_column_stride, zero, mask=column < width)
