"""Log-probs of the sampled tokens and of K others, entropies and log-normalisers, without a log-softmax."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from drpo_core._checks import check_mask, check_number
from drpo_jax._checks import (
    check_head,
    check_integers,
    check_jax_arrays,
    check_logits,
    check_shape,
    check_top_k_ids,
    working_dtype,
)
from drpo_jax._sharding import in_auto_mode, varying_like
from drpo_jax.vocabulary.chunks import Gradients, HeadSums, Needed, before_softcap, chunk_size, over_chunks, primals
from drpo_jax.vocabulary.divergences import LinearHead
from drpo_jax.vocabulary.most_probable import most_probable
from drpo_jax.vocabulary.row_map import RowMap, Rows
from drpo_jax.vocabulary.shards import Shard
from drpo_jax.vocabulary.softmax import Normalized, at_entries, entries, masked, outside_vocabulary

if TYPE_CHECKING:
    from drpo_jax.vocabulary.shards import Axis
    from drpo_jax.vocabulary.support import Support

__all__ = ["TokenLogProb", "linear_log_prob", "selected_log_prob", "token_log_prob"]


class TokenLogProb(NamedTuple):
    """Per token, in nats, 0 where the mask is False.

    `log_prob` is that of the sampled token, `entropy` that of its distribution (or None), `log_normalizer` is
    log Σ_v e^x(v) of its logits x; `top_k_log_prob` those of the `top_k_ids` (…, K), int32, that were given or found, or None.
    """

    log_prob: jax.Array
    entropy: jax.Array | None
    log_normalizer: jax.Array
    top_k_log_prob: jax.Array | None
    top_k_ids: jax.Array | None


def token_log_prob(
    *,
    logits: jax.Array,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    top_k_ids: jax.Array | None = None,
    top_k: int | None = None,
    temperature: float | jax.Array = 1.0,
    support: Support | None = None,
    vocabulary_size: int | None = None,
    entropy: bool = False,
    vocabulary_axis: Axis | None = None,
) -> TokenLogProb:
    """Log-prob log π(token) = x(token) − log Σ_v e^x(v), x = logits/T, of each sampled token, differentiable in reverse mode.

    With a support S, x(v) = −∞ outside it: log π_S(token) = x(token) − log Σ_{v∈S} e^x(v).

    The backward pass forms the gradient in one expression, from the logits and the per-token results; nothing else of
    the logits' size is kept. A row that no cotangent reaches has a gradient of 0, whatever it holds.

    An id outside [0, V), or outside its support, at a valid token gives a log-prob of NaN and a row of NaN as its gradient
    (0 outside the support). It never raises, because JAX does not know the ids while it traces.

    Parameters
    ----------
    logits
        (…, V); −inf is a probability of 0. float16 and bfloat16 are computed in float32.
    tokens
        Ids of the sampled tokens, (…), in [0, V); anything where the mask is False.
    mask
        Boolean, (…), True at tokens that count; the logits of the others may hold anything. None: every token counts.
    top_k_ids
        Ids of K more tokens for each, (…, K), whose log-probs are wanted too: −∞, with a gradient of 0, outside the support.
    top_k
        Instead of these, K: the K most probable tokens of the policy itself, from 1 to the vocabulary's size. Their ids are
        constants. They come by decreasing logit, before a soft-cap and a temperature, and of equal logits the lower id
        first, however tokens and vocabulary are divided. Where fewer than K have a probability, because of the support or of
        logits of −∞, the others follow, the lower id first, with a log-prob of −∞ whose gradient is 0. A row that holds a
        NaN has log-probs of NaN, of any ids.
    temperature
        T > 0, a number, or an array (…) of one per token, constant: π = softmax(logits / T).
    support
        The ids that the tokens were sampled from (top-p, top-k, min-p), over which π is renormalised. None: all.
    vocabulary_size
        Logits from this id on are padding, which has no probability and a gradient of exactly 0. None: there is none.
    entropy
        Also compute the entropy −Σ_v π(v) log π(v).
    vocabulary_axis
        Vocabulary-parallel, inside `jax.shard_map`: the mesh axis, or axes, along which the columns of the logits are divided.
        Its devices have the same of everything else, and get the same results. See `docs/how-to/tensor-parallelism.md`.

    Returns
    -------
    TokenLogProb
        `log_prob`, `entropy` and `log_normalizer` = log Σ_v e^x(v), nats, (…), and `top_k_log_prob`, (…, K);
        float32 at least, each differentiable. `top_k_ids`, (…, K).

    Raises
    ------
    TypeError
        If an array is not a JAX array or has a wrong dtype, or a number is none.
    ValueError
        If shapes disagree, a number is out of its range, `top_k` and `top_k_ids` are both given, or an array is divided along
        the `vocabulary_axis` that must not be, or isn't.

    See Also
    --------
    drpo_jax.linear_log_prob : the same from hidden states, where the logits never exist as a whole.
    drpo_jax.logits_policy_loss : the policy loss of these log-probs.

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

    The two most probable tokens:

    >>> found = token_log_prob(logits=jnp.log(jnp.array([[0.5, 0.3, 0.2]])), tokens=jnp.array([2]), top_k=2)
    >>> found.top_k_ids.tolist()
    [[0, 1]]
    """
    check_logits("logits", logits)
    leading, of = logits.shape[:-1], "logits without its last axis"
    _check_columns(tokens, mask, top_k_ids, leading, of)
    replicated = {"tokens": tokens, "mask": mask, "top_k_ids": top_k_ids, "temperature": temperature, "support": support}
    shard = Shard.of(vocabulary_axis, {"logits": logits}, replicated)
    row_map = RowMap.of(temperature, support, vocabulary_size, leading=leading, of=of, width=logits.shape[-1], shard=shard)

    top_k = _check_top_k(top_k, top_k_ids, row_map.vocabulary)

    def run(
        logits: jax.Array, row_map: RowMap, tokens: jax.Array, mask: jax.Array | None, top_k_ids: jax.Array | None
    ) -> tuple[None, TokenLogProb]:
        return None, selected_log_prob(row_map, entropy, logits, tokens, top_k_ids, mask, top_k)

    _, result = in_auto_mode(run, logits, row_map, tokens, mask, top_k_ids)
    return result  # type: ignore[no-any-return]


def linear_log_prob(
    *,
    hidden: jax.Array,
    weight: jax.Array,
    tokens: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    top_k_ids: jax.Array | None = None,
    top_k: int | None = None,
    temperature: float | jax.Array = 1.0,
    support: Support | None = None,
    vocabulary_size: int | None = None,
    logit_softcap: float | None = None,
    entropy: bool = False,
    chunk_tokens: int | None = None,
    vocabulary_axis: Axis | None = None,
) -> TokenLogProb:
    """Log-prob log π of each sampled token from hidden states and the LM head, π = softmax(cap·tanh((h Wᵀ + b)/cap) / T).

    Any loss follows from it, differentiable in `hidden`, `weight` and `bias`. Logits exist for a chunk of tokens at a time,
    in the forward pass and in the backward pass, which takes the products again: four matrix products a chunk, where
    `drpo_jax.linear_policy_loss` needs three. No gradient is formed for an array that isn't differentiated. Masked tokens
    cost nothing, nor do tokens that no cotangent reaches in the backward pass: their gradient is 0, whatever they hold.

    First derivatives are in reverse mode, second ones in forward mode over them (`jax.jvp` of `jax.grad`).
    Meant to be called under `jit`. Works under `shard_map` over the tokens, which is faster than a sharded batch under
    `jit`.

    An id outside [0, V), or outside its support, at a valid token gives a log-prob of NaN, and NaN as the gradient of that
    token if a cotangent reaches it. It never raises, because JAX does not know the ids while it traces.

    Parameters
    ----------
    hidden
        Last hidden states, (…, H); anything where the mask is False.
    weight, bias
        W and b of the LM head, (V, H) and (V,); no bias if None. Products are accumulated in float32 at least.
    tokens, mask, top_k_ids, top_k, temperature, support
        See `drpo_jax.token_log_prob`.
    vocabulary_size
        Rows of the head from this id on are padding. None: there is none.
    logit_softcap
        cap > 0, a number in units of a logit; None for none.
    entropy
        Also compute the entropy −Σ_v π(v) log π(v).
    chunk_tokens
        How many tokens' logits exist at once. None: 256 where JAX's default backend is the CPU, 2,048 elsewhere.
    vocabulary_axis
        See `drpo_jax.linear_policy_loss`.

    Returns
    -------
    TokenLogProb
        `log_prob`, `entropy` and `log_normalizer`, nats, (…), and `top_k_log_prob`, (…, K); float32 at least, each
        differentiable. `top_k_ids`, (…, K).

    Raises
    ------
    TypeError
        If an array is not a JAX array or has a wrong dtype, or a number is none.
    ValueError
        If shapes disagree, a number is out of its range, `top_k` and `top_k_ids` are both given, or an array is divided along
        the `vocabulary_axis` that must not be, or isn't.

    See Also
    --------
    drpo_jax.linear_policy_loss : a policy loss from the same in three products.

    Examples
    --------
    A penalty on the entropy of the policy, beside its log-probs:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from drpo_jax import linear_log_prob
    >>> def loss(weight):
    ...     found = linear_log_prob(hidden=jnp.eye(3)[:1], weight=weight, tokens=jnp.array([0]), entropy=True)
    ...     return jnp.sum(found.log_prob - 0.1 * found.entropy)
    >>> gradient = jax.grad(loss)(jnp.tile(jnp.log(jnp.array([[0.5], [0.3], [0.2]])), 3))
    >>> [round(g, 4) for g in gradient[:, 0].tolist()]
    [0.5168, -0.3052, -0.2116]
    """
    if logit_softcap is not None:
        logit_softcap = check_number("logit_softcap", logit_softcap, above=0.0)
    size = chunk_size(chunk_tokens)
    check_head(hidden, weight, bias)
    leading, of = hidden.shape[:-1], "hidden without its last axis"
    _check_columns(tokens, mask, top_k_ids, leading, of)
    replicated: dict[str, Any] = {"hidden": hidden, "tokens": tokens, "mask": mask, "top_k_ids": top_k_ids}
    replicated |= {"temperature": temperature, "support": support}
    shard = Shard.of(vocabulary_axis, {"weight": weight, "bias": bias}, replicated)
    row_map = RowMap.of(temperature, support, vocabulary_size, leading=leading, of=of, width=weight.shape[0], shard=shard)
    top_k = _check_top_k(top_k, top_k_ids, row_map.vocabulary)
    head = _Head(logit_softcap, entropy, top_k, min(size, max(1, tokens.size)), shard)

    def run(
        hidden: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None,
        row_map: RowMap,
        tokens: jax.Array,
        mask: jax.Array | None,
        top_k_ids: jax.Array | None,
    ) -> tuple[None, TokenLogProb]:
        columns = _columns(tokens, top_k_ids, row_map.vocabulary)
        valid = jnp.ones(leading, dtype=bool) if mask is None else mask
        spread = partial(varying_like, (hidden, columns, valid, row_map))
        hidden, weight = spread(hidden), spread(row_map.of_head(weight))
        bias = None if bias is None else spread(row_map.of_head(bias))
        found, columns = _linear_log_prob(head, hidden, weight, bias, columns, valid, row_map)
        return None, found.named(columns, top_k_ids, top_k, mask)

    _, result = in_auto_mode(run, hidden, weight, bias, row_map, tokens, mask, top_k_ids)
    return result  # type: ignore[no-any-return]


def selected_log_prob(
    row_map: RowMap,
    entropy: bool,  # noqa: FBT001
    logits: jax.Array,
    tokens: jax.Array,
    top_k_ids: jax.Array | None,
    mask: jax.Array | None,
    top_k: int | None = None,
) -> TokenLogProb:
    """`token_log_prob` of checked arrays."""
    columns = masked(_columns(tokens, top_k_ids, row_map.vocabulary), mask)
    logits = varying_like((columns, mask, row_map), logits, but=row_map.shard.axes)
    row_map = row_map.kept(mask)
    if top_k is not None:
        columns = _with_ids(columns, masked(most_probable(masked(logits, mask), row_map.ready(), top_k), mask))
    return _token_log_prob(entropy, logits, columns, mask, row_map).named(columns, top_k_ids, top_k, mask)


def _check_columns(
    tokens: jax.Array, mask: jax.Array | None, top_k_ids: jax.Array | None, leading: tuple[int, ...], of: str
) -> None:
    check_integers(tokens=tokens)
    check_shape("tokens", tokens, leading, of)
    check_jax_arrays(mask=mask)
    if mask is not None:
        check_mask(mask, "tokens", tokens, xp=jnp)
    if top_k_ids is not None:
        check_top_k_ids("top_k_ids", top_k_ids, leading)


def _check_top_k(top_k: object, top_k_ids: jax.Array | None, vocabulary: int) -> int | None:
    """The number of most probable tokens that are wanted."""
    if top_k is None:
        return None
    if top_k_ids is not None:
        msg = f"top_k: expected None beside top_k_ids, got {top_k!r}; give the ids, or how many are to be found"
        raise ValueError(msg)
    return int(check_number("top_k", top_k, at_least=1, at_most=vocabulary, whole=True))


def _with_ids(columns: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.concatenate((columns, ids), axis=-1)


def _columns(tokens: jax.Array, top_k_ids: jax.Array | None, vocabulary: int) -> jax.Array:
    """Ids whose log-probs are wanted, that of the sampled token first, (…, 1 or 1 + K), as int32; −1 if outside."""
    ids = [tokens[..., None]] if top_k_ids is None else [tokens[..., None], top_k_ids]
    known = [jnp.where(outside_vocabulary(i, vocabulary), -1, i.astype(jnp.int32)) for i in ids]
    return jnp.concatenate(known, axis=-1)


class _Found(NamedTuple):
    """log π at the columns (…, C), H or None, and log Z, (…): of tokens, or cotangents of these."""

    log_probs: jax.Array
    entropy: jax.Array | None
    log_normalizer: jax.Array

    def named(
        self, columns: jax.Array, top_k_ids: jax.Array | None, top_k: int | None, mask: jax.Array | None
    ) -> TokenLogProb:
        """The results, with those of the K ids that were given, or of the `top_k` that follow that of the sampled token."""
        log_probs, ids = None, None
        if top_k_ids is not None:
            log_probs, ids = self.log_probs[..., 1:], masked(top_k_ids.astype(jnp.int32), mask)
        elif top_k is not None:
            log_probs, ids = self.log_probs[..., 1:], columns[..., 1:]
            # what has no probability is a constant
            log_probs = jnp.where(log_probs == -jnp.inf, -jnp.inf, log_probs)
        return TokenLogProb(self.log_probs[..., 0], self.entropy, self.log_normalizer, log_probs, ids)

    @property
    def reached(self) -> jax.Array:
        """Which tokens have a cotangent."""
        some = jnp.any(self.log_probs != 0.0, axis=-1) | (self.log_normalizer != 0.0)
        return some if self.entropy is None else some | (self.entropy != 0.0)


class _Statistics(NamedTuple):
    """Of a softmax: the maximum, log Σ e^(z − maximum), and the entropy if it was asked for; (…)."""

    top: jax.Array
    log_total: jax.Array
    entropy: jax.Array | None


def _usable(columns: jax.Array, rows: Rows) -> jax.Array:
    """The columns, and −1 for a sampled token that is outside its support."""
    if rows.holds(columns) is None and rows.unusable is None:
        return columns
    broken = rows.broken(columns[..., 0])
    sampled = jnp.where(broken, -1, columns[..., 0])
    return jnp.concatenate((sampled[..., None], columns[..., 1:]), axis=-1)


def _measured(
    z: jax.Array, chosen: jax.Array, columns: jax.Array, rows: Rows, *, entropy: bool
) -> tuple[jax.Array, _Statistics]:
    """log π of the chosen entries of the logits, NaN where a column is outside the vocabulary; and the statistics."""  # noqa: D403
    policy = Normalized.of(rows.logits(z), rows.shard)
    log_probs = jnp.where(_usable(columns, rows) < 0, jnp.nan, policy.log_prob(rows.at(chosen, columns)))
    return log_probs, _Statistics(policy.top, policy.log_total, policy.entropy if entropy else None)


def _pulled(z: jax.Array, columns: jax.Array, statistics: _Statistics, cotangents: _Found, rows: Rows) -> jax.Array:
    """(Σ_c g_c (1[c] − π) + n π − h π (log π + H)) / T, ∂loss/∂z of cotangents g of log π, n of log Z and h of H.

    0 in a row that no cotangent reaches, whatever it holds; and 0 outside the support, whose log π = −∞ is a constant.
    """
    log_probs = (rows.logits(z) - statistics.top[..., None]) - statistics.log_total[..., None]
    probability = jnp.exp(log_probs)
    g, holds = cotangents.log_probs, rows.holds(columns)
    if holds is not None:
        g = jnp.where(holds, g, 0.0)
    g = jnp.where((_usable(columns, rows) < 0) & (cotangents.log_probs != 0.0), jnp.nan, g)
    scale = cotangents.log_normalizer - jnp.sum(g, axis=-1)
    gradient = at_entries(g, columns, log_probs, rows.shard) + probability * scale[..., None]
    if statistics.entropy is not None and cotangents.entropy is not None:
        surprise = jnp.where(probability > 0.0, log_probs, 0.0) + statistics.entropy[..., None]
        gradient = gradient - cotangents.entropy[..., None] * probability * surprise
    return rows.within(jnp.where(cotangents.reached[..., None], rows.over_temperature(gradient), 0.0))


def _where(mask: jax.Array | None, found: _Found) -> _Found:
    """The results or cotangents, and 0 at masked tokens."""
    if mask is None:
        return found
    return jax.tree.map(lambda a: jnp.where(mask.reshape(*mask.shape, *(1,) * (a.ndim - mask.ndim)), a, 0.0), found)  # type: ignore[no-any-return]


# --- from logits -----------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_log_prob(
    entropy: bool,  # noqa: FBT001
    logits: jax.Array,
    columns: jax.Array,
    mask: jax.Array | None,
    row_map: RowMap,
) -> _Found:
    return _forward(entropy, logits, columns, mask, row_map)[0]


class _Kept(NamedTuple):
    """What the backward pass is given: the logits as they came, and per-token arrays."""

    logits: jax.Array
    columns: jax.Array
    mask: jax.Array | None
    statistics: _Statistics
    row_map: RowMap


def _working(logits: jax.Array, mask: jax.Array | None) -> jax.Array:
    return masked(logits, mask).astype(working_dtype(logits))


def _forward(
    entropy: bool,  # noqa: FBT001
    logits: jax.Array,
    columns: jax.Array,
    mask: jax.Array | None,
    row_map: RowMap,
) -> tuple[_Found, _Kept]:
    z = _working(logits, mask)
    chosen = entries(logits, columns, mask, row_map.shard).astype(z.dtype)
    log_probs, statistics = _measured(z, chosen, columns, row_map.ready(), entropy=entropy)
    found = _Found(log_probs, statistics.entropy, statistics.top + statistics.log_total)
    return _where(mask, found), _Kept(logits, columns, mask, statistics, row_map)


def _backward(
    entropy: bool,  # noqa: ARG001, FBT001 -- whether there is one shows in what was kept
    kept: _Kept,
    cotangents: _Found,
) -> tuple[jax.Array, None, None, None]:
    logits, columns, mask, statistics, row_map = kept
    gradient = _pulled(_working(logits, mask), columns, statistics, _where(mask, cotangents), row_map.ready())
    return gradient.astype(logits.dtype), None, None, None


_token_log_prob.defvjp(_forward, _backward)


# --- from the head ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Head:
    """What is done to a chunk, apart from its arrays."""

    logit_softcap: float | None
    entropy: bool
    top_k: int | None
    chunk: int
    shard: Shard

    def logits(self, hidden: jax.Array, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Logits, and z = h Wᵀ + b."""
        head = LinearHead(hidden, weight, bias, self.logit_softcap)
        z = head.uncapped(working_dtype(hidden, weight))
        return head.capped(z), z


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_log_prob(
    head: _Head,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    columns: jax.Array,
    mask: jax.Array,
    row_map: RowMap,
) -> tuple[_Found, jax.Array]:
    found, columns, _ = _head_forward(head, hidden, weight, bias, columns, mask, row_map)
    return found, columns


