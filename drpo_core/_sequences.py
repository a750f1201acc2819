"""Sums, extrema and running sums over the valid tokens of each sequence, given to each of its tokens.

Padded arrays have one sequence a row, and results one element a row, (…, 1). Packed ones are 1-D with `segment_ids`,
and results have one element a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from drpo_core._arrays import in_one_piece, taken_along_rows
from drpo_core._checks import check_segment_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from drpo_core._arrays import Array, Bool, Float, Int, Namespace

__all__ = ["Across", "Segments", "Sequences"]


class Across(Protocol):
    """Combines what each rank has found of its part of the same sequences: an all-reduce, elementwise."""

    def __call__(self, array: Array, operation: Literal["sum", "max"], /) -> Array:
        """The array of all ranks, reduced: the same on each of them."""
        ...


class Segments:
    """Elements with the same id, anywhere in a 1-D array, in memory that grows with their number.

    Along sorted ids, each step combines an element with the one 1, 2, 4 … places before it, if that is of its segment. The
    last element of a segment then has combined all of it, in the order of a pairwise sum.
    """

    def __init__(self, ids: Int[Array, " elements"], *, xp: Namespace) -> None:
        ids = in_one_piece(ids, xp=xp)
        self._xp, self._ids = xp, ids
        self._order = xp.argsort(ids, stable=True)
        self._ordered = xp.take(ids, self._order)
        self._last = xp.searchsorted(self._ordered, ids, side="right") - 1

    def whole(self, x: Float[Array, " elements"], combine: Callable[[Array, Array], Array]) -> Float[Array, " elements"]:
        """All elements of each one's segment, combined."""
        ordered = self.ordered(x)
        for distance in distances(x.shape[0]):
            later = ordered[distance:]
            combined = self._xp.where(self.same(distance), combine(later, ordered[:-distance]), later)
            ordered = self._xp.concat((ordered[:distance], combined))
        return self._xp.take(ordered, self._last)

    def ordered(self, x: Array) -> Array:
        """The elements segment by segment, each in its order."""
        return self._xp.take(in_one_piece(x, xp=self._xp), self._order)

    def restored(self, ordered: Array) -> Array:
        """The elements as they came."""
        return self._xp.take(ordered, self._xp.argsort(self._order, stable=True))

    def sorted(self, x: Float[Array, " elements"]) -> tuple[Float[Array, " elements"], Int[Array, " elements"]]:
        """The elements segment by segment, each by size; and where the segment of each one begins among them."""
        xp = self._xp
        by_size = xp.argsort(in_one_piece(x, xp=xp), stable=True)
        order = xp.take(by_size, xp.argsort(xp.take(self._ids, by_size), stable=True))
        return xp.take(in_one_piece(x, xp=xp), order), xp.searchsorted(self._ordered, self._ids, side="left")

    def same(self, distance: int) -> Bool[Array, " elements"]:
        """Whether the ordered elements from `distance` on are of the segment of those that many places before."""
        return self._ordered[distance:] == self._ordered[:-distance]


def distances(size: int) -> Iterator[int]:
    """1, 2, 4 … below a size: the steps of a scan."""
    distance = 1
    while distance < size:
        yield distance
        distance *= 2


