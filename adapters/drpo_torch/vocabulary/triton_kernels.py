"""Triton kernels over rows of logits, one program a row: what `drpo_torch.vocabulary.triton_rows` runs.

`rows` and `support` are the `Rows` and `Words` of `drpo_torch.vocabulary.triton_arguments`. Names in capitals are known when a
kernel is compiled. A name that ends in ``_at`` is an address. What there is not is None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drpo_core.engines.triton_source import FUNCTIONS
from drpo_torch.engines.triton_loop import module_of

__all__ = ["gradients", "holds", "place_of", "row_of", "softmaxes", "steepness", "tempered", "words_of"]

tanh, narrowed = (module_of(FUNCTIONS)[name] for name in ("tanh", "narrowed"))


@triton.jit
def _exact(value, number: tl.constexpr):
    """A number in the dtype of the arithmetic; float64 comes as its bits, because a float may arrive as float32."""
    if number == tl.float64:
        return tl.cast(value, tl.int64).to(tl.float64, bitcast=True)
    return tl.cast(value, number)


@triton.jit
def place_of(rows, r):
    """Which row of the matrix row r of some `Rows` is."""
    place = tl.cast(rows.first, tl.int64) + r
    if rows.places is not None:
        place = tl.load(rows.places + r)
    return place


@triton.jit
def row_of(rows, r, number: tl.constexpr):
    """Where row r of some `Rows` begins, its temperature and its soft-cap."""
    begin = place_of(rows, r) * tl.cast(rows.row_stride, tl.int64)
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
def holds(support, words, column, inside):
    """Whether columns are in a row's support."""
    held = inside
    if support is not None:
        v = column + support.start
        word = tl.load(words[0] + (v >> 5), mask=inside, other=0)
        held = (((word >> (v & 31)) & 1) != 0) | words[1]
    return held


@triton.jit
def tempered(rows, row, support, words, column, inside):
    """The logits x of some columns of a row, −inf outside the support, and z, both in the working dtype."""
    place = row[0] + column * tl.cast(rows.column_stride, tl.int64)
    z = tl.load(rows.z + place, mask=inside, other=-float("inf")).to(row[1].dtype)
    x = z
    if rows.cap is not None:
        x = row[2] * tanh(z / row[2])
    x = x / row[1]
    if support is not None:
        x = tl.where(holds(support, words, column, inside), x, -float("inf"))
    # a column beyond the row would be −cap
    return tl.where(inside, x, -float("inf")), z


@triton.jit
def steepness(rows, row, z):
    """The derivative of x in z."""
    steep = 1.0 / row[1]
    if rows.cap is not None:
        # of z itself: 1 − tanh² has lost its digits where the logit is some times the cap
        t = tl.exp(-2.0 * tl.abs(z / row[2]))
        steep = 4.0 * t / ((1.0 + t) * (1.0 + t)) / row[1]
    return steep


