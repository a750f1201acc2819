"""The tokens of a vocabulary-scale policy loss: checked, flat, and what is learnt of them chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from drpo_core import UntraceableError
from drpo_core.centering import check_centred
from drpo_core.engines.trace import Trace
from drpo_core.loss import policy_pass, reduction_of
from drpo_core.modes.mode import Mode, Resolved, check_others, resolve
from drpo_core.objectives import is_known
from drpo_core.objectives.protocol import check_objective
from drpo_core.reduction import reduction_coefficients
from drpo_torch._checks import check_ids, check_shape, check_tensor, check_top_k_ids, check_untransformed
from drpo_torch.engines import Batch, run_pass
from drpo_torch.engines._namespace import namespace
from drpo_torch.vocabulary.behavior import BehaviorLogits
from drpo_torch.vocabulary.centering import CenteredRows, FullTerm, Measured, top_k_terms
from drpo_torch.vocabulary.divergences import TopK, full_divergence_rows, top_k_rows
from drpo_torch.vocabulary.recorded import (
    FullCentering,
    FullDivergence,
    LinearHead,
    TopKCentering,
    TopKDivergence,
    product_dtype,
    products_like,
)
from drpo_torch.vocabulary.row_map import check_row_temperature, row_map
from drpo_torch.vocabulary.softmax import Places, Pull, working_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.loss import Engine, PolicyLoss
    from drpo_core.reduction import Reduction
    from drpo_torch.vocabulary.recorded import Centering, Divergence
    from drpo_torch.vocabulary.shards import Shard
    from drpo_torch.vocabulary.softmax import Softmaxes, Tempering
    from drpo_torch.vocabulary.support import Support

__all__ = ["Arguments", "Found", "TokenBatch", "VocabularyLoss", "looks_at_one_token"]


class VocabularyLoss(NamedTuple):
    """A scalar `loss` to call `backward` on; detached: `diagnostics`, and per token `log_prob` and `entropy` (nats).

    The per-token figures are 0 at masked tokens. `diagnostics` and `entropy` are None where they were not asked for.
    """

    loss: torch.Tensor
    diagnostics: Diagnostics | None
    log_prob: torch.Tensor
    entropy: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Arguments:
    """Arguments that the losses from logits and from the LM head have in common, as the caller gave them."""

    objective: Objective
    tokens: torch.Tensor
    behavior_log_prob: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    proximal_log_prob: torch.Tensor | None
    reference_log_prob: torch.Tensor | None
    reduction: Reduction | None
    normalizer: float | torch.Tensor | None
    token_weights: torch.Tensor | None
    segment_ids: torch.Tensor | None
    divergence: Divergence | None
    centering: Centering | None
    temperature: float | torch.Tensor
    support: Support | None
    vocabulary_size: int | None
    diagnostics: bool
    entropy: bool
    entropy_coefficient: float
    engine: Engine

    def check(self, leading: Sequence[int], shard: Shard, beside: torch.Tensor, softcap: float | None = None) -> Tempering:
        """The step to the policy's logits.

        Raises unless everything fits tokens of this shape, over this vocabulary, on the device of `beside`.
        """
        check_objective(self.objective)
        kinds = {"tokens": "integral", "mask": "bool", "segment_ids": "integral"}
        optional = ("token_weights", "segment_ids", "proximal_log_prob", "reference_log_prob")
        for name in ("tokens", "behavior_log_prob", "advantages", "mask", *optional):
            tensor = getattr(self, name)
            if tensor is None and name in optional:
                continue
            check_untransformed(name, check_tensor(name, tensor, kinds.get(name, "real floating"), beside=beside))
            check_shape(name, tensor, leading, "the tokens")
        check_ids("tokens", self.tokens, shard.vocabulary, valid=self.mask)
        divergence: object = self.divergence
        if isinstance(divergence, torch.Tensor):
            check_untransformed("divergence", check_tensor("divergence", divergence, beside=beside))
            check_shape("divergence", divergence, leading, "the tokens")
        elif divergence is not None and not isinstance(divergence, (TopKDivergence, FullDivergence)):
            kind = type(divergence).__name__
            msg = f"divergence: expected a torch.Tensor, a TopKDivergence or a FullDivergence, got {kind}"
            raise TypeError(msg)
        for name, record in (("divergence", divergence), ("centering", self.centering)):
            if isinstance(record, (TopKDivergence, TopKCentering)):
                ids = check_tensor(f"{name}.ids", record.ids, "integral", beside=beside)
                check_top_k_ids(f"{name}.ids", ids, leading)
                check_ids(f"{name}.ids", ids, shard.vocabulary, valid=self.mask)
            elif isinstance(record, (FullDivergence, FullCentering)):
                self._check_full(f"{name}.behavior", record.behavior, leading, shard.columns, beside)
                check_row_temperature(f"{name}.temperature", record.temperature, leading, beside, self.mask)
        self._check_centering()
        known: dict[str, Any] = {"size": shard.vocabulary, "leading": leading, "beside": beside, "columns": shard.all_columns}
        return shard.narrowed(row_map(self.temperature, self.support, self.tokens, self.mask, softcap=softcap, **known))

    def _check_centering(self) -> None:
        """Raise for what is no centring, or none of this mode."""
        centering: object = self.centering
        if centering is None:
            return
        if not isinstance(centering, (TopKCentering, FullCentering)):
            msg = f"centering: expected a TopKCentering or a FullCentering, got {type(centering).__name__}"
            raise TypeError(msg)
        proximal = centering.proximal_log_prob if isinstance(centering, TopKCentering) else None
        check_centred(self.objective, proximal, "centering.proximal_log_prob")
        if isinstance(self.objective, Mode) and self.objective.corrections and not self.objective.count_masked:
            # how many tokens count would depend on which outcome was sampled
            msg = f"centering: expected a mode with count_masked=True, got {self.objective!r}"
            raise ValueError(msg)

    def matrices(self) -> dict[str, torch.Tensor]:
        """Recorded logits that row kernels read, by the argument's name; for those of a `LinearHead`, an empty stand-in."""
        if not isinstance(self.divergence, FullDivergence):
            return {}
        behavior = self.divergence.behavior
        if isinstance(behavior, LinearHead):
            return {"divergence.behavior": products_like(behavior.hidden, product_dtype(behavior.hidden, behavior.weight))}
        return {"divergence.behavior": behavior}

    @staticmethod
    def _check_full(
        name: str, behavior: torch.Tensor | LinearHead, leading: Sequence[int], vocabulary: int, beside: torch.Tensor
    ) -> None:
        if isinstance(behavior, LinearHead):
            check_tensor(f"{name}.hidden", behavior.hidden, beside=beside)
            size = behavior.hidden.shape[-1]
            check_shape(f"{name}.hidden", behavior.hidden, (*leading, size), "the tokens and H")
            check_shape(f"{name}.weight", behavior.weight, (vocabulary, size), "the vocabulary and H")
            product_dtype(behavior.hidden, behavior.weight, f"{name}.")
        else:
            check_shape(name, check_tensor(name, behavior, beside=beside), (*leading, vocabulary), "the tokens and V")


