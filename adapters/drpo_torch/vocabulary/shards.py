"""A vocabulary in parts: those that a buffer holds one after the other, and those of the ranks that divide it.

Every rank of a vocabulary-parallel group runs the same functions on its own columns. What a token needs of all columns
(a maximum, a sum of exponentials, an entropy, the logits of a few ids) is gathered: a few numbers a token and rank, merged by
each rank in the order of the ranks, so that all have the same bits. What follows from them alone, such as which tokens
have a gradient, is then the same everywhere, and so are the collectives.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from drpo_torch._checks import check_logits
from drpo_torch._host import is_waited_for
from drpo_torch.vocabulary.engines import row_kernels
from drpo_torch.vocabulary.head import HeadInputs
from drpo_torch.vocabulary.most_probable import Candidates
from drpo_torch.vocabulary.recorded import check_head
from drpo_torch.vocabulary.row_map import check_vocabulary_size
from drpo_torch.vocabulary.softmax import Places, Pull, Softmaxes, Statistics, Wanted, within, working_dtype

if TYPE_CHECKING:
    from types import ModuleType

    from drpo_torch.vocabulary.softmax import Tempering

__all__ = ["Shard", "local_part", "part_pull", "shard_of_head", "shard_of_logits"]


class Shard:
    """The columns [start, start + width) of a vocabulary that this rank holds; all of them where there is no group."""

    def __init__(
        self,
        columns: int,
        group: dist.ProcessGroup | None,
        size: int | None,
        tokens: int,
        device: torch.device,
        name: str,
        ids: torch.Tensor | None = None,
    ) -> None:
        """Where this rank's columns start: one collective of three numbers a rank. Padding begins at the id `size`.

        `name` is that of the argument with the tokens, whose `ids` may be known. Of the rank's `columns`, the first `width`
        are no padding.
        """
        self.group, self.rank, self.columns = group, 0, columns
        widths = [columns]
        if group is not None:
            self.rank = dist.get_rank(group)
            numbers = torch.tensor([columns, tokens, 0], device=device)
            if ids is not None:
                # in another order they add up to something else
                numbers[2] = (ids * torch.arange(1, len(ids) + 1, device=device)).sum()
            widths, counts, sums = ([*of_ranks] for of_ranks in zip(*self.gathered(numbers).tolist(), strict=True))
            if len(set(counts)) > 1:
                msg = f"{name}: expected the same tokens on each rank of vocabulary_group, got {counts} tokens"
                raise ValueError(msg)
            if len(set(sums)) > 1:
                msg = (
                    "tokens: expected the same on each rank of the group that divides the vocabulary, got others; a DTensor "
                    "whose ranks have tokens of their own, such as a weight of FSDP, has to be gathered (full_tensor())"
                )
                raise ValueError(msg)
        self.start, self.all_columns, self.widest = sum(widths[: self.rank]), sum(widths), max(widths)
        if self.all_columns == 0:
            msg = f"{name}: expected a vocabulary of 1 or more over the ranks of vocabulary_group, got none"
            raise ValueError(msg)
        self.vocabulary = check_vocabulary_size(size, self.all_columns)
        self.width = min(max(0, self.vocabulary - self.start), columns)

    def of_whole(self, part: slice) -> slice:
        """The ids of some of this rank's columns."""
        return slice(self.start + part.start, self.start + part.stop)

    def narrowed(self, tempering: Tempering) -> Tempering:
        """The step of all columns as that of this rank's."""
        return tempering.part(self.of_whole(slice(0, self.width)))._replace(size=self.width)

    def gathered(self, mine: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, (ranks, …)."""
        every = torch.empty((dist.get_world_size(self.group), *mine.shape), dtype=mine.dtype, device=mine.device)
        # as many on each rank: none waits
        if mine.numel():
            dist.all_gather(list(every.unbind()), mine.contiguous(), group=self.group)
        return every

    def total(self, mine: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, of a few numbers a token, in their order; without a group the tensor itself."""
        return mine if self.group is None else self.gathered(mine).sum(0)

    def reduced_(self, mine: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        if self.group is not None and mine.numel():
            dist.all_reduce(mine, group=self.group)
        return mine

    def wanted(self, ids: torch.Tensor, part: slice | None = None) -> Wanted:
        """Ids of the vocabulary as what is wanted of some of this rank's columns, of all by default."""
        alone = part is None and self.width == self.vocabulary
        return Wanted(ids, self.start + (part.start if part else 0), math.nan if alone else -math.inf)

    def merged(self, mine: Softmaxes, rows: Places, ids: torch.Tensor) -> tuple[Softmaxes, torch.Tensor | None]:
        """The softmaxes over all ranks, and this rank's share of the probability, None for all of it: one collective.

        Of 2 + C numbers a token and rank for C ids, or 3 + C with entropies.
        """
        if self.group is None:
            return mine, None
        statistics = mine.statistics
        fields = [statistics.maximum, statistics.log_sum, *(() if statistics.entropy is None else (statistics.entropy,))]
        every = self.gathered(torch.cat((torch.stack(fields, -1), mine.log_prob), -1))
        of_ranks = []
        for part in every:
            of_rows = [*part[:, : len(fields)].unbind(-1), torch.ones_like(statistics.total)]
            found = Statistics.of(of_rows, entropy=statistics.entropy is not None)
            of_ranks.append(Softmaxes(found, found.maximum + found.log_sum, part[:, len(fields) :]))
        whole, shares = self.joined(of_ranks, rows, ids)
        return whole, None if shares is None else shares[self.rank]

    def joined(self, parts: list[Softmaxes], rows: Places, ids: torch.Tensor) -> tuple[Softmaxes, torch.Tensor | None]:
        """Softmaxes of rows from those of parts of their columns, and each part's share of the probability, (parts, rows).

        No shares of a single part.
        """
        if len(parts) == 1:
            return parts[0], None
        statistics, log_shares = _merged([part.statistics for part in parts])
        # of the part, then within it: each id is in one of them, and has −∞ from the others
        log_probs = torch.stack([part.log_prob for part in parts])
        nothing = log_shares == -torch.inf
        log_prob = (log_probs + log_shares[..., None]).masked_fill_(nothing[..., None], -torch.inf).amax(0)
        # an id that is nowhere
        log_prob = log_prob.masked_fill_((ids < 0) | (ids >= self.vocabulary), torch.nan)
        statistics = statistics.counted(rows)
        log_normalizer = statistics.maximum + statistics.log_sum
        return Softmaxes(statistics, log_normalizer, rows.counted(log_prob)), log_shares.exp()

    def with_most_probable(
        self, mine: Candidates, count: int, whole: Softmaxes, ids: torch.Tensor, rows: Places, tempering: Tempering
    ) -> tuple[Softmaxes, torch.Tensor]:
        """Softmaxes whose log-probs, and ids, (rows, C), go on with the most probable tokens of all ranks: one collective.

        Of `count` pairs of 8 bytes a token and rank.
        """
        first = mine
        if self.group is not None:
            padded = mine.padded(count, self.vocabulary)
            pairs = torch.stack((padded.z.double().view(torch.int64), padded.ids))
            z, every = (each.movedim(0, 1).flatten(1) for each in self.gathered(pairs).unbind(1))
            first = Candidates(z.view(torch.float64).to(mine.z.dtype), every).first(count)
        log_prob = rows.counted(whole.statistics.log_prob(tempering.of_columns(first.z, first.ids)))
        return whole._replace(log_prob=torch.cat((whole.log_prob, log_prob), -1)), torch.cat((ids, first.ids), -1)

    def softmax(self, x: torch.Tensor, whole: Statistics | None, step: slice, *, out: torch.Tensor) -> None:
        """The rank's part of the softmax of a few rows, from the normalisers of all of them."""
        if whole is None:
            torch.softmax(x, -1, out=out)
        else:
            out.copy_(whole.at(step).log_prob(x)).exp_()

    def gather(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The logits (…, K) of ids, from the ranks that hold them; differentiable."""
        if self.group is None:
            return logits.gather(-1, ids)
        index, inside = within(ids - self.start, slice(0, self.width))
        # of no columns a sum, so that the result has a graph on each rank
        mine = logits.gather(-1, index) if self.width else logits.sum(-1, keepdim=True).expand(ids.shape)
        found: torch.Tensor = _Total.apply(torch.where(inside, mine, 0.0), self)  # type: ignore[no-untyped-call]
        return found.masked_fill((ids < 0) | (ids >= self.vocabulary), torch.nan)

    def normalizers(
        self, module: ModuleType | None, z: torch.Tensor, places: Places, tempering: Tempering, dtype: torch.dtype
    ) -> Statistics:
        """Statistics of rows over all ranks, in the dtype of what is subtracted from, by a module's loops if they have it."""
        own = working_dtype(z.dtype) == dtype
        kernels = row_kernels(module if own else None, z.shape[-1], z.dtype if own else dtype, z.device)
        none = torch.empty((len(places), 0), dtype=torch.int64, device=z.device)
        found = kernels.softmaxes(z, places, tempering, self.wanted(none))
        fields = (None if field is None else field.to(dtype) for field in found.statistics)
        mine = Softmaxes(Statistics(*fields), found.log_normalizer, found.log_prob.to(dtype))  # type: ignore[arg-type]
        return self.merged(mine, places, none)[0].statistics

    def pull(self, pull: Pull, mine: Statistics, whole: Statistics, share: torch.Tensor | None) -> Pull:
        """The pull on this rank's columns, counted from its own start and maximum."""
        if share is None:
            return pull
        moves = pull.moves
        pull = part_pull(pull, self.of_whole(slice(0, self.width)), share, mine, whole.maximum)
        return pull.counted(Places.first(len(moves), moves.device, moves)) if is_waited_for(moves) else pull

    def clear_(self, gradient: torch.Tensor, rows: Places, pull: Pull, mine: Statistics) -> None:
        """0 in place of what row kernels do not write: at rows that are not here, and where nothing moves or exists.

        The pull is that on all ranks.
        """
        if is_waited_for(gradient):
            if self.group is not None:
                gradient.masked_fill_(self.without(mine)[:, None], 0.0)
            return
        # a dropped token's row may hold a NaN, which 0 does not silence
        without = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)
        without[rows.key] = ~pull.moves | self.without(mine)
        gradient.index_fill_(0, without.nonzero()[:, 0], 0.0)

    def without(self, mine: Statistics) -> torch.Tensor:
        """Rows in which this rank has no finite logit: their softmax is NaN, their gradient 0."""
        nothing = mine.maximum == -torch.inf
        return nothing if self.group is not None else torch.zeros_like(nothing)


class _Total(torch.autograd.Function):
    """The sum over the ranks, each of which has the same cotangent."""

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor, shard: Shard) -> torch.Tensor:  # noqa: ANN401, ARG004
        return shard.total(mine)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401, ARG004
        return cotangent, None


def _merged(parts: list[Statistics]) -> tuple[Statistics, torch.Tensor]:
    """The statistics of rows from those of parts of them, and the log of each part's share of the probability."""
    maxima = torch.stack([part.maximum for part in parts])
    nothing = maxima == -torch.inf
    log_sums = torch.stack([part.log_sum for part in parts]).masked_fill_(nothing, 0.0)
    maximum = maxima.amax(0)
    log_sum = torch.logsumexp(maxima - maximum + log_sums, 0)
    log_shares = maxima - maximum + log_sums - log_sum
    entropy = None
    if parts[0].entropy is not None:
        # chain rule: of the part, then within it
        entropies = torch.stack([part.entropy for part in parts])  # type: ignore[misc]
        entropy = (entropies - log_shares).mul_(log_shares.exp()).masked_fill_(nothing, 0.0).sum(0)
    return Statistics(maximum, log_sum, entropy, torch.ones_like(maximum)), log_shares


def part_pull(pull: Pull, part: slice, share: torch.Tensor, statistics: Statistics, maximum: torch.Tensor) -> Pull:
    """The pull on a part of the vocabulary, whose share of the probability and statistics are these."""
    index, inside = within(pull.columns, part)
    scale, slope = pull.of_softmax, pull.slope
    if slope is not None:
        # a part's logits are counted from its own maximum
        scale, slope = scale - slope * (statistics.maximum - maximum).nan_to_num(), slope * share
    return Pull(index, torch.where(inside, pull.at, 0.0), scale * share, slope, pull.everywhere)


def shard_of_logits(
    logits: Any,  # noqa: ANN401
    group: object,
    size: int | None,
    tokens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Shard]:
    """The logits (…, V) of this rank's part of the vocabulary, checked, and which part it is; tokens are the same on all."""
    logits, ranks = local_part("logits", logits, group, -1)
    check_logits(logits, may_be_empty=ranks is not None)
    count, ids = math.prod(logits.shape[:-1]), None if ranks is None else _counted_ids(tokens, mask, logits.device)
    return logits, Shard(logits.shape[-1], ranks, size, count, logits.device, "logits", ids)


def shard_of_head(
    hidden: torch.Tensor,
    weight: Any,  # noqa: ANN401
    bias: Any,  # noqa: ANN401
    group: object,
    size: int | None,
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[HeadInputs, Shard]:
    """Hidden states, and this rank's rows of the weight and the bias, checked, and which part of the vocabulary it is."""
    weight, ranks = local_part("weight", weight, group, 0)
    if bias is not None:
        bias, ranks = local_part("bias", bias, ranks, 0)
    check_head(hidden, weight, bias, may_be_empty=ranks is not None)
    count, ids = math.prod(hidden.shape[:-1]), None if ranks is None else _counted_ids(tokens, mask, hidden.device)
    shard = Shard(len(weight), ranks, size, count, hidden.device, "hidden", ids)
    return HeadInputs(hidden, weight, bias), shard


def _counted_ids(tokens: object, mask: object, device: torch.device) -> torch.Tensor | None:
    """Flat ids, 0 where the mask is False; None of what is going to be refused."""
    if not isinstance(tokens, torch.Tensor) or tokens.device != device or tokens.is_floating_point() or tokens.is_complex():
        return None
    if isinstance(mask, torch.Tensor) and mask.device == device and mask.dtype == torch.bool and mask.shape == tokens.shape:
        tokens = torch.where(mask, tokens, 0)
    return tokens.reshape(-1).to(torch.int64)


def local_part(name: str, tensor: Any, group: object, dim: int) -> tuple[Any, dist.ProcessGroup | None]:  # noqa: ANN401
    """The rank's part of a tensor that is divided along `dim`, and the ranks it is divided over, None for one.

    A DTensor knows its ranks; a plain tensor is such a part where a group is given.
    """
    if group is not None and group is dist.GroupMember.NON_GROUP_MEMBER:
        msg = f"vocabulary_group: expected a group that this process, rank {dist.get_rank()}, belongs to, got one it does not"
        raise ValueError(msg)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        msg = f"vocabulary_group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}"
        raise TypeError(msg)
    if not hasattr(tensor, "device_mesh"):
        return tensor, group
    placements, mesh = tensor.placements, tensor.device_mesh
    if len(placements) != 1 or not placements[0].is_shard(dim % tensor.ndim):
        msg = (
            f"{name}: expected a DTensor on a mesh of one dimension with the placement Shard({dim}), got {placements} on a "
            f"mesh of shape {tuple(mesh.shape)}"
        )
        raise ValueError(msg)
    of_mesh: dist.ProcessGroup = mesh.get_group()
    if group is not None and group is not of_mesh:
        msg = f"vocabulary_group: expected None or the mesh's own group with {name} a DTensor, got another group"
        raise ValueError(msg)
    return tensor.to_local(), of_mesh