class Sequences:
    """The sequences of a batch: rows of the mask, or packed segments.

    `across` combines the results of ranks that each hold a part of every row (sequence or context parallelism).
    """

    def __init__(
        self,
        mask: Bool[Array, "*tokens"],
        segment_ids: Int[Array, " tokens"] | None,
        *,
        across: Across | None = None,
        xp: Namespace,
    ) -> None:
        if segment_ids is not None:
            check_segment_ids(segment_ids, mask, xp=xp)
            if across is not None:
                msg = "segment_ids: expected None with `across`: packed tokens of two ranks are not of the same sequences"
                raise ValueError(msg)
        elif mask.ndim == 0:
            msg = "mask: expected at least one axis, the tokens of a sequence, got a 0-d array"
            raise ValueError(msg)
        self.mask, self.xp = mask, xp
        self._across = across
        packed = segment_ids is not None and mask.shape[0] > 0
        self._segments = Segments(segment_ids, xp=xp) if packed else None

    def total(self, x: Float[Array, "*tokens"]) -> Float[Array, "..."]:
        """Sum over the valid tokens of each sequence."""
        x = self.xp.where(self.mask, x, 0.0)
        if self._segments is not None:
            return self._segments.whole(x, self.xp.add)
        total = self.xp.sum(x, axis=-1, keepdims=True)
        return total if self._across is None else self._across(total, "sum")

    def length(self, like: Float[Array, "*tokens"]) -> Float[Array, "..."]:
        """Number of valid tokens of each sequence, in the dtype of an array; 1 where there is none."""
        length = self.total(self.xp.ones_like(like))
        return self.xp.where(length == 0.0, 1.0, length)

    def mean(self, x: Float[Array, "*tokens"]) -> Float[Array, "..."]:
        """Mean over the valid tokens of each sequence; 0 where there is none."""
        return self.total(x) / self.length(x)

    def total_of_all(self, x: Float[Array, "*tokens"]) -> Float[Array, ""]:
        """Sum over the valid tokens of all sequences."""
        total = self.xp.sum(self.xp.where(self.mask, x, 0.0))
        return total if self._across is None else self._across(total, "sum")

    def largest(self, x: Float[Array, "*tokens"]) -> Float[Array, "..."]:
        """The largest among the valid tokens of each sequence; −inf where there is none."""
        x = self.xp.where(self.mask, x, -self.xp.inf)
        if self._segments is not None:
            return self._segments.whole(x, self.xp.maximum)
        if x.shape[-1] == 0:
            largest = self.xp.sum(x, axis=-1, keepdims=True) - self.xp.inf
        else:
            largest = self.xp.max(x, axis=-1, keepdims=True)
        # a rank without a column takes part too, or the others would wait for it
        return largest if self._across is None else self._across(largest, "max")

    def quantile(self, x: Float[Array, "*tokens"], level: float) -> Float[Array, "..."]:
        """A quantile of the valid tokens of each sequence, between the nearest two in proportion; 0 where there is none."""
        self.need_whole_sequences()
        xp = self.xp
        if 0 in x.shape:
            return self.total(x)
        length = self.length(x)
        place = level * (length - 1.0)
        below = xp.floor(place)
        lower = xp.astype(below, xp.int32)
        upper = xp.astype(xp.where(below < length - 1.0, below + 1.0, below), xp.int32)
        # masked ones come last
        x = xp.where(self.mask, x, xp.inf)
        if self._segments is None:
            ordered = xp.sort(x, axis=-1)
            pair = (taken_along_rows(ordered, i, xp=xp) for i in (lower, upper))
        else:
            ordered, start = self._segments.sorted(x)
            pair = (xp.take(ordered, start + i) for i in (lower, upper))
        low, high = (xp.where(value == xp.inf, 0.0, value) for value in pair)
        return low + (place - below) * (high - low)

    def running_total(self, x: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
        """Sum over the valid tokens of each sequence up to each token, itself included."""
        self.need_whole_sequences()
        x = self.xp.where(self.mask, x, 0.0)
        return self._scanned(x, 0.0, lambda x, earlier, _: x + earlier)

    def smallest_before(self, x: Float[Array, "*tokens"], *, nothing: float) -> Float[Array, "*tokens"]:
        """The smallest among the valid tokens before each token; `nothing` where there is none."""
        self.need_whole_sequences()
        x = self.xp.where(self.mask, x, self.xp.inf)
        smallest = self._scanned(x, self.xp.inf, lambda x, earlier, _: self.xp.minimum(x, earlier), shift=1)
        return self.xp.where(smallest == self.xp.inf, nothing, smallest)

    def discounted_future(self, x: Float[Array, "*tokens"], discount: float) -> Float[Array, "*tokens"]:
        """Sum of x_k γ^(k − t) over the valid tokens k ≥ t of each sequence, where k − t counts all positions."""
        self.need_whole_sequences()
        x = self.xp.where(self.mask, x, 0.0)
        return self._scanned(x, 0.0, lambda x, later, distance: x + discount**distance * later, forward=False)

    def _scanned(
        self, x: Array, fill: float, step: Callable[[Array, Array, int], Array], *, shift: int = 0, forward: bool = True
    ) -> Array:
        """Each element combined with all before it (or after it) in its sequence, in as many steps as its length has bits."""
        if self._segments is not None:
            x = self._segments.ordered(x)
        x = self._moved(x, shift, fill, forward=forward) if shift else x
        for distance in distances(x.shape[-1]):
            x = step(x, self._moved(x, distance, fill, forward=forward), distance)
        return x if self._segments is None else self._segments.restored(x)

    def _moved(self, x: Array, distance: int, fill: float, *, forward: bool) -> Array:
        """The element that many places before (or after) in the same sequence; `fill` where there is none."""
        xp = self.xp
        if x.shape[-1] <= distance:
            return xp.full_like(x, fill)
        edge = xp.full_like(x[..., :distance], fill)
        kept = x[..., :-distance] if forward else x[..., distance:]
        if self._segments is not None:
            kept = xp.where(self._segments.same(distance), kept, fill)
        return xp.concat((edge, kept) if forward else (kept, edge), axis=-1)

    def need_whole_sequences(self) -> None:
        """Raise if ranks hold parts of sequences."""
        if self._across is not None:
            msg = "across: what depends on an order of the tokens needs the whole of each sequence on one rank"
            raise ValueError(msg)

    def first_of_each(self) -> Bool[Array, "..."]:
        """True at one element of each sequence that has a valid token, of the shape of `total`: to count sequences by."""
        if self._segments is None:
            return self.largest(self.xp.astype(self.mask, self.xp.float32)) > 0.0
        ones = self.xp.astype(self.mask, self.xp.float32)
        return self.mask & (self.running_total(ones) == 1)