def _head_forward(
    head: _Head,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    columns: jax.Array,
    mask: jax.Array,
    row_map: RowMap,
) -> tuple[_Found, jax.Array, _Statistics]:
    """What is found, the columns it is of, with the most probable ones if they are wanted, and the statistics."""
    per_token, support_ids = row_map.apart()
    wanted = (columns.shape[-1] + (head.top_k or 0),)
    shapes: dict[str, tuple[int, ...]] = {"log_probs": wanted, "top": (), "log_total": ()}
    shapes |= {"entropy": ()} if head.entropy else {}
    integers = {} if head.top_k is None else {"columns": wanted}

    def of_chunk(
        sums: None, taken: tuple[jax.Array, tuple[jax.Array, RowMap]], _: jax.Array
    ) -> tuple[None, dict[str, jax.Array]]:
        h, (ids, chunk_map) = taken
        logits, z = head.logits(h, weight, bias)
        rows = chunk_map.of_chunk(support_ids)
        if head.top_k is not None:
            ids = _with_ids(ids, most_probable(z, rows, head.top_k, softcap=head.logit_softcap))
        log_probs, statistics = _measured(logits, entries(logits, ids, None, head.shard), ids, rows, entropy=head.entropy)
        return sums, {"log_probs": log_probs, "columns": ids} | statistics._asdict()

    taken = (columns, per_token)
    dtype = working_dtype(hidden, weight)
    chunked: dict[str, Any] = {"chunk": head.chunk, "shapes": shapes, "dtype": dtype, "integers": integers}
    _, figures = over_chunks(of_chunk, None, hidden, taken, mask, **chunked)
    statistics = _Statistics(figures["top"], figures["log_total"], figures.get("entropy"))
    found = _Found(figures["log_probs"], statistics.entropy, statistics.top + statistics.log_total)
    return found, figures.get("columns", columns), statistics


