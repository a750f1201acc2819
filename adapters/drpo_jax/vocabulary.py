"""From logits: log-probs of the sampled tokens, entropy, and policy losses, without a log-softmax kept for the gradient."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from drpo_core import token_mean
from drpo_jax.checks import check_float, check_integers, check_jax_arrays, check_positive, check_shape, working_dtype
from drpo_jax.divergence import FullDivergence, TopKDivergence, check_divergence, measure
from drpo_jax.loss import coefficients_of, policy_loss

if TYPE_CHECKING:
    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.reduction import Reduction

__all__ = ["SelectedLogProb", "VocabularyLoss", "logits_policy_loss", "selective_log_prob"]


class SelectedLogProb(NamedTuple):
    """Per token, in nats: `log_prob` of the sampled token, `entropy` of its distribution (or None), `log_normalizer`."""

    log_prob: jax.Array
    entropy: jax.Array | None
    log_normalizer: jax.Array


class VocabularyLoss(NamedTuple):
    """A scalar `loss` to differentiate; constants: `diagnostics`, and per token `log_prob` and `entropy` (nats).

    The per-token figures are 0 at masked tokens; `entropy` is None unless it was asked for.
    """

    loss: jax.Array
    diagnostics: Diagnostics
    log_prob: jax.Array
    entropy: jax.Array | None


def selective_log_prob(
    *, logits: jax.Array, tokens: jax.Array, temperature: float = 1.0, entropy: bool = False
) -> SelectedLogProb:
    """Log-prob log π of each sampled token, π = softmax(logits / temperature), differentiable in reverse mode.

    Only the logits and the per-token results are kept for the backward pass, which forms the gradient in one expression.
    A row that no cotangent reaches has a gradient of 0, whatever it holds.

    Parameters
    ----------
    logits
        (…, V); −inf is a probability of 0. float16 and bfloat16 are computed in float32.
    tokens
        Ids of the sampled tokens, (…).
    temperature
        T > 0.
    entropy
        Whether to compute the entropy −Σ_v π log π too.

    Returns
    -------
    SelectedLogProb
        `log_prob`, `entropy` and `log_normalizer` = log Σ_v e^(logits/T), (…), float32 at least.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If the shapes disagree, or the temperature is not finite and positive.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from drpo_jax import selective_log_prob
    >>> def total(logits):
    ...     return selective_log_prob(logits=logits, tokens=jnp.array([0])).log_prob.sum()
    >>> gradient = jax.grad(total)(jnp.log(jnp.array([[0.5, 0.3, 0.2]])))
    >>> [round(g, 4) for g in gradient[0].tolist()]
    [0.5, -0.3, -0.2]
    """
    check_positive(temperature=temperature)
    check_float(logits=logits)
    check_integers(tokens=tokens)
    check_shape("tokens", tokens, logits.shape[:-1])
    return _selective_log_prob(float(temperature), entropy, logits, tokens)


def logits_policy_loss(
    objective: Objective,
    *,
    logits: jax.Array,
    tokens: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    reduction: Reduction = token_mean,
    normalizer: float | jax.Array | None = None,
    token_weights: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    divergence: jax.Array | TopKDivergence | FullDivergence | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> VocabularyLoss:
    """Policy loss of tokens from logits, differentiable in reverse mode.

    ∂L/∂logits(v) = c g (1[v = token] − π(v)) / T with g = ∂L/∂log π = −A r w, and c the token's share in the reduction.
    Beside that gradient nothing of the size of the logits is kept.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``.
    logits
        (…, V); −inf is a probability of 0. float16 and bfloat16 are computed in float32.
    tokens
        Ids of the sampled tokens, (…); anything where the mask is False.
    behavior_log_prob, advantages
        log μ (nats, ≤ 0) and A of the sampled tokens; (…).
    mask
        Boolean, (…), True at tokens that count. The others may hold anything, also in their logits.
    reduction, normalizer, token_weights, segment_ids
        See `drpo_jax.policy_loss`; the reduction is one of drpo_core's.
    divergence
        For ``DPPO(divergence="per_token")``: a divergence per token, or a `TopKDivergence` or `FullDivergence` to measure.
    temperature
        π = softmax(logits / temperature).
    entropy
        Whether to return the entropies too.

    Returns
    -------
    VocabularyLoss
        `loss` (0-d, float32 at least), `diagnostics`, `log_prob` and `entropy`.

    Raises
    ------
    TypeError
        If a dtype or the reduction is wrong.
    ValueError
        If shapes disagree, or the temperature is not finite and positive.

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
    check_float(logits=logits)
    check_tokens(logits.shape[:-1], tokens, behavior_log_prob, advantages, mask)
    check_divergence(divergence, logits.shape[:-1], logits.shape[-1])
    check_jax_arrays(token_weights=token_weights, segment_ids=segment_ids)
    options = {"normalizer": normalizer, "token_weights": token_weights, "segment_ids": segment_ids}
    coefficients_of(reduction, mask, working_dtype(logits), options)
    ids = jnp.where(mask, tokens, 0)
    selected = selective_log_prob(logits=logits, tokens=ids, temperature=temperature, entropy=entropy)
    measured = measure(
        jax.lax.stop_gradient(divergence),
        logits=jax.lax.stop_gradient(logits),
        log_normalizer=jax.lax.stop_gradient(selected.log_normalizer),
        tokens=ids,
        behavior_log_prob=behavior_log_prob,
        temperature=temperature,
    )
    loss, statistics = policy_loss(
        objective,
        log_prob=selected.log_prob,
        behavior_log_prob=behavior_log_prob,
        advantages=advantages,
        mask=mask,
        reduction=reduction,
        divergence=measured,
        **options,  # type: ignore[arg-type]
    )
    log_prob, entropies = (
        None if a is None else jax.lax.stop_gradient(jnp.where(mask, a, 0.0)) for a in (selected.log_prob, selected.entropy)
    )
    return VocabularyLoss(loss, statistics, log_prob, entropies)  # type: ignore[arg-type]


