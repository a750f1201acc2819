"""From hidden states and the LM head to a policy loss and its gradients; (tokens × vocabulary) logits never exist."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from drpo_core import merge_diagnostics
from drpo_core._checks import check_number
from drpo_core.centering import outcome_terms
from drpo_core.loss import policy_pass, reduction_of
from drpo_core.modes.mode import Mode, Resolved, check_others, resolve
from drpo_core.objectives import PolicyGradient
from drpo_core.objectives.protocol import check_objective
from drpo_core.reduction import reduction_coefficients
from drpo_jax._checks import check_head, check_jax_arrays, check_tokens, working_dtype
from drpo_jax._namespace import xp
from drpo_jax._sharding import in_auto_mode, varying_like
from drpo_jax.vocabulary.centering import TopKCentering, check_centering, outcomes_of
from drpo_jax.vocabulary.chunks import Gradients, HeadSums, Needed, before_softcap, chunk_size, over_chunks, primals
from drpo_jax.vocabulary.divergences import (
    LinearHead,
    broken_tokens,
    check_divergence,
    measure,
    shard_of,
    with_usable_temperature,
)
from drpo_jax.vocabulary.logits import VocabularyLoss
from drpo_jax.vocabulary.row_map import RowMap, Rows
from drpo_jax.vocabulary.softmax import Normalized, entries, inside_vocabulary, one_hot

if TYPE_CHECKING:
    from typing import TypeAlias

    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.loss import PolicyLoss
    from drpo_core.reduction import Reduction
    from drpo_jax.vocabulary.centering import Centering, Outcomes
    from drpo_jax.vocabulary.divergences import Divergence
    from drpo_jax.vocabulary.shards import Axis, Shard
    from drpo_jax.vocabulary.support import Support

__all__ = ["linear_policy_loss"]


def linear_policy_loss(  # noqa: PLR0915 -- its arguments are checked one after the other
    objective: Objective,
    *,
    hidden: jax.Array,
    weight: jax.Array,
    tokens: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None = None,
    proximal_log_prob: jax.Array | None = None,
    reference_log_prob: jax.Array | None = None,
    reduction: Reduction | None = None,
    normalizer: float | jax.Array | None = None,
    token_weights: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    divergence: Divergence | None = None,
    centering: Centering | None = None,
    temperature: float | jax.Array = 1.0,
    support: Support | None = None,
    vocabulary_size: int | None = None,
    logit_softcap: float | None = None,
    entropy: bool = False,
    entropy_coefficient: float = 0.0,
    diagnostics: bool = True,
    chunk_tokens: int | None = None,
    vocabulary_axis: Axis | None = None,
) -> VocabularyLoss:
    """Policy loss of tokens from hidden states and the LM head, π = softmax(cap·tanh((h Wᵀ + b)/cap) / T).

    The gradients ∂hidden, ∂weight and ∂bias are formed in the forward pass, one chunk of tokens after the other, with
    three matrix products a chunk. Masked tokens are left out. No gradient is formed for an array that isn't
    differentiated, such as a frozen head; the other arrays are constants. First derivatives are in reverse mode. A
    second derivative, that of the formula −c A r w, is in forward mode over them (`jax.jvp` of `jax.grad`).

    Meant to be called under `jit`. Works under `shard_map` over the tokens, which is faster than a sharded batch under
    `jit`.

    An id outside [0, V) at a valid token, of `tokens` or of a `TopKDivergence`, makes the loss and the gradients of
    that token NaN; so does a sampled token outside its support. It never raises, because JAX does not know the ids while
    it traces.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode`, for which the first product of each chunk is
        taken twice, because its sequences come in several.
    hidden
        Last hidden states, (…, H); anything where the mask is False.
    weight, bias
        W and b of the LM head, (V, H) and (V,); no bias if None. Products are accumulated in float32 at least.
    tokens
        Ids of the sampled tokens, (…), in [0, V); anything where the mask is False.
    behavior_log_prob, advantages
        log μ (nats, ≤ 0) and A of the sampled tokens; (…).
    mask
        Boolean, (…), True at tokens that count.
    proximal_log_prob, reference_log_prob, reduction, normalizer, token_weights, segment_ids
        See `drpo_jax.policy_loss`.
    divergence
        For ``DPPO(divergence="per_token")``: a divergence per token, or a `TopKDivergence` or `FullDivergence` to measure
        chunk by chunk. A `LinearHead` in it takes another chunk of logits.
    centering
        Adds the score-centring term, which makes the expected gradient at a constant advantage 0: a `TopKCentering` or a
        `FullCentering`. Its value, which means nothing, is in the loss. A mode must look at one token at a time.
    temperature
        T > 0, a number, or an array (…) of one per token, constant.
    support
        The ids that the tokens were sampled from (top-p, top-k, min-p), over which π is renormalised, as log μ is. None: all.
        A chunk's supports exist as booleans (tokens, V). A `FullDivergence` or `FullCentering` is renormalised over them
        too, and recorded ids outside count for nothing.
    vocabulary_size
        Rows of the head from this id on are padding, which has no probability and a gradient of exactly 0. None: there is
        none.
    logit_softcap
        cap > 0, a number in units of a logit; None for none.
    entropy
        Also return the entropies H, constants.
    entropy_coefficient
        c of an entropy bonus: the loss has −c H of each valid token, reduced as the others, with its gradient. A number.
    diagnostics
        Also compute `drpo_core.token_diagnostics`, in the pass that gives the loss.
    chunk_tokens
        How many tokens' logits exist at once. None: 256 where JAX's default backend is the CPU, 2,048 elsewhere. An objective
        of your own is shown the tokens of one chunk.
    vocabulary_axis
        Vocabulary-parallel, inside `jax.shard_map`: the mesh axis, or axes, along which the rows of the weight and the bias
        are divided. Its devices have the same of everything else, and get the same results and all of ∂hidden. See
        `docs/how-to/tensor-parallelism.md`.
        Logits or a `LinearHead` in a record are divided too.

    Returns
    -------
    VocabularyLoss
        `loss` (0-d, float32 at least), `diagnostics`, `log_prob` and `entropy`.

    Raises
    ------
    TypeError
        If an array is not a JAX array or has a wrong dtype, a number is none, or the reduction is unknown.
    ValueError
        If shapes disagree, a number is out of its range, or an array is divided along the `vocabulary_axis` that must not
        be, or isn't.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from drpo_core import DRPO
    >>> from drpo_jax import linear_policy_loss
    >>> def loss(weight):
    ...     return linear_policy_loss(
    ...         DRPO(delta=0.5),
    ...         hidden=jnp.eye(3)[:1],
    ...         weight=weight,
    ...         tokens=jnp.array([0]),
    ...         behavior_log_prob=jnp.log(jnp.array([0.25])),
    ...         advantages=jnp.array([1.0]),
    ...         mask=jnp.array([True]),
    ...     ).loss
    >>> gradient = jax.grad(loss)(jnp.tile(jnp.log(jnp.array([[0.5], [0.3], [0.2]])), 3))
    >>> [round(g, 4) for g in gradient[:, 0].tolist()]
    [-0.5, 0.3, 0.2]
    """
    if logit_softcap is not None:
        logit_softcap = check_number("logit_softcap", logit_softcap, above=0.0)
    entropy_coefficient = check_number("entropy_coefficient", entropy_coefficient)
    size = chunk_size(chunk_tokens)
    check_objective(objective)
    check_head(hidden, weight, bias)
    leading, vocabulary, of = hidden.shape[:-1], weight.shape[0], "hidden without its last axis"
    batch = {"tokens": tokens, "behavior_log_prob": behavior_log_prob, "advantages": advantages, "mask": mask}
    check_tokens(leading, of, **batch)
    check_divergence(divergence, leading, vocabulary)
    check_centering(centering, objective, leading, vocabulary)
    others = {"proximal_log_prob": proximal_log_prob, "reference_log_prob": reference_log_prob}
    check_jax_arrays(token_weights=token_weights, segment_ids=segment_ids, **others)
    check_others(objective, others, behavior_log_prob, xp=xp)
    given = (divergence,) if isinstance(divergence, jax.Array) else ()
    dtype = working_dtype(hidden, weight, behavior_log_prob, advantages, *given)
    options = {"normalizer": normalizer, "token_weights": token_weights, "segment_ids": segment_ids}
    reduction = reduction_of(objective, reduction)
    inputs: dict[str, Any] = {"hidden": hidden, "weight": weight, "bias": bias}
    replicated: dict[str, Any] = batch | others | options | {"temperature": temperature, "support": support}
    shard = shard_of(vocabulary_axis, inputs, replicated, divergence=divergence, centering=centering)
    row_map = RowMap.of(temperature, support, vocabulary_size, leading=leading, of=of, width=vocabulary, shard=shard)
    mode = Resolved(objective, behavior_log_prob, None, mask, None, {})
    if isinstance(objective, Mode):
        # log-probs of all tokens first, because its statistics may be of whole sequences
        found = linear_policy_loss(
            PolicyGradient(),
            **jax.lax.stop_gradient(inputs | batch),
            temperature=temperature,
            support=support,
            vocabulary_size=vocabulary_size,
            logit_softcap=logit_softcap,
            chunk_tokens=size,
            vocabulary_axis=vocabulary_axis,
            diagnostics=False,
        )
        log_probs: dict[str, Any] = others | {"log_prob": found.log_prob, "behavior_log_prob": behavior_log_prob}
        log_probs, a = jax.lax.stop_gradient((log_probs, advantages))
        sequences: dict[str, Any] = {"mask": mask, "segment_ids": segment_ids}
        mode = resolve(objective, **log_probs, advantages=a, **sequences, diagnostics=diagnostics, dtype=dtype, xp=xp)
    coefficients = reduction_coefficients(reduction, mode.counted, dtype=dtype, **options, xp=xp)
    factors = None
    if centering is not None or entropy_coefficient:
        factors = reduction_coefficients(reduction, mask, dtype=dtype, **options, xp=xp)
    penalty = None if mode.penalty is None else [jnp.where(mode.counted, coefficients * part, 0.0) for part in mode.penalty]
    batch["anchor_log_prob"], coefficients = mode.anchor_log_prob, mode.scaled(coefficients)
    chunk = min(size, max(1, mask.size))
    step = _Step(objective, mode.objective, dtype, logit_softcap, entropy, entropy_coefficient, diagnostics, chunk, shard)

    def run(
        hidden: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None,
        row_map: RowMap,
        batch: dict[str, jax.Array],
        records: tuple[Divergence | None, Centering | None],
        coefficients: jax.Array,
        factors: jax.Array | None,
        penalty: jax.Array | None,
    ) -> tuple[tuple[jax.Array, Diagnostics | None], dict[str, jax.Array]]:
        rows: dict[str, Any] = batch | {"coefficients": jnp.broadcast_to(coefficients, leading), "penalty": penalty}
        if factors is not None:
            rows["factors"] = jnp.broadcast_to(factors, leading)
        shared: _Shared = {}
        rows["row_map"], shared["support_ids"] = row_map.apart()
        for name, record in zip(("divergence", "centering"), records, strict=True):
            rows[name], shared[name] = _without_head(with_usable_temperature(record))
        # what a loop over tokens carries varies as all that it reads; recorded logits vary over the vocabulary too
        spread = partial(varying_like, (hidden, rows, shared["support_ids"]), but=shard.axes)
        loss, statistics, per_token = _with_gradients(
            step,
            spread(hidden),
            spread(row_map.of_head(weight)),
            None if bias is None else spread(row_map.of_head(bias)),
            rows.pop("mask"),
            rows,
            shared,
        )
        return (loss, statistics), per_token

    of_penalty = None if penalty is None else penalty[1]
    constants = jax.lax.stop_gradient((batch, (divergence, centering), coefficients, factors, of_penalty))
    (loss, statistics), per_token = in_auto_mode(run, hidden, weight, bias, row_map, *constants)
    statistics, per_token = jax.lax.stop_gradient((statistics, per_token))
    if penalty is not None:
        loss = loss + jax.lax.stop_gradient(jnp.sum(penalty[0]))
    if statistics is not None:
        statistics |= mode.diagnostics
    return VocabularyLoss(loss, statistics, per_token["log_prob"], per_token.get("entropy"))


_Shared: TypeAlias = "dict[str, Any]"
"""What is not per token: heads of the behaviour policy, by the argument that brought them, and the ids of all supports."""


def _without_head(record: Any) -> tuple[Any, LinearHead | None]:  # noqa: ANN401 -- a divergence or a centring
    """The record with the hidden states in the place of a head, of which only they are per token; and the head."""
    head = getattr(record, "behavior", None)
    return (replace(record, behavior=head.hidden), head) if isinstance(head, LinearHead) else (record, None)


def _with_head(record: Any, head: LinearHead | None) -> Any:  # noqa: ANN401
    """The inverse, for a chunk of tokens."""
    return record if head is None else replace(record, behavior=replace(head, hidden=record.behavior))


class _Sums(NamedTuple):
    """What chunks add up to."""

    loss: jax.Array
    diagnostics: Diagnostics | None

    def plus(self, found: PolicyLoss) -> _Sums:
        """With another chunk's."""
        mine, theirs = self.diagnostics, found.diagnostics
        merged = None if mine is None or theirs is None else merge_diagnostics(mine, theirs)
        return _Sums(self.loss + found.loss, merged)


class _OfLogits(NamedTuple):
    """A chunk's softmax, z = h Wᵀ + b, its row map, and a derivative in each log-prob, or None."""

    probability: jax.Array
    z: jax.Array
    rows: Rows
    everywhere: jax.Array | None


class _Step(NamedTuple):
    """What is done to a chunk, apart from its arrays. `centred` is the objective or mode as it was given."""

    centred: Objective
    objective: Objective
    dtype: Any
    logit_softcap: float | None
    entropy: bool
    entropy_coefficient: float
    diagnostics: bool
    chunk: int
    shard: Shard

    def values(
        self, head: LinearHead, valid: jax.Array, rows: dict[str, Any], shared: _Shared
    ) -> tuple[PolicyLoss, dict[str, jax.Array], _OfLogits]:
        """Loss, c ∂L/∂log π and diagnostics; what is measured per token; what the gradient in the logits is made of."""
        z = head.uncapped(working_dtype(head.hidden, head.weight))
        logits = head.capped(z)
        mapped, sampled = rows["row_map"].of_chunk(shared["support_ids"]), rows["tokens"][:, None]
        policy, width = Normalized.of(mapped.logits(logits), self.shard), logits.shape[-1]
        log_prob = policy.log_prob(mapped.at(entries(logits, sampled, None, self.shard), sampled))[:, 0]
        divergence, centering = rows["divergence"], rows["centering"]
        broken = broken_tokens(rows["tokens"], (divergence, centering), mapped)
        log_normalizer = policy.top + policy.log_total
        divergence = measure(
            _with_head(divergence, shared["divergence"]),
            logits=logits,
            log_normalizer=log_normalizer,
            tokens=rows["tokens"],
            behavior_log_prob=rows["behavior_log_prob"],
            rows=mapped,
        )
        found = self.in_pass(log_prob, rows, valid, divergence)
        if rows["penalty"] is not None:
            found = found._replace(gradient=found.gradient + jnp.where(valid, rows["penalty"], 0.0))
        everywhere = None
        if centering is not None:
            outcomes = outcomes_of(
                _with_head(centering, shared["centering"]), logits=logits, log_normalizer=log_normalizer, rows=mapped
            )
            values, everywhere = self.centering_term(outcomes, rows, valid, divergence)
            value = jnp.sum(values) if outcomes.tail else self.shard.total(jnp.sum(values))
            found = found._replace(loss=found.loss + value.astype(found.loss.dtype))
            if isinstance(centering, TopKCentering):
                row, column = jnp.arange(len(logits))[:, None], self.local(centering.ids, width)
                # an index from the end is not meant
                column = jnp.where(column < 0, width, column)
                everywhere = jnp.zeros_like(logits).at[row, column].add(everywhere.astype(logits.dtype), mode="drop")
        if self.entropy_coefficient:
            bonus = self.entropy_coefficient * jnp.where(valid, rows["factors"], 0.0).astype(logits.dtype)
            found = found._replace(loss=found.loss - jnp.sum(bonus * policy.entropy).astype(found.loss.dtype))
            # ∂(−H)/∂log π, up to what is the same for all tokens
            of_entropy = bonus[:, None] * policy.weighted_log_prob
            everywhere = of_entropy if everywhere is None else everywhere + of_entropy
        # a NaN whatever the objective makes of the token
        poison = jnp.where(broken, jnp.nan, 0.0).astype(self.dtype)
        found = found._replace(loss=found.loss + jnp.sum(poison), gradient=found.gradient + poison)
        measured = {"log_prob": jnp.where(broken, jnp.nan, log_prob)}
        if self.entropy:
            measured["entropy"] = policy.entropy
        return found, measured, _OfLogits(policy.probability, z, mapped, everywhere)

    def centering_term(
        self, outcomes: Outcomes, rows: dict[str, Any], valid: jax.Array, divergence: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Factors c times the score-centring term, and times its coefficients C_v of the outcomes."""
        log_prob, recorded, tail = outcomes
        options = recorded | {"advantages": rows["advantages"], "divergence": divergence, "mask": valid}
        values, found = outcome_terms(self.centred, log_prob, **options, tail=tail, xp=xp)
        factors = jnp.where(valid, rows["factors"], 0.0)[:, None]
        return factors * values, factors * found

    def in_pass(self, log_prob: jax.Array, rows: dict[str, Any], valid: jax.Array, divergence: jax.Array | None) -> PolicyLoss:
        """The kernel of drpo_core."""
        return policy_pass(
            self.objective,
            log_prob,
            rows["anchor_log_prob"],
            rows["advantages"],
            valid,
            rows["coefficients"],
            divergence,
            dtype=self.dtype,
            diagnostics=self.diagnostics,
            xp=xp,
        )

    def nothing(self, like: jax.Array, divergence: Divergence | None) -> _Sums:
        """What no token adds up to: the sums of a masked one."""
        zero = jnp.zeros_like(like, dtype=self.dtype, shape=(1,))
        rows = {"anchor_log_prob": zero, "advantages": zero, "coefficients": zero}
        found = self.in_pass(zero, rows, zero > 0.0, None if divergence is None else zero)
        return _Sums(found.loss, found.diagnostics)

    def local(self, ids: jax.Array, width: int) -> jax.Array:
        """Ids counted from the device's first column, with that of the vocabulary's first one for ids outside it."""
        return self.shard.local(inside_vocabulary(ids, self.shard.vocabulary(width)), width)

    def gradient_of_logits(self, ids: jax.Array, slope: jax.Array, of: _OfLogits) -> tuple[jax.Array, jax.Array]:
        """∂loss/∂z = (slope (1[v = token] − π(v)) + C(v) − π(v) Σ C) / T, z = h Wᵀ + b, and which rows have any.

        Times the soft-cap's derivative. C is a derivative in all log-probs, if there is one.
        """
        probability, z, rows, everywhere = of
        here = one_hot(self.local(ids, z.shape[-1]), z)
        moves, gradient = slope != 0.0, (jnp.where(here, 1.0, 0.0) - probability) * rows.over_temperature(slope)[:, None]
        if everywhere is not None:
            moves = moves | (self.shard.total(jnp.sum(everywhere != 0.0, axis=-1)) > 0)
            total = self.shard.total(jnp.sum(everywhere, axis=-1, keepdims=True))
            gradient = gradient + rows.over_temperature(everywhere - probability * total)
        gradient = before_softcap(gradient, z, self.logit_softcap)
        # by selection: a dropped token's row may hold a NaN
        return rows.within(jnp.where(moves[:, None], gradient, 0.0)), moves


def _with_gradients(
    step: _Step,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
    rows: dict[str, Any],
    shared: _Shared,
) -> tuple[jax.Array, Diagnostics | None, dict[str, jax.Array]]:
    @jax.custom_vjp
    def run(
        hidden: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None,
        *others: Any,  # noqa: ANN401
    ) -> tuple[jax.Array, Diagnostics | None, dict[str, jax.Array]]:
        return _sweep(step, Needed(), hidden, weight, bias, *others)[0]

    def forward(*arguments: Any) -> tuple[Any, Gradients]:  # noqa: ANN401
        return _sweep(step, Needed.by(*arguments[:3]), *primals(arguments))

    def backward(gradients: Gradients, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
        scale = cotangents[0]
        if isinstance(scale, SymbolicZero):
            scale = jnp.zeros(scale.shape, scale.dtype)
        scaled = Gradients(*(None if g is None else g * scale for g in gradients))
        return (*scaled.cast(hidden, weight, bias), None, None, None)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(hidden, weight, bias, mask, rows, shared)


def _sweep(
    step: _Step,
    needed: Needed,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
    rows: dict[str, Any],
    shared: _Shared,
) -> tuple[tuple[jax.Array, Diagnostics | None, dict[str, jax.Array]], Gradients]:
    """Take every valid token through `step`, a chunk at a time."""
    dtype = working_dtype(hidden, weight)
    shapes: dict[str, tuple[int, ...]] = {"log_prob": ()}
    shapes |= {"entropy": ()} if step.entropy else {}
    shapes |= {"hidden": hidden.shape[-1:]} if needed.hidden else {}

    def of_chunk(
        carry: tuple[_Sums, HeadSums], taken: tuple[jax.Array, dict[str, Any]], valid: jax.Array
    ) -> tuple[tuple[_Sums, HeadSums], dict[str, jax.Array]]:
        (sums, head_sums), (h, chunk_rows) = carry, taken
        head = LinearHead(h, weight, bias, step.logit_softcap)
        found, figures, of = step.values(head, valid, chunk_rows, shared)
        if needed.any:
            slope = found.gradient.astype(dtype)
            of_logits, moves = step.gradient_of_logits(chunk_rows["tokens"], slope, of)
            # a dropped token's hidden state may hold a NaN too
            h = jnp.where(moves[:, None], h, jnp.zeros((), h.dtype))
            head_sums, of_hidden = head_sums.plus(of_logits, h, weight, needed, step.shard)
            figures |= of_hidden
        return (sums.plus(found), head_sums), figures

    (sums, head_sums), figures = over_chunks(
        of_chunk,
        (step.nothing(hidden, rows["divergence"]), HeadSums.zeros(needed, hidden, weight)),
        hidden,
        rows,
        mask,
        chunk=step.chunk,
        shapes=shapes,
        dtype=dtype,
    )
    gradients = Gradients(figures.pop("hidden", None), *head_sums)
    return (*sums, figures), gradients
