"""Softmax statistics and gradients of rows of logits by torch's operations, in buffers that stay in the cache.

`torch.softmax` is the fastest exponential there is on a CPU, and its largest value is 1 / Σ e^(x − max x): the
log-normaliser follows from it, so nothing is exponentiated twice.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from drpo_torch._host import is_waited_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from drpo_torch.vocabulary.support import SupportRows

__all__ = [
    "LARGEST_LOG_RATIO",
    "ArrayRows",
    "EmptyRows",
    "Everywhere",
    "Places",
    "Pull",
    "RowKernels",
    "Softmaxes",
    "Statistics",
    "Tempering",
    "Wanted",
    "Workspace",
    "power_of_two_below",
    "rows_at_once",
    "within",
    "working_dtype",
]

# e^60 is finite in float32, and a probability e^60 times smaller than its counterpart is as good as none
LARGEST_LOG_RATIO = 60.0
# what a logit this far below the largest adds underflows in any dtype; −inf times its probability 0 would be a NaN
_NEGLIGIBLE = -1000.0
_CPU_BYTES_PER_THREAD = 5 << 18
# of a device's memory: so much that the launches of a step take no time beside its work
_DEVICE_SHARE = 1 / 64


class Tempering(NamedTuple):
    """The step from the head's output z to the policy's logits: x = cap·tanh(z/cap) / T in the support, −inf elsewhere.

    The temperature is one number or one a row. Columns from `size` on are padding, which callers leave out.
    """

    temperature: float | torch.Tensor = 1.0
    softcap: float | None = None
    support: SupportRows | None = None
    size: int | None = None

    def at(self, rows: torch.Tensor | slice) -> Tempering:
        """The step of some of the rows."""
        if self.support is None and not isinstance(self.temperature, torch.Tensor):
            return self
        temperature = self.temperature[rows] if isinstance(self.temperature, torch.Tensor) else self.temperature
        return self._replace(temperature=temperature, support=None if self.support is None else self.support.at(rows))

    def part(self, columns: slice) -> Tempering:
        """The step of a part of the vocabulary."""
        return self if self.support is None else self._replace(support=self.support.part(columns))

    def __call__(self, z: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The logits x, in the working dtype or that of `out`; z itself if that is x already, else in `out` if given."""
        x = self._tempered(z, out)
        if self.support is None:
            return x
        return (x.clone() if x is z else x).masked_fill_(self.support.outside(), -torch.inf)

    def of_columns(self, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The logits x of some ids of the vocabulary, (rows, C), which need not be of this part, from their z."""
        x = self._tempered(z, None)
        return x if self.support is None else x.masked_fill(~self.support.holds(ids), -torch.inf)

    def pull_back_(self, gradient: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """∂/∂z from ∂/∂x, in place: times sech²(z/cap) = 4t/(1 + t)², t = e^(−2 abs(z)/cap); 0 outside the support."""
        if self.softcap is not None:
            # 1 − tanh² has lost its digits where the logit is some times the cap
            t = (z.to(gradient.dtype) / self.softcap).abs_().mul_(-2.0).exp_()
            gradient.mul_(t).mul_(4.0).div_(t.add_(1.0).square_())
        gradient = self._divided_(gradient)
        return gradient if self.support is None else gradient.masked_fill_(self.support.outside(), 0.0)

    def _tempered(self, z: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """The logits as if every id were in the support."""
        dtype = working_dtype(z.dtype) if out is None else out.dtype
        unit = not isinstance(self.temperature, torch.Tensor) and self.temperature == 1.0
        if unit and self.softcap is None and z.dtype == dtype:
            return z
        x = torch.empty_like(z, dtype=dtype) if out is None else out
        x.copy_(z)
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        return self._divided_(x)

    def _divided_(self, x: torch.Tensor) -> torch.Tensor:
        """Rows divided by their temperature, in place."""
        if isinstance(self.temperature, torch.Tensor):
            return x.div_(self.temperature[:, None].to(x.dtype))
        return x.div_(self.temperature) if self.temperature != 1.0 else x


class Statistics(NamedTuple):
    """Per row of x, in the working dtype: max x, log Σ e^(x − max x), and the entropy in nats, where it was asked for.

    `total` is the sum of what a kernel divides its exponentials by, or of the softmax that it left.
    """

    maximum: torch.Tensor
    log_sum: torch.Tensor
    entropy: torch.Tensor | None
    total: torch.Tensor

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """The log-probs x − log Σ e^x of columns (rows, …), without rounding to the size of the logits."""
        extra = (1,) * (x.ndim - 1)
        # two tanh of one argument may differ in their last bit
        return (x - self.maximum.reshape(-1, *extra)).clamp_(max=0.0) - self.log_sum.reshape(-1, *extra)

    def at(self, rows: torch.Tensor | slice) -> Statistics:
        """The statistics of some of the rows."""
        return Statistics(*(None if field is None else field[rows] for field in self))  # type: ignore[arg-type]

    def counted(self, rows: Places) -> Statistics:
        """The statistics, 0 at rows that do not count."""
        if rows.valid is None:
            return self
        return Statistics(*(None if field is None else rows.counted(field) for field in self))  # type: ignore[arg-type]

    @classmethod
    def joined(cls, parts: Sequence[Statistics]) -> Statistics:
        """The statistics of several lots of rows, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(None if fields[0] is None else torch.cat(fields) for fields in zip(*parts, strict=True)))  # type: ignore[arg-type]

    @classmethod
    def of(cls, fields: Sequence[torch.Tensor], *, entropy: bool) -> Statistics:
        """The statistics from those of their fields that are not None."""
        maximum, log_sum, *rest = fields
        return cls(maximum, log_sum, rest[0] if entropy else None, rest[-1])


