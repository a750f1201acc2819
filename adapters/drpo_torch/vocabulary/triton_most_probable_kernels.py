"""A Triton kernel that finds the K largest entries of rows of logits, one program a row.

Entry and id become one integer, which is larger if the entry is, or, of equal ones, if the id is lower: so that no two are
equal, and sorting networks find one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drpo_core.engines.triton_source import FUNCTIONS
from drpo_torch.engines.triton_loop import module_of
from drpo_torch.vocabulary.triton_kernels import place_of, words_of

__all__ = ["most_probable"]

_functions = module_of(FUNCTIONS)
ordered, unordered = _functions["ordered"], _functions["unordered"]
IDS = tl.constexpr((1 << 31) - 1)
NONE = tl.constexpr(1 - (1 << 63))
"""Less than any entry's."""


@triton.jit
def most_probable(
    rows,
    support,
    lowest,
    valid_at,
    width,
    z_at,
    ids_at,
    count,
    start,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first `count` entries of each row and their ids, counted from `start`, to matrices (rows, count).

    `rows` are `drpo_torch.vocabulary.triton_arguments.Rows`, `support` is `Words` or None. −inf counts as `lowest`, if that is
    not None.
    """
    r = tl.program_id(0).to(tl.int64)
    counts = True
    if valid_at is not None:
        counts = tl.load(valid_at + r) != 0
    place = tl.arange(0, KEYS)
    z_into, ids_into = z_at + r * count + place, ids_at + r * count + place
    if counts:
        begin = place_of(rows, r) * tl.cast(rows.row_stride, tl.int64)
        words, whole = words_of(support, r)
        lane = tl.arange(0, BLOCK)
        best = tl.full((KEYS,), NONE, tl.int64)
        for first in range(0, width, BLOCK):
            column = first + lane
            inside = column < width
            at = rows.z + begin + column * tl.cast(rows.column_stride, tl.int64)
            z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if lowest is not None:
                z = tl.where(z == -float("inf"), lowest, z)
            if support is not None:
                v = column + support.start
                word = tl.load(words + (v >> 5), mask=inside, other=0)
                z = tl.where((((word >> (v & 31)) & 1) != 0) | whole, z, -float("inf"))
            # −0 is no less than 0
            key = ordered(tl.where(z == 0.0, 0.0, z)).to(tl.int64) << 32 | (column ^ IDS).to(tl.int64)
            key = tl.where(inside, key, NONE)
            if tl.max(key, 0) > tl.min(best, 0):
                # of two decreasing sequences, one of them turned around, the larger of each pair: increasing, then decreasing
                best = tl.bitonic_merge(tl.maximum(best, tl.flip(tl.topk(key, KEYS), 0)), descending=True)
        tl.store(z_into, unordered((best >> 32).to(tl.int32), tl.float32), mask=place < count)
        tl.store(ids_into, ((best & IDS) ^ IDS) + start, mask=place < count)
    else:
        tl.store(z_into, tl.zeros((KEYS,), tl.float32), mask=place < count)
        tl.store(ids_into, tl.zeros((KEYS,), tl.int64), mask=place < count)
