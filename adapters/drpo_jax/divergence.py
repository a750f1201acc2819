"""Divergences between two policies from logits: of the whole vocabulary, or of the recorded top-K tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from drpo_core import full_kl, full_tv, sampled_in_top_k, top_k_kl, top_k_tv
from drpo_jax.checks import check_float, check_integers, check_positive, check_shape, working_dtype

__all__ = ["Divergences", "FullDivergence", "LinearHead", "TopKDivergence", "full_divergences", "top_k_divergences"]


class Divergences(NamedTuple):
    """`tv`, a difference of probabilities in [0, 1], and `kl` = KL(μ‖π) in nats; per token."""

    tv: jax.Array
    kl: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["hidden", "weight", "bias"], meta_fields=["logit_softcap"])
@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """What logits can be recomputed from: `hidden` (…, H), `weight` (V, H), `bias` (V,) and a soft-cap; a pytree."""

    hidden: jax.Array
    weight: jax.Array
    bias: jax.Array | None = None
    logit_softcap: float | None = None

    def logits(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """cap·tanh((h Wᵀ + b)/cap), (…, V), accumulated in `dtype`."""
        z = jnp.einsum("...h,vh->...v", self.hidden, self.weight, preferred_element_type=dtype)
        z = z if self.bias is None else z + jnp.broadcast_to(self.bias, z.shape).astype(z.dtype)
        return z if self.logit_softcap is None else self.logit_softcap * jnp.tanh(z / self.logit_softcap)


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "behavior_log_prob"], meta_fields=["kind"])
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopKDivergence:
    """The divergence of ``DPPO(divergence="per_token")``, from recorded log μ of K tokens; a pytree.

    Parameters
    ----------
    kind
        ``"tv"`` or ``"kl"``.
    ids, behavior_log_prob
        Ids of the K recorded tokens and their log μ, nats; (…, K).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from drpo_jax import TopKDivergence
    >>> recorded = TopKDivergence(kind="tv", ids=jnp.array([[3, 5]]), behavior_log_prob=jnp.log(jnp.array([[0.6, 0.3]])))
    """

    kind: str
    ids: jax.Array
    behavior_log_prob: jax.Array

    def __post_init__(self) -> None:
        """Check the kind; JAX also builds pytrees whose leaves aren't arrays."""
        _check_kind(self.kind)


@partial(jax.tree_util.register_dataclass, data_fields=["behavior"], meta_fields=["kind", "temperature"])
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FullDivergence:
    """The divergence of ``DPPO(divergence="per_token")``, over the whole vocabulary; a pytree.

    Parameters
    ----------
    kind
        ``"tv"`` or ``"kl"``.
    behavior
        Logits or log-probs of μ, (…, V), or the `LinearHead` to recompute them from, chunk by chunk.
    temperature
        μ is softmax(behavior / temperature): 1 for recorded log-probs.

    Examples
    --------
    >>> import jax
    >>> from drpo_jax import FullDivergence
    >>> logits = jax.random.normal(jax.random.key(0), (4, 10))
    >>> recorded = FullDivergence(kind="kl", behavior=jax.nn.log_softmax(logits))
    """

    kind: str
    behavior: jax.Array | LinearHead
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the kind; JAX also builds pytrees whose leaves aren't arrays."""
        _check_kind(self.kind)


def full_divergences(
    *,
    logits: jax.Array,
    behavior_logits: jax.Array,
    temperature: float = 1.0,
    behavior_temperature: float | None = None,
) -> Divergences:
    """TV = ½ Σ_v abs(π(v) − μ(v)) and KL(μ‖π) = Σ_v μ(v) log(μ(v)/π(v)) of two policies; μ is constant.

    Under `jit` no log-softmax is stored; a backward pass recomputes what it needs from the logits.

    Parameters
    ----------
    logits, behavior_logits
        Of π and μ, (…, V); −inf is a probability of 0. float16 and bfloat16 are computed in float32.
    temperature
        π = softmax(logits / temperature).
    behavior_temperature
        The same for μ; None for that of π, 1 for recorded log-probs.

    Returns
    -------
    Divergences
        `tv` and `kl`, (…), float32 at least.

    Raises
    ------
    TypeError
        If an argument is not a floating-point JAX array.
    ValueError
        If the shapes differ, or a temperature is not finite and positive.

    References
    ----------
    arXiv:2602.04879 (DPPO); `drpo_core.full_tv` and `drpo_core.full_kl` for log-probs.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from drpo_jax import full_divergences
    >>> tv, kl = full_divergences(
    ...     logits=jnp.log(jnp.array([[0.5, 0.3, 0.2]])), behavior_logits=jnp.log(jnp.array([[0.4, 0.3, 0.3]]))
    ... )
    >>> round(tv.item(), 5), round(kl.item(), 5)
    (0.1, 0.03238)
    """
    behavior_temperature = temperature if behavior_temperature is None else behavior_temperature
    check_positive(temperature=temperature, behavior_temperature=behavior_temperature)
    check_float(logits=logits, behavior_logits=behavior_logits)
    check_shape("behavior_logits", behavior_logits, logits.shape)
    dtype = working_dtype(logits, behavior_logits)

    # differentiated as it stands, it would keep several arrays of the logits' shape
    @partial(jax.checkpoint, prevent_cse=False)
    def both(logits: jax.Array, behavior_logits: jax.Array) -> Divergences:
        x = jax.nn.log_softmax(logits.astype(dtype) / temperature)
        b = jax.nn.log_softmax(behavior_logits.astype(dtype) / behavior_temperature)
        return Divergences(full_tv(x, b, xp=jnp), full_kl(x, b, xp=jnp))

    result: Divergences = both(logits, jax.lax.stop_gradient(behavior_logits))
    return result