class Wanted(NamedTuple):
    """Ids of the vocabulary, (rows, C), whose log-probs are wanted of columns that begin at the id `start`.

    `elsewhere` is the log-prob of an id that is none of these columns: NaN if there are no others, else −∞.
    """

    ids: torch.Tensor
    start: int = 0
    elsewhere: float = math.nan

    def logits(self, z: torch.Tensor, places: Places, tempering: Tempering) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logits x of the ids, and which of them are columns of z: None if all are. Of the others, some logits."""
        index, inside = self.ids, None
        # on the host alone, ids have been checked
        if self.start or not math.isnan(self.elsewhere) or is_waited_for(z):
            index, inside = within(index, slice(self.start, self.start + z.shape[-1]))
        key = places.key
        stored = z[key].gather(-1, index) if isinstance(key, slice) else z[places.index[:, None], index]
        return tempering.of_columns(stored, index + self.start), inside


class Softmaxes(NamedTuple):
    """What one pass learns of the softmaxes of rows: statistics, log Σ e^x, and log-probs of the ids wanted, (rows, C).

    At rows that do not count everything is 0.
    """

    statistics: Statistics
    log_normalizer: torch.Tensor
    log_prob: torch.Tensor

    @classmethod
    def of(
        cls, statistics: Statistics, places: Places, wanted: Wanted, logits: tuple[torch.Tensor, torch.Tensor | None]
    ) -> Softmaxes:
        """From the statistics of rows and `Wanted.logits`."""
        x, inside = logits
        log_prob = statistics.log_prob(x)
        if inside is not None:
            log_prob = torch.where(inside, log_prob, wanted.elsewhere)
        statistics = statistics.counted(places)
        return cls(statistics, statistics.maximum + statistics.log_sum, places.counted(log_prob))

    @classmethod
    def joined(cls, parts: Sequence[Softmaxes]) -> Softmaxes:
        """Those of several lots of rows, one after the other."""
        if len(parts) == 1:
            return parts[0]
        statistics, log_normalizers, log_probs = zip(*parts, strict=True)
        return cls(Statistics.joined(statistics), torch.cat(log_normalizers), torch.cat(log_probs))


class Everywhere(Protocol):
    """Derivatives at all columns of some rows, which are formed a few rows at a time."""

    @property
    def moves(self) -> torch.Tensor:
        """The rows that may have any."""
        ...

    @property
    def size(self) -> torch.Tensor:
        """A bound of their sum of absolute values, a row."""
        ...

    def of(self, step: slice, log_prob: torch.Tensor) -> torch.Tensor:
        """Those of a few neighbouring rows, by their number among these and their log-probs (rows, V)."""
        ...

    def at_rows(self, rows: torch.Tensor | slice) -> Everywhere:
        """Those of some of the rows."""
        ...

    def scaled(self, factor: torch.Tensor) -> Everywhere:
        """Those times a factor a row."""
        ...


class Pull(NamedTuple):
    """∂/∂x of a function of softmaxes, p (scale − slope (x − max x)) + `at` some columns; an entry or (columns) C a row.

    Without a `scale` it is −Σ `at`, as it is of log-probs: ∂log p(c)/∂x = 1[c] − p. `everywhere` adds derivatives at all
    columns. What it is at rows that do not count is of no influence.
    """

    columns: torch.Tensor
    at: torch.Tensor
    scale: torch.Tensor | None = None
    slope: torch.Tensor | None = None
    everywhere: Everywhere | None = None

    @property
    def of_softmax(self) -> torch.Tensor:
        """The scale."""
        return -self.at.sum(-1) if self.scale is None else self.scale

    def counted(self, rows: Places) -> Pull:
        """The pull, 0 at rows that do not count; what there is everywhere is so already."""
        if rows.valid is None:
            return self
        scale, slope = (None if field is None else rows.counted(field) for field in (self.scale, self.slope))
        return self._replace(at=rows.counted(self.at), scale=scale, slope=slope)

    @property
    def moves(self) -> torch.Tensor:
        """The rows where it is not 0."""
        moves = (self.at != 0.0).any(-1)
        moves = moves if self.scale is None else moves | (self.scale != 0.0)
        moves = moves if self.slope is None else moves | (self.slope != 0.0)
        return moves if self.everywhere is None else moves | self.everywhere.moves

    def size(self, vocabulary: int) -> torch.Tensor:
        """A bound of the largest of a row's derivatives, and of half of what they add up to."""
        # half of what those at columns and of the softmax add up to; Σ p (max x − x) is an entropy less a log-sum
        of_softmax = self.of_softmax.abs()
        if self.slope is not None:
            of_softmax = of_softmax + self.slope.abs() * math.log(max(1, vocabulary))
        if self.columns.shape[1] == 1 and self.slope is None and self.everywhere is None:
            return torch.maximum(self.at.abs()[:, 0], of_softmax)
        size = self.at.abs().sum(-1) + of_softmax
        return size if self.everywhere is None else size + self.everywhere.size

    def with_entropy(self, cotangent: torch.Tensor, log_sum: torch.Tensor, entropy: torch.Tensor) -> Pull:
        """The pull with that of the entropies, ∂H/∂x = −π (log π + H), times a cotangent a row."""
        return self._replace(scale=self.of_softmax + cotangent * (log_sum - entropy), slope=cotangent)

    def at_rows(self, rows: torch.Tensor | slice) -> Pull:
        """The pull of some of the rows."""
        scale, slope = (None if field is None else field[rows] for field in (self.scale, self.slope))
        everywhere = None if self.everywhere is None else self.everywhere.at_rows(rows)
        return Pull(self.columns[rows], self.at[rows], scale, slope, everywhere)

    def scaled(self, factor: torch.Tensor) -> Pull:
        """The pull times a factor a row."""
        scale, slope = (None if field is None else field * factor for field in (self.scale, self.slope))
        everywhere = None if self.everywhere is None else self.everywhere.scaled(factor)
        return Pull(self.columns, self.at * factor[:, None], scale, slope, everywhere)


