"""Records of the behaviour policy for the score-centring term at vocabulary scale: log-probs of K tokens, or of all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from drpo_core._checks import check_number
from drpo_core.centering import check_centred
from drpo_core.modes.mode import Mode
from drpo_jax._checks import working_dtype
from drpo_jax.vocabulary.divergences import LinearHead, check_full, check_top_k, counted_nowhere, log_probs_at, register_record
from drpo_jax.vocabulary.softmax import masked

if TYPE_CHECKING:
    from typing import TypeAlias

    from drpo_core import Objective
    from drpo_jax.vocabulary.row_map import Rows

__all__ = ["FullCentering", "Outcomes", "TopKCentering", "check_centering", "outcomes_of"]


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "behavior_log_prob", "proximal_log_prob"], meta_fields=[])
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopKCentering:
    """The score-centring term of a policy loss over recorded log μ of K tokens and one tail for all others; a pytree.

    The K tokens must not depend on which token was sampled, or the term's expectation is another one. Its arrays are
    checked where it is used, because JAX also builds pytrees whose leaves aren't arrays.

    Parameters
    ----------
    ids, behavior_log_prob
        Ids of the K recorded tokens (usually μ's most likely ones) and their log μ, nats; (…, K). An id that comes twice
        counts once, the first time.
    proximal_log_prob
        Their log π_old, nats, (…, K), where the mode needs it.

    See Also
    --------
    drpo_core.centering.score_centering : the formula.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from drpo_jax import TopKCentering
    >>> recorded = TopKCentering(ids=jnp.array([[3, 5]]), behavior_log_prob=jnp.log(jnp.array([[0.6, 0.3]])))
    """

    ids: jax.Array
    behavior_log_prob: jax.Array
    proximal_log_prob: jax.Array | None = None


@register_record
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FullCentering:
    """The score-centring term of a policy loss over the whole vocabulary, exact; a pytree.

    Its arrays are checked where it is used, because JAX also builds pytrees whose leaves aren't arrays.

    Parameters
    ----------
    behavior
        Logits or log-probs of μ, (…, V), or the `LinearHead` to recompute them from, chunk by chunk.
    temperature
        μ is softmax(behavior / temperature): 1 for recorded log-probs; a number, or one per token, (…).

    Raises
    ------
    TypeError
        If the temperature is neither a number nor an array.
    ValueError
        If the temperature is not finite and positive.

    See Also
    --------
    drpo_core.centering.score_centering : the formula.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from drpo_jax import FullCentering
    >>> recorded = FullCentering(behavior=jnp.log(jnp.array([[0.2, 0.3, 0.5]])))
    """

    behavior: jax.Array | LinearHead
    temperature: float | jax.Array = 1.0

    def __post_init__(self) -> None:
        """Check a temperature that is a number, and keep it as a Python float."""
        if not isinstance(self.temperature, jax.Array):
            object.__setattr__(self, "temperature", check_number("temperature", self.temperature, above=0.0))


if TYPE_CHECKING:
    Centering: TypeAlias = TopKCentering | FullCentering


def check_centering(centering: object, objective: Objective, leading: tuple[int, ...], vocabulary: int) -> None:
    """Raise for what is no centring of tokens of this shape, or none of this mode."""
    if centering is None:
        return
    if isinstance(centering, TopKCentering):
        log_probs = {"centering.behavior_log_prob": centering.behavior_log_prob}
        if centering.proximal_log_prob is not None:
            log_probs["centering.proximal_log_prob"] = centering.proximal_log_prob
        check_top_k(leading, "centering.ids", centering.ids, **log_probs)
        if centering.ids.shape[-1] == 0:
            msg = f"centering.ids: expected shape (…, K) with K of 1 or more, got {centering.ids.shape}"
            raise ValueError(msg)
    elif isinstance(centering, FullCentering):
        check_full("centering", centering, leading, vocabulary)
    else:
        msg = f"centering: expected a TopKCentering or a FullCentering, got {type(centering).__name__}"
        raise TypeError(msg)
    proximal = centering.proximal_log_prob if isinstance(centering, TopKCentering) else None
    check_centred(objective, proximal, "centering.proximal_log_prob")
    if isinstance(objective, Mode) and objective.corrections and not objective.count_masked:
        # how many tokens count would depend on which outcome was sampled
        msg = f"centering: expected a mode with count_masked=True, got {objective!r}"
        raise ValueError(msg)


class Outcomes(NamedTuple):
    """log π of the outcomes, (…, K) or (…, V), and log μ and log π_old of them by the names of arguments."""

    log_prob: jax.Array
    recorded: dict[str, jax.Array | None]
    tail: bool


def outcomes_of(
    centering: Centering,
    *,
    logits: jax.Array,
    log_normalizer: jax.Array,
    rows: Rows,
    mask: jax.Array | None = None,
) -> Outcomes:
    """What the term is a function of; differentiable in the logits and the log-normaliser. The mask is that of the logits."""
    if isinstance(centering, TopKCentering):
        nothing = counted_nowhere(centering.ids, rows)

        def once(log_prob: jax.Array | None) -> jax.Array | None:
            return None if log_prob is None else jnp.where(nothing, -jnp.inf, log_prob)

        x = log_probs_at(logits, centering.ids, log_normalizer, rows=rows, mask=mask)
        log_probs = {name: once(getattr(centering, name)) for name in ("behavior_log_prob", "proximal_log_prob")}
        return Outcomes(jnp.where(nothing, -jnp.inf, x), log_probs, tail=True)
    head = centering.behavior
    behavior = head.logits(working_dtype(head.hidden, head.weight)) if isinstance(head, LinearHead) else head
    of_behavior, shard = rows.at_temperature(centering.temperature), rows.shard
    behavior = shard.log_softmax(of_behavior.logits(behavior.astype(working_dtype(behavior))))
    x = shard.log_softmax(rows.logits(masked(logits, mask).astype(working_dtype(logits, log_normalizer))))
    return Outcomes(x, {"behavior_log_prob": behavior, "proximal_log_prob": None}, tail=False)