@triton.jit(do_not_specialize=["elsewhere"])
def softmaxes(
    rows,
    support,
    valid_at,
    width,
    ids_at,
    ids_stride: tl.int64,
    id_stride: tl.int64,
    first_id,
    ids,
    IDS: tl.constexpr,
    elsewhere,
    log_prob_at,
    found_at,
    count,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each row max x, log Σ e^(x − max x), that sum, log Σ e^x and the entropy, to the rows of a matrix; log-probs of ids.

    All is 0 of a row that does not count.
    """
    r = tl.program_id(0).to(tl.int64)
    number = found_at.dtype.element_ty
    counts = True
    if valid_at is not None:
        counts = tl.load(valid_at + r) != 0
    c = tl.arange(0, IDS)
    wanted = c < ids
    if counts:
        row, words, lane = row_of(rows, r, number), words_of(support, r), tl.arange(0, BLOCK)
        # each lane has a maximum of its own, and sums of exponentials that are relative to it
        most = tl.full((BLOCK,), -float("inf"), number)
        total, weighted = tl.zeros((BLOCK,), number), tl.zeros((BLOCK,), number)
        for start in range(0, width, BLOCK):
            column = start + lane
            x, _ = tempered(rows, row, support, words, column, column < width)
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
        tl.store(found_at + count + r, log_sum)
        tl.store(found_at + 2 * count + r, total)
        tl.store(found_at + 3 * count + r, maximum + log_sum)
        if ENTROPY:
            tl.store(found_at + 4 * count + r, log_sum - weighted / total)
        some = tl.load(ids_at + r * ids_stride + c * id_stride, mask=wanted, other=0) - first_id
        here = wanted & (some >= 0) & (some < width)
        x_some, _ = tempered(rows, row, support, words, some, here)
        # two tanh of one argument may differ in their last bit
        log_prob = tl.minimum(x_some - maximum, 0.0, propagate_nan=tl.PropagateNan.ALL) - log_sum
        tl.store(log_prob_at + r * ids + c, tl.where(here, log_prob, elsewhere), mask=wanted)
    else:
        for field in tl.static_range(5 if ENTROPY else 4):
            tl.store(found_at + field * count + r, tl.zeros((), number))
        tl.store(log_prob_at + r * ids + c, tl.zeros((IDS,), number), mask=wanted)


@triton.jit
def _derivative(rows, row, x, z, maximum, log_sum, scale, slope, SLOPED: tl.constexpr):
    """The derivative in x, p (scale − slope (x − max x)), and ∂x/∂z."""
    d = tl.minimum(x - maximum, 0.0)
    p = tl.exp(d - log_sum)
    factor = scale
    if SLOPED:
        # where p is 0, −inf times it would be a NaN
        factor = scale - slope * tl.maximum(d, -1000.0)
    return tl.where(p == 0.0, 0.0, p * factor), steepness(rows, row, z)


@triton.jit
def gradients(
    rows,
    support,
    valid_at,
    width,
    out_at,
    out_row_stride: tl.int64,
    out_column_stride: tl.int64,
    maximum_at,
    log_sum_at,
    scale_at,
    slope_at,
    at_at,
    at_stride: tl.int64,
    at_column_stride: tl.int64,
    columns_at,
    columns_stride: tl.int64,
    id_stride: tl.int64,
    first_id,
    columns,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """∂/∂z of each row: (p (scale − slope (x − max x)) + `at` some columns) ∂x/∂z; 0 of a row that does not count."""
    r = tl.program_id(0).to(tl.int64)
    number = maximum_at.dtype.element_ty
    into = place_of(rows, r) * out_row_stride
    c = tl.arange(0, COLUMNS)
    wanted = c < columns
    if valid_at is not None:
        wanted = wanted & (tl.load(valid_at + r + 0 * c) != 0)
    at = tl.load(at_at + r * at_stride + c * at_column_stride, mask=wanted, other=0.0)
    lane = tl.arange(0, BLOCK)
    scale, slope = -tl.sum(at, 0), tl.zeros((), number)
    moves = tl.sum((at != 0.0).to(tl.int32), 0) > 0
    if scale_at is not None:
        scale = tl.load(scale_at + r)
        moves = moves | (scale != 0.0)
    if slope_at is not None:
        slope = tl.load(slope_at + r)
        moves = moves | (slope != 0.0)
    if valid_at is not None:
        moves = moves & (tl.load(valid_at + r) != 0)
    if moves:
        row, words = row_of(rows, r, number), words_of(support, r)
        maximum, log_sum = tl.load(maximum_at + r), tl.load(log_sum_at + r)
        # the few columns with more to them, before the row is overwritten; those of other parts are not here
        some = tl.load(columns_at + r * columns_stride + c * id_stride, mask=wanted, other=-1) - first_id
        here = wanted & (some >= 0) & (some < width)
        x_some, z_some = tempered(rows, row, support, words, some, here)
        # a column may come several times: each of them gets all that is at it
        same = (some[:, None] == some[None, :]) & here[None, :]
        more = tl.sum(tl.where(same, at[None, :], 0.0), 1)
        y_some, steep_some = _derivative(rows, row, x_some, z_some, maximum, log_sum, scale, slope, slope_at is not None)
        # outside the support z may be a NaN
        of_some = tl.where(holds(support, words, some, here), (y_some + more) * steep_some, 0.0)
        # `out` may be z: no warp may write before all have read
        tl.debug_barrier()
        for start in range(0, width, BLOCK):
            column = start + lane
            inside = column < width
            x, z = tempered(rows, row, support, words, column, inside)
            y, steep = _derivative(rows, row, x, z, maximum, log_sum, scale, slope, slope_at is not None)
            of_z = tl.where(holds(support, words, column, inside), y * steep, 0.0)
            tl.store(out_at + into + column * out_column_stride, narrowed(of_z, out_at), mask=inside)
        tl.debug_barrier()
        tl.store(out_at + into + some * out_column_stride, narrowed(of_some, out_at), mask=here)
    else:
        for start in range(0, width, BLOCK):
            column = start + lane
            zero = tl.zeros((BLOCK,), number)
            tl.store(out_at + into + column * out_column_stride, zero, mask=column < width)