class Places:
    """Increasing indices of rows; those of neighbours become slices, which copy nothing.

    Where the host would wait to learn at which rows a condition holds, all rows are here, and `valid` says which of them
    count; elsewhere it is None. What the others hold may be anything, and their gradient is 0.
    """

    def __init__(
        self,
        on_host: NDArray[np.int64],
        device: torch.device,
        valid: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
    ) -> None:
        self.on_host, self.device, self._index = on_host, device, index
        # as kernels read it
        self.valid = None if valid is None else valid.contiguous()

    @classmethod
    def first(cls, count: int, device: torch.device, valid: torch.Tensor | None = None) -> Places:
        """The rows 0, 1, … count − 1."""
        return cls(np.arange(count), device, valid)

    @classmethod
    def where(cls, condition: torch.Tensor, *, at_any_cost: bool = False) -> Places:
        """The rows at which a 1-D condition holds; `at_any_cost`: no others, even if the host has to wait."""
        if is_waited_for(condition) and not at_any_cost:
            return cls.first(len(condition), condition.device, condition)
        some = condition.nonzero()[:, 0]
        return cls(some.cpu().numpy(), some.device, index=some)

    def where_also(self, condition: torch.Tensor) -> tuple[Places, torch.Tensor | slice]:
        """Those of the rows at which a condition on them holds, and their numbers among these."""
        if is_waited_for(condition):
            valid = condition if self.valid is None else self.valid & condition
            return Places(self.on_host, self.device, valid, self._index), slice(0, len(self))
        some = condition.nonzero()[:, 0]
        return Places(self.on_host[some.numpy()], self.device, index=self.index[some]), some

    def joined(self, others: Sequence[Places]) -> Places:
        """These rows and then the others."""
        every = (self, *others)
        valid = None if self.valid is None else torch.cat([each.valid for each in every if each.valid is not None])
        return Places(np.concatenate([each.on_host for each in every]), self.device, valid)

    def numbered(self) -> Places:
        """The numbers of these rows among them: 0, 1, …, of which the same count."""
        return Places.first(len(self), self.device, self.valid)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.on_host)

    def __getitem__(self, step: slice) -> Places:
        """Some of the rows, by their number among these."""
        valid, index = (None if tensor is None else tensor[step] for tensor in (self.valid, self._index))
        return Places(self.on_host[step], self.device, valid, index)

    @property
    def index(self) -> torch.Tensor:
        """The indices, int64."""
        if self._index is None:
            self._index = torch.from_numpy(self.on_host).to(self.device)
        return self._index

    @property
    def key(self) -> slice | torch.Tensor:
        """The index that selects these rows of an array."""
        if len(self) == 0:
            return slice(0, 0)
        first, last = int(self.on_host[0]), int(self.on_host[-1])
        return slice(first, last + 1) if last - first + 1 == len(self) else self.index

    def chunks(self, size: int) -> Iterator[Places]:
        """The same rows, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def counted(self, values: torch.Tensor, otherwise: float = 0.0) -> torch.Tensor:
        """Values (rows, …), replaced where a row does not count."""
        if self.valid is None:
            return values
        return torch.where(self.valid.reshape(-1, *(1,) * (values.ndim - 1)), values, otherwise)

    def spread(self, values: torch.Tensor, count: int) -> torch.Tensor:
        """The values at these rows of `count`, and 0 at the others; the values themselves if there are no others."""
        if len(self) == count:
            return values
        zeros = torch.zeros((count, *values.shape[1:]), dtype=values.dtype, device=values.device)
        return zeros.index_copy_(0, self.index, values)


class Workspace:
    """Two buffers of a few rows, for x and its softmax: of no more rows than there are."""

    def __init__(self, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = rows_at_once(vocabulary, dtype, device)
        self.buffers = torch.empty((2, 0, vocabulary), dtype=dtype, device=device)
        self._stored: torch.Tensor | None = None

    def take(self, matrix: torch.Tensor, key: slice | torch.Tensor) -> torch.Tensor:
        """Rows of a matrix: a view if they are neighbours, else copies in a buffer of their dtype, for one step."""
        if isinstance(key, slice):
            return matrix[key]
        if self._stored is None or len(self._stored) < len(key):
            self._stored = torch.empty(self.buffers.shape[1:], dtype=matrix.dtype, device=self.buffers.device)
        return torch.index_select(matrix, 0, key, out=self._stored[: len(key)])

    def steps(self, count: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Slices that cover `count` rows, each with buffers of its shape."""
        rows = min(self.rows, count)
        if self.buffers.shape[1] < rows:
            self.buffers = self.buffers.new_empty((2, rows, self.buffers.shape[-1]))
        x, p = self.buffers
        for start in range(0, count, self.rows):
            step = slice(start, min(start + self.rows, count))
            yield step, x[: step.stop - start], p[: step.stop - start]


