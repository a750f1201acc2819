"""Log-probs of the sampled tokens and the entropy from logits, without a log-softmax kept for the gradient."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from drpo_core._checks import check_number
from drpo_jax._checks import check_integers, check_logits, check_shape, working_dtype
from drpo_jax._sharding import in_auto_mode

__all__ = [
    "TokenLogProb",
    "entries",
    "entropy_of",
    "inside_vocabulary",
    "masked",
    "normalize",
    "one_hot",
    "outside_vocabulary",
    "poisoned",
    "select",
    "selected_log_prob",
    "token_log_prob",
]


class TokenLogProb(NamedTuple):
    """Per token, in nats: `log_prob` of the sampled token, `entropy` of its distribution (or None), `log_normalizer`."""

    log_prob: jax.Array
    entropy: jax.Array | None
    log_normalizer: jax.Array


def token_log_prob(*, logits: jax.Array, tokens: jax.Array, temperature: float = 1.0, entropy: bool = False) -> TokenLogProb:
    """Log-prob log π(token) = logits(token)/T − log Σ_v e^(logits(v)/T) of each sampled token, differentiable in reverse mode.

    The backward pass forms the gradient in one expression, from the logits and the per-token results; nothing else of
    the logits' size is kept. A row that no cotangent reaches has a gradient of 0, whatever it holds.

    An id outside [0, V) gives a log-prob of NaN and a row of NaN as its gradient. It never raises, because JAX does not
    know the ids while it traces.

    Parameters
    ----------
    logits
        (…, V); −inf is a probability of 0. float16 and bfloat16 are computed in float32.
    tokens
        Ids of the sampled tokens, (…), in [0, V).
    temperature
        T > 0, a number: π = softmax(logits / T).
    entropy
        Also compute the entropy −Σ_v π(v) log π(v).

    Returns
    -------
    TokenLogProb
        `log_prob`, `entropy` and `log_normalizer` = log Σ_v e^(logits(v)/T), nats, (…), float32 at least.

    Raises
    ------
    TypeError
        If an array is not a JAX array or has a wrong dtype, or the temperature is not a number.
    ValueError
        If the shapes disagree, or the temperature is not finite and positive.

    See Also
    --------
    drpo_jax.logits_policy_loss : the policy loss of these log-probs, with masked tokens.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from drpo_jax import token_log_prob
    >>> def total(logits):
    ...     return token_log_prob(logits=logits, tokens=jnp.array([0])).log_prob.sum()
    >>> gradient = jax.grad(total)(jnp.log(jnp.array([[0.5, 0.3, 0.2]])))
    >>> [round(g, 4) for g in gradient[0].tolist()]
    [0.5, -0.3, -0.2]
    """
    temperature = check_number("temperature", temperature, above=0.0)
    check_logits("logits", logits)
    check_integers(tokens=tokens)
    check_shape("tokens", tokens, logits.shape[:-1], "logits without its last axis")

    def run(logits: jax.Array, tokens: jax.Array) -> tuple[None, TokenLogProb]:
        return None, selected_log_prob(temperature, entropy, logits, tokens, None)

    _, result = in_auto_mode(run, logits, tokens)
    return result  # type: ignore[no-any-return]


def normalize(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log Σ_v e^z and softmax(z) of rows."""  # noqa: D403 -- a formula
    # the maximum of a row of −inf would make NaN of every entry
    top = jnp.max(z, axis=-1, keepdims=True)
    e = jnp.exp(z - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(e, axis=-1, keepdims=True)
    return (top + jnp.log(total))[..., 0], e / total


def entropy_of(z: jax.Array, log_normalizer: jax.Array, probability: jax.Array) -> jax.Array:
    """log Σ e^z − Σ π z, where an entry of probability 0 counts nothing."""  # noqa: D403 -- a formula
    # selected before multiplying: 0 · −inf is a NaN, which jax_debug_nans would raise for
    return log_normalizer - jnp.sum(probability * jnp.where(probability > 0.0, z, 0.0), axis=-1)


def outside_vocabulary(ids: jax.Array, vocabulary: int) -> jax.Array:
    """True where an id is not in [0, vocabulary), whatever its integer type can hold."""
    limits = jnp.iinfo(ids.dtype)  # type: ignore[no-untyped-call]
    outside = jnp.zeros_like(ids, dtype=bool)
    if limits.min < 0:
        outside = ids < 0
    return outside | (ids >= vocabulary) if vocabulary <= limits.max else outside


def inside_vocabulary(ids: jax.Array, vocabulary: int) -> jax.Array:
    """Ids as int32, with 0 for those outside [0, vocabulary): an index, and what the entries of a row are compared with."""
    return jnp.where(outside_vocabulary(ids, vocabulary), 0, ids.astype(jnp.int32))


def entries(rows: jax.Array, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The entries (…, K) of rows (…, V) at ids (…, K): 0 in rows that the mask leaves out, and anything for other ids."""
    inside = inside_vocabulary(ids, rows.shape[-1])
    if mask is None:
        return jnp.take_along_axis(rows, inside, axis=-1, mode="promise_in_bounds")
    # by an index beyond the row: of rows that are replaced beforehand, a gather would have all written to memory
    inside = jnp.where(mask[..., None], inside, rows.shape[-1])
    return jnp.take_along_axis(rows, inside, axis=-1, mode="fill", fill_value=0.0)


def select(rows: jax.Array, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The entry of each row that its one id names, as `entries`."""
    return entries(rows, ids[..., None], mask)[..., 0]


def one_hot(ids: jax.Array, like: jax.Array) -> jax.Array:
    """True at each row's id, by a comparison: unlike a scatter, it fuses with what follows."""
    return ids[..., None] == jax.lax.broadcasted_iota(ids.dtype, like.shape, like.ndim - 1)


@jax.custom_vjp
def poisoned(x: jax.Array, broken: jax.Array) -> jax.Array:
    """x, with NaN where it is broken: in value, and in the derivative if a cotangent reaches it."""
    return jnp.where(broken, jnp.nan, x)


def _poisoned_forward(x: jax.Array, broken: jax.Array) -> tuple[jax.Array, jax.Array]:
    return poisoned(x, broken), broken


def _poisoned_backward(broken: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
    # not a product with NaN, which would turn a cotangent of 0 into NaN
    return jnp.where(broken & (cotangent != 0.0), jnp.nan, cotangent), None


poisoned.defvjp(_poisoned_forward, _poisoned_backward)


def masked(rows: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Rows with 0 in those that the mask leaves out, so that nothing they hold enters any arithmetic."""
    return rows if mask is None else jnp.where(mask[..., None], rows, jnp.zeros((), rows.dtype))


def selected_log_prob(
    temperature: float,
    entropy: bool,  # noqa: FBT001
    logits: jax.Array,
    tokens: jax.Array,
    mask: jax.Array | None,
) -> TokenLogProb:
    """`token_log_prob` of checked arrays; rows that the mask leaves out give that of equal logits and a gradient of 0."""
    return _token_log_prob(temperature, entropy, logits, tokens, mask)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_log_prob(
    temperature: float,
    entropy: bool,  # noqa: FBT001
    logits: jax.Array,
    tokens: jax.Array,
    mask: jax.Array | None,
) -> TokenLogProb:
    z = _tempered(logits, mask, temperature)
    log_normalizer, probability = normalize(z)
    entropies = entropy_of(z, log_normalizer, probability) if entropy else None
    outside = outside_vocabulary(tokens, logits.shape[-1])
    chosen = select(logits, tokens, mask).astype(z.dtype) / temperature
    return TokenLogProb(jnp.where(outside, jnp.nan, chosen - log_normalizer), entropies, log_normalizer)


def _forward(
    temperature: float,
    entropy: bool,  # noqa: FBT001
    logits: jax.Array,
    tokens: jax.Array,
    mask: jax.Array | None,
) -> tuple[TokenLogProb, tuple[jax.Array, jax.Array, jax.Array | None, TokenLogProb]]:
    result = _token_log_prob(temperature, entropy, logits, tokens, mask)
    return result, (logits, tokens, mask, result)


def _backward(
    temperature: float,
    entropy: bool,  # noqa: ARG001, FBT001 -- whether there is one shows in what was kept
    kept: tuple[jax.Array, jax.Array, jax.Array | None, TokenLogProb],
    cotangents: TokenLogProb,
) -> tuple[jax.Array, None, None]:
    logits, tokens, mask, result = kept
    z = _tempered(logits, mask, temperature)
    log_probs = z - result.log_normalizer[..., None]
    probability = jnp.exp(log_probs)
    outside = outside_vocabulary(tokens, logits.shape[-1])
    of_log_prob = jnp.where(outside & (cotangents.log_prob != 0.0), jnp.nan, cotangents.log_prob)[..., None]
    of_normalizer = cotangents.log_normalizer[..., None]
    here = one_hot(inside_vocabulary(tokens, logits.shape[-1]), z)
    gradient = jnp.where(here, of_log_prob, 0.0) + probability * (of_normalizer - of_log_prob)
    reached = (of_log_prob != 0.0) | (of_normalizer != 0.0)
    if result.entropy is not None and cotangents.entropy is not None:
        of_entropy = cotangents.entropy[..., None]
        surprise = jnp.where(probability > 0.0, log_probs, 0.0) + result.entropy[..., None]
        gradient = gradient - of_entropy * probability * surprise
        reached = reached | (of_entropy != 0.0)
    if mask is not None:
        reached = reached & mask[..., None]
    return jnp.where(reached, gradient / temperature, 0.0).astype(logits.dtype), None, None


_token_log_prob.defvjp(_forward, _backward)


def _tempered(logits: jax.Array, mask: jax.Array | None, temperature: float) -> jax.Array:
    return masked(logits, mask).astype(working_dtype(logits)) / temperature