class Found(NamedTuple):
    """A chunk of tokens as their logits show them: log-probs of `columns`, statistics, divergence and full centring."""

    rows: Places
    columns: torch.Tensor
    log_prob: torch.Tensor
    log_sum: torch.Tensor
    entropy: torch.Tensor | None
    divergence: torch.Tensor | None
    centering: Measured | None

    @classmethod
    def joined(cls, parts: Sequence[Found]) -> Found:
        """Several chunks, in their order, as one."""
        rows = parts[0].rows.joined([part.rows for part in parts[1:]])
        columns, log_prob, log_sum, *optional, centering = zip(*(part[1:] for part in parts), strict=True)
        entropy, divergence = (None if field[0] is None else torch.cat(field) for field in optional)
        measured = None if centering[0] is None else Measured(*(torch.cat(field) for field in zip(*centering, strict=True)))
        return cls(rows, torch.cat(columns), torch.cat(log_prob), torch.cat(log_sum), entropy, divergence, measured)


class TokenBatch:
    """Flat tokens of one call. `step` takes what is known of a chunk and gives the final gradient in its logits."""

    def __init__(self, arguments: Arguments, dtype: torch.dtype, tempering: Tempering, shard: Shard) -> None:
        given, mask = arguments, arguments.mask
        self.tempering, self.shard = tempering, shard
        measured = given.divergence if isinstance(given.divergence, torch.Tensor) else None
        others = (given.behavior_log_prob, given.advantages, *(() if measured is None else (measured,)))
        self.given, self.row_dtype = given, working_dtype(dtype)
        self.dtype = working_dtype(dtype, *(tensor.dtype for tensor in others))
        # an objective that looks at all tokens is to see those that count, and no others
        at_any_cost = not (isinstance(given.objective, Mode) or looks_at_one_token(given.objective))
        self.valid = Places.where(mask.reshape(-1), at_any_cost=at_any_cost)
        # where the mask is False they may be anything, such as −100
        self.tokens = given.tokens.reshape(-1).to(torch.int64)
        self.behavior_log_prob, self.advantages, *rest = (tensor.detach().reshape(-1) for tensor in others)
        self.measured = rest[0] if rest else None
        self.reduction = reduction_of(given.objective, given.reduction)
        log_probs = {"proximal_log_prob": given.proximal_log_prob, "reference_log_prob": given.reference_log_prob}
        check_others(given.objective, log_probs, given.behavior_log_prob, xp=namespace())
        self.coefficients = self._coefficients(mask)
        # here, where autocast is still as the caller has it
        self.behavior = BehaviorLogits(given.divergence, tempering) if isinstance(given.divergence, FullDivergence) else None
        self.full_term = None
        if isinstance(given.centering, FullCentering):
            behavior = BehaviorLogits(given.centering, tempering)
            self.full_term = FullTerm(given.objective, behavior, self.advantages, given.engine, self.row_dtype, shard)
        self.log_prob: torch.Tensor | None = None
        self.entropy: torch.Tensor | None = None
        self._chunks: list[Found] = []
        self._loss: PolicyLoss | None = None

    @property
    def needs_entropy(self) -> bool:
        """Whether the entropy of each row is needed."""
        return self.given.entropy or self.given.entropy_coefficient != 0.0

    @property
    def pulls_as_softmax(self) -> bool:
        """Whether the gradient in the logits is, but for some columns, a multiple of the softmax."""
        return self.full_term is None and self.given.entropy_coefficient == 0.0

    def columns(self, rows: Places) -> torch.Tensor:
        """Ids whose log-prob `step` needs: the sampled token, then recorded ones; (rows, C)."""
        key = rows.key
        recorded = [
            r.ids for r in (self.given.centering, self.given.divergence) if isinstance(r, (TopKCentering, TopKDivergence))
        ]
        ids = [rows.counted(ids.reshape(-1, ids.shape[-1])[key].to(torch.int64), 0) for ids in recorded]
        sampled = self.tokens[key, None]
        return torch.cat((sampled, *ids), dim=-1) if ids else sampled

    def full_divergence(
        self, module: ModuleType | None, rows: Places, logits: torch.Tensor, places: Places
    ) -> torch.Tensor | None:
        """The `FullDivergence` of rows whose logits are at these places, None without one; before softmaxes replace them."""
        if self.behavior is None or not isinstance(self.given.divergence, FullDivergence):
            return None
        tempering, parts = self.tempering.at(rows.key), []
        for part, recorded, at in self.behavior.chunks(rows, self.shard.widest, self.row_dtype):
            policy, behavior = tempering.at(part), self.behavior.tempering.at(rows[part].key)
            pair = (logits, places[part], policy), (recorded, at, behavior)
            found = full_divergence_rows(module, *pair[0], *pair[1], self.shard)
            parts.append(getattr(found, self.given.divergence.kind))
        return torch.cat(parts)

    def find(
        self,
        rows: Places,
        columns: torch.Tensor,
        whole: Softmaxes,
        full_divergence: torch.Tensor | None,
        logits: torch.Tensor,
        places: Places,
    ) -> Found:
        """What `step` needs of rows, from their softmaxes; their logits, at these places, are for a `FullCentering` only.

        The divergence comes first: C_v depends on it.
        """
        statistics, _, log_prob = whole
        divergence, centering = self._divergence(rows.key, columns, log_prob, full_divergence), None
        if self.full_term is not None:
            tempering = self.tempering.at(rows.key)
            centering = self.full_term.measure(rows, logits, places, tempering, statistics, divergence)
        return Found(rows, columns, log_prob, statistics.log_sum, statistics.entropy, divergence, centering)

    def step(self, found: Found) -> Pull:
        """∂(reduced loss)/∂logits of these tokens; keeps what `result` needs."""
        if len(found.rows) == len(self.valid):
            return self._of_all(found)
        self._chunks.append(found)
        return self._pass(found, diagnostics=False)[1]

    def result(self) -> VocabularyLoss:
        """All that has been learnt, without a backward pass; of chunks, from one pass over all tokens."""
        if self._loss is None:
            self._of_all(Found.joined(self._chunks) if self._chunks else self._nothing())
        assert self._loss is not None
        assert self.log_prob is not None
        shape = self.given.mask.shape
        entropy = None if self.entropy is None else self.entropy.reshape(shape)
        return VocabularyLoss(self._loss.loss, self._loss.diagnostics, self.log_prob.reshape(shape), entropy)

    def _of_all(self, found: Found) -> Pull:
        """The pull of all tokens; keeps the loss."""
        rows, count = found.rows, self.given.mask.numel()
        # a log-prob a token, whose memory is not that of others too
        self.log_prob = rows.spread(found.log_prob[:, 0].contiguous(), count)
        if self.given.entropy and found.entropy is not None:
            self.entropy = rows.spread(found.entropy, count)
        self._loss, pull = self._pass(found, diagnostics=self.given.diagnostics)
        return pull

    def _nothing(self) -> Found:
        """What is known of no tokens."""
        none = self.valid[:0]
        columns = self.columns(none)
        empty = torch.empty(columns.shape, dtype=self.row_dtype, device=columns.device)
        none_of = empty[:, 0]
        return Found(none, columns, empty, none_of, none_of, none_of, Measured(none_of, none_of, none_of))

    def _pass(self, found: Found, *, diagnostics: bool) -> tuple[PolicyLoss, Pull]:
        """The loss of these tokens, without the gradient in it, and its pull."""
        rows, sampled = found.rows, found.log_prob[:, 0]
        key = rows.key
        valid = torch.ones(len(rows), dtype=torch.bool, device=sampled.device) if rows.valid is None else rows.valid
        mode, coefficients = self._resolved(key, valid)
        scaled = mode.scaled(coefficients)
        batch = Batch(sampled, mode.anchor_log_prob, self.advantages[key], valid, scaled, found.divergence)
        result = run_pass(
            mode.objective,
            batch,
            self.given.engine,
            dtype=self.dtype,
            gradient_dtype=self.row_dtype,
            diagnostics=diagnostics,
        )
        result = mode.added(result, coefficients, xp=namespace())
        slope: torch.Tensor = result.gradient
        pull = Pull(found.columns[:, :1], slope[:, None])
        # the gradient is as large as a chunk: not for longer than it takes
        result = result._replace(gradient=None)
        if self.given.entropy_coefficient and found.entropy is not None:
            bonus = -self.given.entropy_coefficient * self.coefficients[key].to(self.row_dtype)
            result = result._replace(loss=result.loss + rows.counted(bonus * found.entropy).sum())
            pull = pull.with_entropy(bonus, found.log_sum, found.entropy)
        if self.given.centering is not None:
            value, pull = self._centred(pull, found, coefficients)
            result = result._replace(loss=result.loss + value)
        return result, pull

    def _divergence(
        self, key: torch.Tensor | slice, columns: torch.Tensor, log_prob: torch.Tensor, full: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The divergence of tokens, of whichever kind was given, from the log-probs of their columns or over all logits."""
        given = self.given.divergence
        if not isinstance(given, TopKDivergence):
            return full if self.measured is None else self.measured[key]
        top_k = given.behavior_log_prob.detach()
        top_k = top_k.reshape(-1, top_k.shape[-1])[key]
        # the last columns
        start = columns.shape[-1] - top_k.shape[-1]
        ids, policy = columns[:, start:], TopK(log_prob[:, 0], log_prob[:, start:])
        behavior, outside = TopK(self.behavior_log_prob[key], top_k), self._outside(key, ids)
        if outside is not None:
            policy, behavior = policy.without(outside), behavior.without(outside)
        found: torch.Tensor = getattr(top_k_rows(columns[:, 0], ids, policy, behavior), given.kind)
        return found

    def _centred(self, pull: Pull, found: Found, coefficients: torch.Tensor) -> tuple[torch.Tensor, Pull]:
        """Σ c times the score-centring term of these tokens, and the pull with its gradient."""
        centering, coefficients = self.given.centering, coefficients.to(self.row_dtype)
        if isinstance(centering, TopKCentering):
            k, key = centering.ids.shape[-1], found.rows.key
            columns, log_prob = found.columns[:, : 1 + k], found.log_prob[:, 1 : 1 + k]
            of_tokens = self.advantages[key], found.divergence, self._outside(key, columns[:, 1:])
            value, at = top_k_terms(self.given.objective, centering, key, log_prob, *of_tokens)
            at = at.to(self.row_dtype) * coefficients[:, None]
            pull = pull._replace(columns=columns, at=torch.cat((pull.at, at), -1), scale=pull.of_softmax - at.sum(-1))
            return found.rows.counted(coefficients * value).sum(), pull
        assert self.full_term is not None
        assert found.centering is not None
        value, total, size = found.centering
        counted = found.rows.counted(coefficients)
        everywhere = CenteredRows(self.full_term, found.rows.index, found.divergence, counted, size)
        return found.rows.counted(coefficients * value).sum(), pull._replace(
            scale=pull.of_softmax - coefficients * total, everywhere=everywhere
        )

    def _outside(self, key: torch.Tensor | slice, ids: torch.Tensor) -> torch.Tensor | None:
        """True at ids, (tokens, C), outside the support of their token; None where every id is in it."""
        support = self.tempering.support
        return None if support is None else ~support.at(key).holds(ids)

    def _coefficients(self, counted: torch.Tensor) -> torch.Tensor:
        """Those of the reduction, flat."""
        given = self.given
        options: dict[str, Any] = {
            "normalizer": given.normalizer,
            "token_weights": None if given.token_weights is None else given.token_weights.detach(),
            "segment_ids": given.segment_ids,
        }
        coefficients = reduction_coefficients(self.reduction, counted, dtype=self.dtype, **options, xp=namespace())
        return torch.broadcast_to(coefficients.detach(), counted.shape).reshape(-1)

    def _resolved(self, key: torch.Tensor | slice, valid: torch.Tensor) -> tuple[Resolved, torch.Tensor]:
        """The objective or mode for these tokens, and their coefficients; a mode sees all tokens at once."""
        given = self.given
        if not isinstance(given.objective, Mode):
            return Resolved(given.objective, self.behavior_log_prob[key], None, valid, None, {}), self.coefficients[key]
        # `step` has learnt those of all
        assert self.log_prob is not None
        mode = resolve(
            given.objective,
            self.log_prob.reshape(given.mask.shape),
            given.behavior_log_prob,
            given.advantages,
            mask=given.mask,
            proximal_log_prob=given.proximal_log_prob,
            reference_log_prob=given.reference_log_prob,
            segment_ids=given.segment_ids,
            diagnostics=given.diagnostics,
            dtype=self.dtype,
            xp=namespace(),
        )

        def picked(array: torch.Tensor) -> torch.Tensor:
            return torch.broadcast_to(array, given.mask.shape).reshape(-1)[key]

        coefficients = self.coefficients if mode.counted is given.mask else self._coefficients(mode.counted)
        mode = mode._replace(
            anchor_log_prob=picked(mode.anchor_log_prob),
            factor=None if mode.factor is None else picked(mode.factor),
            counted=picked(mode.counted),
            penalty=None if mode.penalty is None else (picked(mode.penalty[0]), picked(mode.penalty[1])),
        )
        return mode, coefficients[key]


def looks_at_one_token(objective: Objective) -> bool:
    """True if the objective may get the tokens in chunks: a trace of its methods shows no operation across tokens."""
    if isinstance(objective, Mode):
        return False
    if is_known(objective):
        return True
    trace = Trace()
    kinds = {"mask": "bool"}
    tokens = [trace.input(name, kinds.get(name, "float")) for name in Batch._fields]
    try:
        traced = policy_pass(objective, *tokens, dtype="float", diagnostics=False, select=False, xp=trace.namespace)
    except (UntraceableError, AttributeError, TypeError, ValueError):
        return False
    return not traced.gradient.reduced