def top_k_divergences(
    *,
    logits: jax.Array,
    log_normalizer: jax.Array,
    tokens: jax.Array,
    behavior_log_prob: jax.Array,
    top_k_ids: jax.Array,
    top_k_behavior_log_prob: jax.Array,
    temperature: float = 1.0,
) -> Divergences:
    """Top-K TV and KL(μ‖π) over K recorded tokens, the sampled one and one bucket for the rest.

    Reads K + 1 logits a token: the log-normaliser is known from `selective_log_prob`.

    Parameters
    ----------
    logits
        Of π, (…, V).
    log_normalizer
        log Σ_v e^(logits/T), (…).
    tokens, behavior_log_prob
        Ids of the sampled tokens and their log μ, nats; (…).
    top_k_ids, top_k_behavior_log_prob
        Ids of K distinct tokens (usually μ's most likely ones) and their log μ, nats; (…, K).
    temperature
        T > 0, that of `log_normalizer`.

    Returns
    -------
    Divergences
        `tv` and `kl`, (…), float32 at least.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If shapes disagree, or the temperature is not finite and positive.

    References
    ----------
    arXiv:2602.04879 (DPPO); `drpo_core.top_k_tv` and `drpo_core.top_k_kl`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from drpo_jax import selective_log_prob, top_k_divergences
    >>> logits, tokens = jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.array([0])
    >>> tv, _ = top_k_divergences(
    ...     logits=logits,
    ...     log_normalizer=selective_log_prob(logits=logits, tokens=tokens).log_normalizer,
    ...     tokens=tokens,
    ...     behavior_log_prob=jnp.log(jnp.array([0.4])),
    ...     top_k_ids=jnp.array([[0]]),
    ...     top_k_behavior_log_prob=jnp.log(jnp.array([[0.4]])),
    ... )
    >>> round(tv.item(), 5)
    0.1
    """
    check_positive(temperature=temperature)
    check_float(
        logits=logits,
        log_normalizer=log_normalizer,
        behavior_log_prob=behavior_log_prob,
        top_k_behavior_log_prob=top_k_behavior_log_prob,
    )
    check_integers(tokens=tokens, top_k_ids=top_k_ids)
    leading = logits.shape[:-1]
    for name, array in (("tokens", tokens), ("log_normalizer", log_normalizer), ("behavior_log_prob", behavior_log_prob)):
        check_shape(name, array, leading)
    check_shape("top_k_ids", top_k_ids, (*leading, *top_k_ids.shape[-1:]))
    check_shape("top_k_behavior_log_prob", top_k_behavior_log_prob, top_k_ids.shape)
    dtype = working_dtype(logits)

    def log_prob(ids: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits, ids, axis=-1).astype(dtype) / temperature - log_normalizer[..., None]

    arguments = (log_prob(tokens[..., None])[..., 0], behavior_log_prob)
    options = {
        "top_k_log_prob": log_prob(top_k_ids),
        "top_k_behavior_log_prob": top_k_behavior_log_prob,
        "sampled_in_top_k": sampled_in_top_k(tokens, top_k_ids, xp=jnp),
    }
    return Divergences(*(function(*arguments, **options, xp=jnp) for function in (top_k_tv, top_k_kl)))


def check_divergence(
    divergence: jax.Array | TopKDivergence | FullDivergence | None, leading: tuple[int, ...], vocabulary: int
) -> None:
    """Raise for what is no divergence of tokens of this shape."""
    if isinstance(divergence, TopKDivergence):
        check_integers(**{"divergence.ids": divergence.ids})
        check_float(**{"divergence.behavior_log_prob": divergence.behavior_log_prob})
        check_shape("divergence.ids", divergence.ids, (*leading, *divergence.ids.shape[-1:]))
        check_shape("divergence.behavior_log_prob", divergence.behavior_log_prob, divergence.ids.shape)
    elif isinstance(divergence, FullDivergence):
        check_positive(**{"divergence.temperature": divergence.temperature})
        if isinstance(divergence.behavior, LinearHead):
            hidden, weight = divergence.behavior.hidden, divergence.behavior.weight
            check_shape("divergence.behavior.hidden", hidden, (*leading, *hidden.shape[-1:]))
            check_shape("divergence.behavior.weight", weight, (vocabulary, *hidden.shape[-1:]))
        else:
            check_shape("divergence.behavior", divergence.behavior, (*leading, vocabulary))
    elif divergence is not None:
        check_float(divergence=divergence)
        check_shape("divergence", divergence, leading)


def measure(
    divergence: jax.Array | TopKDivergence | FullDivergence | None,
    *,
    logits: jax.Array,
    log_normalizer: jax.Array,
    tokens: jax.Array,
    behavior_log_prob: jax.Array,
    temperature: float,
) -> jax.Array | None:
    """The divergence per token that was asked for."""
    if isinstance(divergence, FullDivergence):
        head = divergence.behavior
        both = full_divergences(
            logits=logits,
            behavior_logits=head.logits(logits.dtype) if isinstance(head, LinearHead) else head,
            temperature=temperature,
            behavior_temperature=divergence.temperature,
        )
    elif isinstance(divergence, TopKDivergence):
        both = top_k_divergences(
            logits=logits,
            log_normalizer=log_normalizer,
            tokens=tokens,
            behavior_log_prob=behavior_log_prob,
            top_k_ids=divergence.ids,
            top_k_behavior_log_prob=divergence.behavior_log_prob,
            temperature=temperature,
        )
    else:
        return divergence
    return both.tv if divergence.kind == "tv" else both.kl


def _check_kind(kind: str) -> None:
    if kind not in ("tv", "kl"):
        msg = f"kind: expected 'tv' or 'kl', got {kind!r}"
        raise ValueError(msg)