class RowKernels(Protocol):
    """Softmaxes of rows, and gradients through them: all the work that grows with the vocabulary.

    `places` says which rows of the logits z (…, V), and of `out` or `keep`. Everything else, the tempering too, has one entry
    a row of these.
    """

    keeps: bool
    """True if `softmaxes` can leave the softmax itself in `keep`, for `gradients` to start from."""

    def softmaxes(
        self,
        z: torch.Tensor,
        places: Places,
        tempering: Tempering,
        wanted: Wanted,
        *,
        entropy: bool = False,
        keep: torch.Tensor | None = None,
    ) -> Softmaxes:
        """What is learnt of the softmax of each row; the softmax itself goes to `keep`, which may be z."""
        ...

    def gradients(
        self,
        z: torch.Tensor,
        places: Places,
        tempering: Tempering,
        pull: Pull,
        *,
        statistics: Statistics,
        out: torch.Tensor,
        kept: bool = False,
    ) -> None:
        """∂/∂z to the rows of `out`, which may be z; with `kept`, `out` holds what `softmaxes` has left there.

        Rows that do not count, or where `pull` is 0, become 0. On the host's own memory they may become NaN if what they hold
        is not finite: it leaves such rows out before. `kept` excludes a pull everywhere. The columns of the pull are those of
        z; one outside them is nowhere, or at a row that does not count.
        """
        ...