def check_tokens(
    leading: tuple[int, ...], tokens: jax.Array, behavior_log_prob: jax.Array, advantages: jax.Array, mask: jax.Array
) -> None:
    """Raise for per-token arrays of a wrong dtype or shape."""
    check_integers(tokens=tokens)
    check_float(behavior_log_prob=behavior_log_prob, advantages=advantages)
    check_jax_arrays(mask=mask)
    given = {"tokens": tokens, "behavior_log_prob": behavior_log_prob, "advantages": advantages, "mask": mask}
    for name, array in given.items():
        check_shape(name, array, leading)


def normalize(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Give log Σ_v e^z and softmax(z) of rows."""
    # of a row of −inf the maximum would make NaN of every entry
    top = jnp.max(z, axis=-1, keepdims=True)
    e = jnp.exp(z - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(e, axis=-1, keepdims=True)
    return (top + jnp.log(total))[..., 0], e / total


def entropy_of(z: jax.Array, log_normalizer: jax.Array, probability: jax.Array) -> jax.Array:
    """Give log Σ e^z − Σ π z, where an entry of probability 0 counts nothing."""
    return log_normalizer - jnp.sum(jnp.where(probability > 0.0, probability * z, 0.0), axis=-1)


def select(rows: jax.Array, ids: jax.Array) -> jax.Array:
    """The entry of each row that its id names."""
    return jnp.take_along_axis(rows, ids[..., None], axis=-1)[..., 0]


def one_hot(ids: jax.Array, like: jax.Array) -> jax.Array:
    """True at each row's id: a comparison that fuses, where a scatter would not."""
    return ids[..., None] == jax.lax.broadcasted_iota(ids.dtype, like.shape, like.ndim - 1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _selective_log_prob(temperature: float, entropy: bool, logits: jax.Array, tokens: jax.Array) -> SelectedLogProb:  # noqa: FBT001
    z = logits.astype(working_dtype(logits)) / temperature
    log_normalizer, probability = normalize(z)
    entropies = entropy_of(z, log_normalizer, probability) if entropy else None
    return SelectedLogProb(select(z, tokens) - log_normalizer, entropies, log_normalizer)


def _forward(
    temperature: float,
    entropy: bool,  # noqa: FBT001
    logits: jax.Array,
    tokens: jax.Array,
) -> tuple[SelectedLogProb, tuple[jax.Array, jax.Array, SelectedLogProb]]:
    selected = _selective_log_prob(temperature, entropy, logits, tokens)
    return selected, (logits, tokens, selected)


def _backward(
    temperature: float,
    entropy: bool,  # noqa: ARG001, FBT001 -- whether there is one shows in what was kept
    kept: tuple[jax.Array, jax.Array, SelectedLogProb],
    cotangents: SelectedLogProb,
) -> tuple[jax.Array, None]:
    logits, tokens, selected = kept
    z = logits.astype(working_dtype(logits)) / temperature
    log_probs = z - selected.log_normalizer[..., None]
    probability = jnp.exp(log_probs)
    of_log_prob, of_normalizer = cotangents.log_prob[..., None], cotangents.log_normalizer[..., None]
    gradient = jnp.where(one_hot(tokens, z), of_log_prob, 0.0) + probability * (of_normalizer - of_log_prob)
    reached = (of_log_prob != 0.0) | (of_normalizer != 0.0)
    if selected.entropy is not None and cotangents.entropy is not None:
        of_entropy = cotangents.entropy[..., None]
        surprise = jnp.where(probability > 0.0, log_probs, 0.0) + selected.entropy[..., None]
        gradient = gradient - of_entropy * probability * surprise
        reached = reached | (of_entropy != 0.0)
    return jnp.where(reached, gradient / temperature, 0.0).astype(logits.dtype), None


_selective_log_prob.defvjp(_forward, _backward)
