"""Supports of truncated sampling: the ids over which a policy is renormalised, a set per token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from drpo_torch._checks import check_shape, check_tensor, looks_at_values
from drpo_torch._host import is_waited_for

__all__ = ["Support", "SupportRows"]

# how many entries of a mask are packed at a time
_MASK_ENTRIES = 1 << 24
_BITS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Support:
    """The support S of each token's policy, π_S(v) = π(v) / Σ_{u∈S} π(u) for v in S, else 0.

    Top-p, top-k and min-p sampling draw from μ_S, whose log-probs a rollout engine records. log π has to be that of π_S
    then, or the expectation of the ratio is not 1 but the mass that π gives to S.

    Token i, in row-major order, has the support ``ids[offsets[i]:offsets[i + 1]]``. An empty one says that none was recorded:
    the whole vocabulary. An id that comes twice counts once. Ids of masked tokens may be anything.

    Parameters
    ----------
    ids
        The supports one after the other, (S,), of any integral dtype, in any order within a token's.
    offsets
        Where each begins, and the end of the last: (N + 1,) for N tokens, from 0 to S, never decreasing. int64 from 2³¹ ids.
    bits
        Instead of these, a bit for each id, from `from_bits`.

    Raises
    ------
    TypeError
        If a dtype is wrong, or neither `ids` with `offsets` nor `bits` are given.
    ValueError
        If a shape is wrong, or (on the CPU) the offsets decrease or do not go from 0 to S.

    References
    ----------
    Keep Sampling Mask, arXiv:2512.02556, section 3.1; ids and offsets as in vLLM's ``SamplingMask`` (vllm-project/vllm
    #49577).

    Examples
    --------
    Of two tokens, the first was sampled from {0, 2}; of the second, nothing was recorded:

    >>> import torch
    >>> from drpo_torch import Support, token_log_prob
    >>> logits = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]).log()
    >>> support = Support(torch.tensor([2, 0]), torch.tensor([0, 2, 2]))
    >>> token_log_prob(logits=logits, tokens=torch.tensor([0, 0]), support=support).log_prob.exp()
    tensor([0.7143, 0.5000])
    """

    ids: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    bits: torch.Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check what can be checked without the tokens."""
        if self.bits is not None:
            if self.ids is not None or self.offsets is not None:
                msg = "bits: expected None beside ids and offsets, got a tensor"
                raise TypeError(msg)
            bits = check_tensor("bits", self.bits, "integral")
            if bits.dtype != torch.int32:
                msg = f"bits: expected int32, got {bits.dtype}"
                raise TypeError(msg)
            if bits.ndim == 0:
                msg = "bits: expected shape (…, ⌈V/32⌉), got ()"
                raise ValueError(msg)
            return
        ids = check_tensor("ids", self.ids, "integral")
        offsets = check_tensor("offsets", self.offsets, "integral", beside=ids)
        check_shape("ids", ids, (ids.numel(),), "a flat list, (S,)")
        check_shape("offsets", offsets, (offsets.numel(),), "a flat list, (N + 1,)")
        if not len(offsets):
            msg = "offsets: expected shape (N + 1,), got (0,)"
            raise ValueError(msg)
        if looks_at_values(offsets):
            offsets = offsets.to(torch.int64)
            first, last = int(offsets[0]), int(offsets[-1])
            if (first, last) != (0, len(ids)):
                msg = f"offsets: expected to go from 0 to {len(ids)}, the number of ids, got {first} to {last}"
                raise ValueError(msg)
            steps = offsets.diff()
            if bool((steps < 0).any()):
                at = int((steps < 0).nonzero()[0, 0])
                pair = f"{int(offsets[at])} and then {int(offsets[at + 1])} at index ({at},)"
                msg = f"offsets: expected offsets that never decrease, got {pair}"
                raise ValueError(msg)

    @classmethod
    def from_bits(cls, bits: torch.Tensor) -> Support:
        """The ids whose bit is set, kept as bits: bit v mod 32 of word ⌊v/32⌋ for id v, the least significant first.

        Parameters
        ----------
        bits
            int32, (…, ⌈V/32⌉), the layout of xgrammar's token bitmask (mlc-ai/xgrammar, ``allocate_token_bitmask``). No bit
            set: the whole vocabulary. Bits from V on may be anything.

        Examples
        --------
        >>> import torch
        >>> from drpo_torch import Support
        >>> support = Support.from_bits(torch.tensor([[0b101], [0b0]], dtype=torch.int32))
        """
        return cls(bits=bits)

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> Support:
        """The ids at which a mask is True, packed into bits.

        Parameters
        ----------
        mask
            Boolean, (…, V). A row without True: the whole vocabulary.

        Examples
        --------
        >>> import torch
        >>> from drpo_torch import Support
        >>> Support.from_mask(torch.tensor([[True, False, True]])).bits
        tensor([[5]], dtype=torch.int32)
        """
        check_tensor("mask", mask, "bool")
        if mask.ndim == 0 or mask.shape[-1] == 0:
            msg = f"mask: expected shape (…, V) with V of 1 or more, got {tuple(mask.shape)}"
            raise ValueError(msg)
        vocabulary = mask.shape[-1]
        words = -(-vocabulary // _BITS)
        flat = mask.reshape(-1, vocabulary)
        bits = torch.empty((len(flat), words), dtype=torch.int32, device=mask.device)
        powers = torch.arange(_BITS, dtype=torch.int32, device=mask.device)
        step = max(1, _MASK_ENTRIES // vocabulary)
        for start in range(0, len(flat), step):
            rows = torch.nn.functional.pad(flat[start : start + step], (0, words * _BITS - vocabulary))
            each = rows.reshape(-1, words, _BITS).to(torch.int32).bitwise_left_shift_(powers)
            torch.sum(each, -1, dtype=torch.int32, out=bits[start : start + step])
        return cls(bits=bits.reshape(*mask.shape[:-1], words))


class SupportRows(NamedTuple):
    """The supports of some rows over some columns of the vocabulary, unpacked for a few rows at a time.

    `rows` are the numbers of the tokens, `whole` says which have no support of their own. Ids are kept as increasing `keys`,
    token · vocabulary + id, or as `words` of bits, one row a token.
    """

    rows: torch.Tensor
    whole: torch.Tensor
    keys: torch.Tensor
    words: torch.Tensor | None
    vocabulary: int
    columns: slice

    @classmethod
    def of(cls, support: Support, vocabulary: int, valid: torch.Tensor) -> SupportRows:
        """The supports of all tokens, of which those that are valid will be looked at."""
        rows = torch.arange(len(valid), device=valid.device)
        none = rows[:0]
        if support.bits is not None:
            words = support.bits.reshape(len(valid), support.bits.shape[-1])
            filled, rest = divmod(vocabulary, _BITS)
            some = (words[:, :filled] != 0).any(-1)
            if rest:
                some |= (words[:, filled] & ((1 << rest) - 1)) != 0
            return cls(rows, ~some, none, words, vocabulary, slice(0, vocabulary))
        assert support.ids is not None
        assert support.offsets is not None
        lengths = support.offsets.to(torch.int64).diff()
        token = torch.repeat_interleave(rows, lengths, output_size=len(support.ids))
        # of masked tokens anything
        known = valid[token].logical_and_(support.ids >= 0).logical_and_(support.ids < vocabulary)
        keys = token.mul_(vocabulary).add_(support.ids)
        if is_waited_for(keys):
            # how many ids of a row there are in some columns, the host would have to ask; of bits it knows
            words = _words(torch.where(known, keys, len(valid) * vocabulary), len(valid), vocabulary)
            return cls(rows, lengths == 0, none, words, vocabulary, slice(0, vocabulary))
        keys = keys if bool(known.all()) else keys[known]
        if bool((keys[1:] <= keys[:-1]).any()):
            keys = keys.unique()  # type: ignore[no-untyped-call]
        return cls(rows, lengths == 0, keys, None, vocabulary, slice(0, vocabulary))

    def at(self, rows: torch.Tensor | slice) -> SupportRows:
        """Those of some of the rows."""
        return self._replace(rows=self.rows[rows], whole=self.whole[rows])

    def part(self, columns: slice) -> SupportRows:
        """The same over a part of the vocabulary."""
        return self._replace(columns=columns)

    @property
    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the keys of each row's ids among these columns begin and end."""
        first = self.rows * self.vocabulary
        low = torch.searchsorted(self.keys, first + self.columns.start)
        return low, torch.searchsorted(self.keys, first + self.columns.stop)

    def holds(self, ids: torch.Tensor) -> torch.Tensor:
        """Whether ids of the vocabulary, (rows, C), are in the row's support."""
        if self.words is not None:
            words = self.words[self.rows[:, None], ids >> 5]
            return (words.bitwise_right_shift(ids & 31) & 1).bool() | self.whole[:, None]
        if not len(self.keys):
            return self.whole[:, None].expand_as(ids)
        wanted = (self.rows[:, None] * self.vocabulary + ids).contiguous()  # or torch warns of the copy it makes
        at = torch.searchsorted(self.keys, wanted).clamp_(max=len(self.keys) - 1)
        return (self.keys[at] == wanted) | self.whole[:, None]

    def outside(self) -> torch.Tensor:
        """True at the columns, (rows, columns), that are outside the row's support: of a few rows."""
        start, stop = self.columns.start, self.columns.stop
        if self.words is not None:
            first, last = start // _BITS, -(-stop // _BITS)
            words, shifts = self.words[:, first:last], torch.arange(_BITS, dtype=torch.int32, device=self.rows.device)
            bits = words[self.rows][..., None].bitwise_right_shift(shifts).bitwise_and_(1)
            outside = (bits == 0).flatten(1)[:, start - first * _BITS : stop - first * _BITS]
            return outside.logical_and_(~self.whole[:, None])
        low, high = self.ends
        lengths = high - low
        outside = (~self.whole)[:, None].repeat(1, stop - start)
        row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        skipped = low - (lengths.cumsum(0) - lengths)
        keys = self.keys[torch.arange(len(row), device=row.device) + skipped[row]]
        outside[row, keys - self.rows[row] * self.vocabulary - start] = False
        return outside


def _words(keys: torch.Tensor, rows: int, vocabulary: int) -> torch.Tensor:
    """Keys row · V + id as the bits of each row, (rows, ⌈V/32⌉); keys of a row more are of nothing, and one may come twice."""
    width = -(-vocabulary // _BITS)
    keys = keys.sort().values
    row, column = keys // vocabulary, keys % vocabulary
    again = torch.cat((torch.zeros_like(keys[:1], dtype=torch.bool), keys[1:] == keys[:-1]))
    bit = torch.where(again, 0, torch.ones_like(keys).bitwise_left_shift(column % _BITS)).to(torch.int32)
    words = torch.zeros((rows + 1) * width, dtype=torch.int32, device=keys.device)
    # each bit is added once, so that the sum is their union
    return words.index_add_(0, row * width + column // _BITS, bit).reshape(rows + 1, width)[:rows]