class ArrayRows:
    """`RowKernels` by torch's operations, on any device."""

    keeps = True

    def __init__(self, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        self.work = Workspace(vocabulary, working_dtype(dtype), device)

    def softmaxes(
        self,
        z: torch.Tensor,
        places: Places,
        tempering: Tempering,
        wanted: Wanted,
        *,
        entropy: bool = False,
        keep: torch.Tensor | None = None,
    ) -> Softmaxes:
        """See `RowKernels`."""
        # before a softmax takes the place of the logits
        logits = wanted.logits(z, places, tempering)
        count, like = len(places), self.work.buffers
        maxima, log_sums, totals = (torch.empty(count, dtype=like.dtype, device=like.device) for _ in range(3))
        entropies = torch.empty_like(maxima) if entropy else None
        for step, buffer, p_buffer in self.work.steps(count):
            key = places[step].key
            x = tempering.at(step)(self.work.take(z, key), buffer)
            maximum = x.amax(-1, keepdim=True)
            if entropy:
                x = torch.sub(x, maximum, out=buffer)
            p = torch.softmax(x, -1, out=keep[key] if keep is not None and isinstance(key, slice) else p_buffer)
            if keep is not None and not isinstance(key, slice):
                keep.index_copy_(0, key, p)
            # torch adds up the exponentials one after the other: of 10⁵ of them the sum is off by 10⁻⁵, but this one is not
            total = p.sum(-1)
            log_sum = (total / p.amax(-1)).log_()
            maxima[step], log_sums[step], totals[step] = maximum[:, 0], log_sum, total
            if entropies is not None:
                torch.sub(log_sum, self._mean(p, x, buffer).div_(total), out=entropies[step])
        return Softmaxes.of(Statistics(maxima, log_sums, entropies, totals), places, wanted, logits)

    def gradients(
        self,
        z: torch.Tensor,
        places: Places,
        tempering: Tempering,
        pull: Pull,
        *,
        statistics: Statistics,
        out: torch.Tensor,
        kept: bool = False,
    ) -> None:
        """See `RowKernels`."""
        scale, columns = pull.of_softmax, places.counted(pull.columns, 0)
        scale = scale / statistics.total if kept else scale
        moves = places.counted(pull.moves, otherwise=False) if is_waited_for(z) else None
        for step, buffer, p_buffer in self.work.steps(len(places)):
            key, of_step = places[step].key, tempering.at(step)
            if kept:
                p = self.work.take(out, key).mul_(scale[step, None])
            else:
                stored = self.work.take(z, key)
                x = of_step(stored, buffer)
                # before x gives way to what the slope makes of it
                everywhere = None if pull.everywhere is None else pull.everywhere.of(step, statistics.at(step).log_prob(x))
                p = torch.softmax(x, -1, out=p_buffer)
                total = p.sum(-1, keepdim=True)
                if pull.slope is None:
                    p.mul_(scale[step, None] / total)
                else:
                    x = torch.sub(x, x.amax(-1, keepdim=True), out=buffer).clamp_(min=_NEGLIGIBLE)
                    p.mul_(x.mul_(-pull.slope[step, None] / total).add_(scale[step, None] / total))
                if everywhere is not None:
                    p.add_(everywhere)
            p.scatter_add_(-1, columns[step], pull.at[step])
            of_step.pull_back_(p, p if kept else stored)
            if moves is not None:
                # 0 does not silence a NaN
                p.masked_fill_(~moves[step, None], 0.0)
            if not isinstance(key, slice):
                out.index_copy_(0, key, p.to(out.dtype))
            elif not kept:
                out[key].copy_(p)

    @staticmethod
    def _mean(p: torch.Tensor, x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """Σ p x of each row, where 0 · −inf is 0."""
        if is_waited_for(x):
            return torch.mul(p, x.clamp_(min=_NEGLIGIBLE), out=buffer).sum(-1)
        terms = torch.mul(p, x, out=buffer)
        mean = terms.sum(-1)
        # on the CPU it costs less to look; a row that holds a NaN has one in its log_sum too
        return terms.nan_to_num_(nan=0.0).sum(-1) if mean.isnan().any() else mean


class EmptyRows:
    """`RowKernels` of rows without a column: the part of a vocabulary that a rank without any holds."""

    keeps = False

    def softmaxes(
        self,
        z: torch.Tensor,
        places: Places,
        tempering: Tempering,
        wanted: Wanted,
        *,
        entropy: bool = False,
        keep: torch.Tensor | None = None,
    ) -> Softmaxes:
        """See `RowKernels`."""
        del tempering, keep
        nothing = torch.full((len(places),), -torch.inf, dtype=working_dtype(z.dtype), device=z.device)
        zeros = torch.zeros_like(nothing)
        statistics = Statistics(nothing, zeros, zeros if entropy else None, torch.ones_like(nothing))
        return Softmaxes(
            statistics, nothing, torch.full(wanted.ids.shape, wanted.elsewhere, dtype=nothing.dtype, device=z.device)
        )

    def gradients(
        self,
        z: torch.Tensor,
        places: Places,
        tempering: Tempering,
        pull: Pull,
        *,
        statistics: Statistics,
        out: torch.Tensor,
        kept: bool = False,
    ) -> None:
        """See `RowKernels`."""
        del z, places, tempering, pull, statistics, out, kept


@cache
def _device_bytes(device: torch.device) -> int:
    """How much of a device's memory is worked in at a time."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 16 << 30
    return int(_DEVICE_SHARE * total)


def rows_at_once(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of so many numbers are worked on at a time."""
    budget = _device_bytes(device) if is_waited_for(device) else _CPU_BYTES_PER_THREAD * torch.get_num_threads()
    return max(1, budget // max(1, vocabulary * dtype.itemsize))


def within(columns: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids counted from the start of a part of the vocabulary, clamped to it, and whether they are in it."""
    size = part.stop - part.start
    index = columns - part.start
    return index.clamp(0, max(0, size - 1)), (index >= 0) & (index < size)


def power_of_two_below(limit: int, bound: torch.Tensor) -> torch.Tensor:
    """Powers of two s, about the largest, with s · bound ≤ 2^limit; float32. Of bounds below 2^−100, those of that."""
    _, exponent = torch.frexp(bound)
    # put together from bits: torch.ldexp computes in the default dtype, and exp2 rounds
    return ((limit - exponent.clamp(-100, 128) + 127) << 23).view(torch.float32)


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if one of them is, float32 otherwise."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
