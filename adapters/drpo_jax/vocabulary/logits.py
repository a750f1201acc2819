"""The policy loss of tokens from logits."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from drpo_core._checks import check_number
from drpo_core.loss import reduction_of
from drpo_core.modes.mode import check_others
from drpo_core.objectives.protocol import check_objective
from drpo_core.reduction import reduction_coefficients
from drpo_jax._checks import check_jax_arrays, check_logits, check_tokens, working_dtype
from drpo_jax._namespace import xp
from drpo_jax._sharding import in_auto_mode
from drpo_jax.centering import centering_term
from drpo_jax.loss import mode_loss
from drpo_jax.vocabulary.centering import check_centering, outcomes_of
from drpo_jax.vocabulary.divergences import (
    broken_tokens,
    check_divergence,
    keep_valid,
    measure,
    shard_of,
    with_usable_temperature,
)
from drpo_jax.vocabulary.log_prob import selected_log_prob
from drpo_jax.vocabulary.row_map import RowMap, Rows

if TYPE_CHECKING:
    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.reduction import Reduction
    from drpo_jax.vocabulary.centering import Centering
    from drpo_jax.vocabulary.divergences import Divergence
    from drpo_jax.vocabulary.shards import Axis
    from drpo_jax.vocabulary.support import Support

__all__ = ["VocabularyLoss", "logits_policy_loss"]


class VocabularyLoss(NamedTuple):
    """A scalar `loss` to differentiate; constants: `diagnostics`, and per token `log_prob` and `entropy` (nats).

    The per-token figures are 0 at masked tokens. `diagnostics` and `entropy` are None where they were not asked for.
    """

    loss: jax.Array
    diagnostics: Diagnostics | None
    log_prob: jax.Array
    entropy: jax.Array | None


def logits_policy_loss(
    objective: Objective,
    *,
    logits: jax.Array,
    tokens: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
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
    entropy: bool = False,
    entropy_coefficient: float = 0.0,
    vocabulary_axis: Axis | None = None,
    diagnostics: bool = True,
) -> VocabularyLoss:
    """Policy loss of tokens from logits, differentiable in reverse mode.

    ∂L/∂logits(v) = c g (1[v = token] − π(v)) / T with g = ∂L/∂log π = −A r w, and c the token's share in the reduction.
    Beside that gradient, nothing of the logits' size is kept. A second derivative is that of the formula −c A r w.

    An id outside [0, V) at a valid token, of `tokens` or of a `TopKDivergence`, makes the loss and that token's row of
    the gradient NaN; so does a sampled token outside its support. It never raises, because JAX does not know the ids while
    it traces.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode`.
    logits
        (…, V); −inf is a probability of 0. float16 and bfloat16 are computed in float32.
    tokens
        Ids of the sampled tokens, (…), in [0, V); anything where the mask is False.
    behavior_log_prob, advantages
        log μ (nats, ≤ 0) and A of the sampled tokens; (…).
    mask
        Boolean, (…), True at tokens that count. The others may hold anything, in their logits too.
    proximal_log_prob, reference_log_prob, reduction, normalizer, token_weights, segment_ids
        See `drpo_jax.policy_loss`.
    divergence
        For ``DPPO(divergence="per_token")``: a divergence per token, or a `TopKDivergence` or `FullDivergence` to measure.
    centering
        Adds the score-centring term, which makes the expected gradient at a constant advantage 0: a `TopKCentering` or a
        `FullCentering`. Its value, which means nothing, is in the loss. A mode must look at one token at a time.
    temperature
        T > 0, a number, or an array (…) of one per token, constant: π = softmax(logits / T).
    support
        The ids that the tokens were sampled from (top-p, top-k, min-p), over which π is renormalised, as log μ is. None: all.
        A `FullDivergence` or `FullCentering` is renormalised over it too, and recorded ids outside count for nothing.
    vocabulary_size
        Logits from this id on are padding, which has no probability and a gradient of exactly 0. None: there is none.
    entropy
        Also return the entropies H, constants.
    entropy_coefficient
        c of an entropy bonus: the loss has −c H of each valid token, reduced as the others, with its gradient. A number.
    vocabulary_axis
        See `drpo_jax.token_log_prob`. Logits in a record are divided as these are.
    diagnostics
        Also compute `drpo_core.token_diagnostics`, in the pass that gives the loss.

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

    See Also
    --------
    drpo_jax.linear_policy_loss : the same from hidden states, where the logits never exist as a whole.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from drpo_core import DRPO
    >>> from drpo_jax import logits_policy_loss
    >>> def loss(logits):
    ...     return logits_policy_loss(
    ...         DRPO(delta=0.5),
    ...         logits=logits,
    ...         tokens=jnp.array([0]),
    ...         behavior_log_prob=jnp.log(jnp.array([0.25])),
    ...         advantages=jnp.array([1.0]),
    ...         mask=jnp.array([True]),
    ...     ).loss
    >>> gradient = jax.grad(loss)(jnp.log(jnp.array([[0.5, 0.3, 0.2]])))
    >>> [round(g, 4) for g in gradient[0].tolist()]
    [-0.5, 0.3, 0.2]
    """
    check_objective(objective)
    entropy_coefficient = check_number("entropy_coefficient", entropy_coefficient)
    check_logits("logits", logits)
    leading, vocabulary, of = logits.shape[:-1], logits.shape[-1], "logits without its last axis"
    batch = {"tokens": tokens, "behavior_log_prob": behavior_log_prob, "advantages": advantages, "mask": mask}
    check_tokens(leading, of, **batch)
    check_divergence(divergence, leading, vocabulary)
    check_centering(centering, objective, leading, vocabulary)
    divergence, centering = map(with_usable_temperature, (divergence, centering))
    others: dict[str, Any] = {"proximal_log_prob": proximal_log_prob, "reference_log_prob": reference_log_prob}
    check_jax_arrays(token_weights=token_weights, segment_ids=segment_ids, **others)
    check_others(objective, others, behavior_log_prob, xp=xp)
    measured = () if divergence is None or not isinstance(divergence, jax.Array) else (divergence,)
    dtype = working_dtype(logits, behavior_log_prob, advantages, *measured)
    reduction = reduction_of(objective, reduction)
    options: dict[str, Any] = {"normalizer": normalizer, "token_weights": token_weights, "segment_ids": segment_ids}
    mapped = {"temperature": temperature, "support": support}
    arrays_of_tokens = batch | others | options | mapped
    shard = shard_of(vocabulary_axis, {"logits": logits}, arrays_of_tokens, divergence=divergence, centering=centering)
    row_map = RowMap.of(temperature, support, vocabulary_size, leading=leading, of=of, width=vocabulary, shard=shard)

    def run(
        logits: jax.Array,
        row_map: RowMap,
        batch: dict[str, jax.Array],
        divergence: Divergence | None,
        centering: Centering | None,
        arrays: dict[str, jax.Array],
    ) -> tuple[tuple[jax.Array, Diagnostics | None], tuple[jax.Array, jax.Array | None]]:
        mask, behavior_log_prob = batch["mask"], batch["behavior_log_prob"]
        ids, divergence, centering = keep_valid(mask, (batch["tokens"], divergence, centering))
        result = selected_log_prob(row_map, entropy or entropy_coefficient != 0.0, logits, ids, None, mask)
        rows = row_map.kept(mask).ready()
        measured = measure(
            divergence,
            logits=jax.lax.stop_gradient(logits),
            log_normalizer=jax.lax.stop_gradient(result.log_normalizer),
            tokens=ids,
            behavior_log_prob=keep_valid(mask, behavior_log_prob),
            rows=rows,
            mask=mask,
        )
        poison = jnp.where(broken_tokens(ids, (divergence, centering), rows), jnp.nan, 0.0).astype(result.log_prob.dtype)
        loss, statistics = mode_loss(
            objective,
            # times 1 or NaN, by which the gradient is multiplied too, even that of a token which the objective drops
            log_prob=result.log_prob * (1.0 + poison),
            behavior_log_prob=behavior_log_prob,
            proximal_log_prob=batch["proximal_log_prob"],
            reference_log_prob=batch["reference_log_prob"],
            advantages=batch["advantages"],
            mask=mask,
            divergence=measured,
            reduction=reduction,
            options=options | arrays,
            dtype=dtype,
            diagnostics=diagnostics,
        )
        terms = []
        if centering is not None:
            terms.append(
                _centering_term(objective, centering, logits, result.log_normalizer, batch["advantages"], measured, mask, rows)
            )
        if result.entropy is not None and entropy_coefficient:
            terms.append(-entropy_coefficient * result.entropy)
        if terms:
            factors = jax.lax.stop_gradient(reduction_coefficients(reduction, mask, dtype=dtype, **options | arrays, xp=xp))
            loss = loss + jnp.sum(jnp.where(mask, factors * sum(terms), 0.0)).astype(loss.dtype)
        per_token = jax.lax.stop_gradient((result.log_prob, result.entropy if entropy else None))
        return (loss + jnp.sum(poison).astype(loss.dtype), statistics), per_token

    arrays = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    constants = jax.lax.stop_gradient((batch | others, divergence, centering, arrays))
    (loss, statistics), (log_prob, entropies) = in_auto_mode(run, logits, row_map, *constants)
    return VocabularyLoss(loss, statistics, log_prob, entropies)


def _centering_term(
    objective: Objective,
    centering: Centering,
    logits: jax.Array,
    log_normalizer: jax.Array,
    advantages: jax.Array,
    divergence: jax.Array | None,
    mask: jax.Array,
    rows: Rows,
) -> jax.Array:
    """The score-centring term per token, differentiable in the logits and the log-normaliser."""

    # differentiated as it stands, the term of the whole vocabulary would keep several arrays of the logits' shape
    @partial(jax.checkpoint, prevent_cse=False)
    def term(logits: jax.Array, log_normalizer: jax.Array, constants: Any) -> jax.Array:  # noqa: ANN401 -- a pytree
        centering, rows, per_token = constants
        log_prob, recorded, tail = outcomes_of(centering, logits=logits, log_normalizer=log_normalizer, rows=rows, mask=mask)
        found = centering_term(objective, log_prob, jax.lax.stop_gradient(recorded | per_token), tail=tail)
        return found if tail else rows.shard.total(found)

    per_token = {"advantages": advantages, "divergence": divergence, "mask": mask}
    return term(logits, log_normalizer, jax.lax.stop_gradient((centering, rows, per_token)))  # type: ignore[no-any-return]