def _head_kept(head: _Head, *arguments: Any) -> tuple[tuple[_Found, jax.Array], tuple[Any, ...]]:  # noqa: ANN401
    hidden, weight, bias, columns, mask, row_map = primals(arguments)
    found, columns, statistics = _head_forward(head, hidden, weight, bias, columns, mask, row_map)
    return (found, columns), (Needed.by(*arguments[:3]), (hidden, weight, bias, columns, mask, row_map), statistics)


def _head_backward(head: _Head, kept: tuple[Any, ...], of_results: tuple[_Found, Any]) -> tuple[Any, ...]:
    cotangents, _ = of_results
    needed, (hidden, weight, bias, columns, mask, row_map), statistics = kept
    per_token, support_ids = row_map.apart()
    dtype = working_dtype(hidden, weight)

    def instantiated(cotangent: Any) -> Any:  # noqa: ANN401 -- an array or its symbolic zero
        zero = isinstance(cotangent, SymbolicZero)
        return jnp.zeros_like(hidden, dtype=dtype, shape=cotangent.shape) if zero else cotangent

    of_entropy: Any = cotangents.entropy
    cotangents = _Found(
        instantiated(cotangents.log_probs),
        # nothing is computed for one that is known to be 0
        None if isinstance(of_entropy, SymbolicZero) else of_entropy,
        instantiated(cotangents.log_normalizer),
    )

    def of_chunk(
        sums: HeadSums, taken: tuple[jax.Array, tuple[jax.Array, _Statistics, _Found, RowMap]], _: jax.Array
    ) -> tuple[HeadSums, dict[str, jax.Array]]:
        h, (ids, of_softmax, pulled, chunk_map) = taken
        logits, z = head.logits(h, weight, bias)
        of_logits = _pulled(logits, ids, of_softmax, pulled, chunk_map.of_chunk(support_ids))
        return sums.plus(before_softcap(of_logits, z, head.logit_softcap), h, weight, needed, head.shard)

    head_sums, of_hidden = over_chunks(
        of_chunk,
        HeadSums.zeros(needed, hidden, weight),
        hidden,
        (columns, statistics, cotangents, per_token),
        # what holds a NaN and has no cotangent is not taken
        mask & cotangents.reached,
        chunk=head.chunk,
        shapes={"hidden": hidden.shape[-1:]} if needed.hidden else {},
        dtype=dtype,
    )
    return *Gradients(of_hidden.get("hidden"), *head_sums).cast(hidden, weight, bias), None, None, None


_linear_log_prob.defvjp(_head_kept, _head_backward, symbolic_zeros=True)
