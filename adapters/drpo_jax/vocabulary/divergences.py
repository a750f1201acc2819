"""Divergences between two policies from logits: of the whole vocabulary, or of the recorded top-K tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from drpo_core import full_kl, full_tv, sampled_in_top_k, top_k_kl, top_k_tv
from drpo_core._checks import check_number
from drpo_jax._checks import (
    check_choice,
    check_float,
    check_head,
    check_integers,
    check_logits,
    check_shape,
    check_top_k_ids,
    working_dtype,
)
from drpo_jax._sharding import in_auto_mode
from drpo_jax.vocabulary.row_map import RowMap, Rows, check_temperatures, usable
from drpo_jax.vocabulary.shards import Shard
from drpo_jax.vocabulary.softmax import entries, masked, outside_vocabulary, poisoned

if TYPE_CHECKING:
    from typing import TypeAlias

    from drpo_jax.vocabulary.shards import Axis
    from drpo_jax.vocabulary.support import Support

__all__ = [
    "Divergences",
    "FullDivergence",
    "LinearHead",
    "TopKDivergence",
    "broken_tokens",
    "check_divergence",
    "check_full",
    "check_top_k",
    "counted_nowhere",
    "full_divergences",
    "keep_valid",
    "log_probs_at",
    "measure",
    "register_record",
    "repeated",
    "shard_of",
    "top_k_divergences",
    "with_usable_temperature",
]


_Record = TypeVar("_Record")


class Divergences(NamedTuple):
    """`tv`, a difference of probabilities in [0, 1], and `kl` = KL(μ‖π) in nats; per token."""

    tv: jax.Array
    kl: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["hidden", "weight", "bias"], meta_fields=["logit_softcap"])
@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """An LM head and its input, from which logits can be recomputed: cap·tanh((h Wᵀ + b)/cap); a pytree.

    Its arrays are checked where it is used, because JAX also builds pytrees whose leaves aren't arrays.

    Parameters
    ----------
    hidden
        Hidden states h, (…, H).
    weight, bias
        W, (V, H); and b, (V,), or None.
    logit_softcap
        cap > 0, a number in units of a logit; None for none.

    Raises
    ------
    TypeError
        If the soft-cap is not a number.
    ValueError
        If the soft-cap is not finite and positive.

    Examples
    --------
    >>> import jax
    >>> from drpo_jax import LinearHead
    >>> hidden, weight = jax.random.normal(jax.random.key(0), (4, 8)), jax.random.normal(jax.random.key(1), (10, 8))
    >>> head = LinearHead(hidden, weight, logit_softcap=30.0)
    """

    hidden: jax.Array
    weight: jax.Array
    bias: jax.Array | None = None
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        """Check the soft-cap and keep it as a Python float."""
        if self.logit_softcap is not None:
            object.__setattr__(self, "logit_softcap", check_number("logit_softcap", self.logit_softcap, above=0.0))

    def logits(self, dtype: Any) -> jax.Array:  # noqa: ANN401 -- a dtype of the namespace
        """cap·tanh((h Wᵀ + b)/cap), (…, V), accumulated in `dtype`."""
        return self.capped(self.uncapped(dtype))

    def uncapped(self, dtype: Any) -> jax.Array:  # noqa: ANN401 -- a dtype of the namespace
        """Logits before the soft-cap, h Wᵀ + b, accumulated in `dtype`."""
        z = jnp.einsum("...h,vh->...v", self.hidden, self.weight, preferred_element_type=dtype)
        return z if self.bias is None else z + jnp.broadcast_to(self.bias, z.shape).astype(z.dtype)

    def capped(self, z: jax.Array) -> jax.Array:
        """cap·tanh(z/cap)."""
        return z if self.logit_softcap is None else self.logit_softcap * jnp.tanh(z / self.logit_softcap)


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "behavior_log_prob"], meta_fields=["kind"])
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopKDivergence:
    """The divergence of ``DPPO(divergence="per_token")``, from recorded log μ of K tokens; a pytree.

    Its arrays are checked where it is used, because JAX also builds pytrees whose leaves aren't arrays.

    Parameters
    ----------
    kind
        ``"tv"`` or ``"kl"``.
    ids, behavior_log_prob
        Ids of the K recorded tokens and their log μ, nats; (…, K). An id that comes twice counts once, the first time.

    Raises
    ------
    ValueError
        If the kind is unknown.

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
        """Check the kind."""
        check_choice("kind", self.kind, ("tv", "kl"))


def register_record(record: type[_Record]) -> type[_Record]:
    """A decorator of records with a temperature, as pytrees: it is a leaf if it is an array, of one per token."""
    names = [field.name for field in fields(record)]  # type: ignore[arg-type]

    def flattened(instance: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[tuple[str, Any], ...]]:  # noqa: ANN401
        values = {name: getattr(instance, name) for name in names}
        static = {name: value for name, value in values.items() if isinstance(value, (str, float))}
        leaves = tuple((jax.tree_util.GetAttrKey(name), value) for name, value in values.items() if name not in static)
        return leaves, tuple(static.items())

    def unflattened(static: tuple[tuple[str, Any], ...], leaves: Any) -> Any:  # noqa: ANN401
        instance, known, others = object.__new__(record), dict(static), iter(leaves)
        for name in names:
            # without the checks: JAX also builds pytrees whose leaves aren't arrays
            object.__setattr__(instance, name, known[name] if name in known else next(others))
        return instance

    jax.tree_util.register_pytree_with_keys(record, flattened, unflattened)
    return record


@register_record
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FullDivergence:
    """The divergence of ``DPPO(divergence="per_token")``, over the whole vocabulary; a pytree.

    Its arrays are checked where it is used, because JAX also builds pytrees whose leaves aren't arrays.

    Parameters
    ----------
    kind
        ``"tv"`` or ``"kl"``.
    behavior
        Logits or log-probs of μ, (…, V), or the `LinearHead` to recompute them from, chunk by chunk.
    temperature
        μ is softmax(behavior / temperature): 1 for recorded log-probs; a number, or one per token, (…).

    Raises
    ------
    TypeError
        If the temperature is neither a number nor an array.
    ValueError
        If the kind is unknown, or the temperature is not finite and positive.

    Examples
    --------
    >>> import jax
    >>> from drpo_jax import FullDivergence
    >>> logits = jax.random.normal(jax.random.key(0), (4, 10))
    >>> recorded = FullDivergence(kind="kl", behavior=jax.nn.log_softmax(logits))
    """

    kind: str
    behavior: jax.Array | LinearHead
    temperature: float | jax.Array = 1.0

    def __post_init__(self) -> None:
        """Check the kind, and a temperature that is a number, and keep that as a Python float."""
        check_choice("kind", self.kind, ("tv", "kl"))
        if not isinstance(self.temperature, jax.Array):
            object.__setattr__(self, "temperature", check_number("temperature", self.temperature, above=0.0))


if TYPE_CHECKING:
    Divergence: TypeAlias = jax.Array | TopKDivergence | FullDivergence


def full_divergences(
    *,
    logits: jax.Array,
    behavior_logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    behavior_temperature: float | jax.Array | None = None,
    support: Support | None = None,
    vocabulary_size: int | None = None,
    vocabulary_axis: Axis | None = None,
) -> Divergences:
    """TV = ½ Σ_v abs(π(v) − μ(v)) and KL(μ‖π) = Σ_v μ(v) log(μ(v)/π(v)) of two policies; μ is constant.

    The backward pass recomputes what it needs from the logits. Both passes have arrays of the logits' shape in memory, which
    `docs/explanation/gpu.md` counts. A token whose temperature is not finite and positive, or whose support has an id
    outside the vocabulary, gets NaN.

    Parameters
    ----------
    logits, behavior_logits
        Logits of π and of μ, (…, V); −inf is a probability of 0. float16 and bfloat16 are computed in float32.
    temperature
        T > 0, a number, or an array (…) of one per token, constant: π = softmax(logits / T).
    behavior_temperature
        The temperature of μ, a number, or an array (…): None for that of π, 1 for recorded log-probs.
    support
        The ids that were sampled from, over which both policies are renormalised. None: all.
    vocabulary_size
        Logits of both from this id on are padding. None: there is none.
    vocabulary_axis
        See `drpo_jax.token_log_prob`; both policies' logits are divided.

    Returns
    -------
    Divergences
        `tv` and `kl`, (…), float32 at least.

    Raises
    ------
    TypeError
        If an array is not a JAX array or has a wrong dtype, or a number is none.
    ValueError
        If the shapes differ, or a number is out of its range.

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
    check_logits("logits", logits)
    check_float(behavior_logits=behavior_logits)
    check_shape("behavior_logits", behavior_logits, logits.shape, "logits")
    leading, of, width = logits.shape[:-1], "logits without its last axis", logits.shape[-1]
    replicated = {"temperature": temperature, "behavior_temperature": behavior_temperature, "support": support}
    shard = Shard.of(vocabulary_axis, {"logits": logits, "behavior_logits": behavior_logits}, replicated)
    row_map = RowMap.of(temperature, support, vocabulary_size, leading=leading, of=of, width=width, shard=shard)
    if isinstance(behavior_temperature, jax.Array):
        check_temperatures("behavior_temperature", behavior_temperature, leading, of)
        behavior_temperature = usable(behavior_temperature)
    elif behavior_temperature is not None:
        behavior_temperature = check_number("behavior_temperature", behavior_temperature, above=0.0)
    else:
        behavior_temperature = row_map.temperature if row_map.temperatures is None else row_map.temperatures
    recorded = FullDivergence(kind="kl", behavior=jax.lax.stop_gradient(behavior_logits), temperature=behavior_temperature)

    def run(logits: jax.Array, row_map: RowMap, recorded: FullDivergence) -> tuple[None, Divergences]:
        return None, _full_divergences(logits, recorded, row_map)

    _, result = in_auto_mode(run, logits, row_map, recorded)
    return result  # type: ignore[no-any-return]


def top_k_divergences(
    *,
    logits: jax.Array,
    log_normalizer: jax.Array,
    tokens: jax.Array,
    behavior_log_prob: jax.Array,
    top_k_ids: jax.Array,
    top_k_behavior_log_prob: jax.Array,
    temperature: float | jax.Array = 1.0,
    support: Support | None = None,
    vocabulary_size: int | None = None,
    vocabulary_axis: Axis | None = None,
) -> Divergences:
    """Top-K TV and KL(μ‖π) over K recorded tokens, the sampled one and one bucket for the rest.

    TV = ½ Σ_o abs(π(o) − μ(o)) and KL = Σ_o μ(o) log(μ(o)/π(o)) over these outcomes o. Reads K + 1 logits a token:
    `token_log_prob` gives the log-normaliser. Differentiable in reverse mode in the logits and the log-normaliser; μ is
    constant.

    An id outside [0, V), or a sampled token outside its support, makes both NaN at its position, and the derivatives that
    reach it. It never raises, because JAX does not know the ids while it traces.

    Parameters
    ----------
    logits
        Logits of π, (…, V).
    log_normalizer
        log Σ_v e^(logits(v)/T) over the support, nats, (…).
    tokens, behavior_log_prob
        Ids of the sampled tokens, in [0, V), and their log μ, nats; (…).
    top_k_ids, top_k_behavior_log_prob
        Ids of K tokens (usually μ's most likely ones), in [0, V), and their log μ, nats; (…, K). An id that comes twice
        counts once, the first time.
    temperature, support, vocabulary_size
        Those of `log_normalizer`. Outside the support, π and μ are 0, whatever is recorded.
    vocabulary_axis
        See `drpo_jax.token_log_prob`.

    Returns
    -------
    Divergences
        `tv` and `kl`, (…), float32 at least.

    Raises
    ------
    TypeError
        If an array is not a JAX array or has a wrong dtype, or a number is none.
    ValueError
        If shapes disagree, or a number is out of its range.

    References
    ----------
    arXiv:2602.04879 (DPPO); `drpo_core.top_k_tv` and `drpo_core.top_k_kl`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from drpo_jax import token_log_prob, top_k_divergences
    >>> logits, tokens = jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.array([0])
    >>> tv, _ = top_k_divergences(
    ...     logits=logits,
    ...     log_normalizer=token_log_prob(logits=logits, tokens=tokens).log_normalizer,
    ...     tokens=tokens,
    ...     behavior_log_prob=jnp.log(jnp.array([0.4])),
    ...     top_k_ids=jnp.array([[0]]),
    ...     top_k_behavior_log_prob=jnp.log(jnp.array([[0.4]])),
    ... )
    >>> round(tv.item(), 5)
    0.1
    """
    check_logits("logits", logits)
    recorded = TopKDivergence(kind="tv", ids=top_k_ids, behavior_log_prob=top_k_behavior_log_prob)
    leading, of = logits.shape[:-1], "logits without its last axis"
    check_float(log_normalizer=log_normalizer, behavior_log_prob=behavior_log_prob)
    check_integers(tokens=tokens)
    for name, array in (("tokens", tokens), ("log_normalizer", log_normalizer), ("behavior_log_prob", behavior_log_prob)):
        check_shape(name, array, leading, of)
    check_top_k(leading, "top_k_ids", recorded.ids, top_k_behavior_log_prob=recorded.behavior_log_prob)
    replicated: dict[str, Any] = {"log_normalizer": log_normalizer, "tokens": tokens, "behavior_log_prob": behavior_log_prob}
    replicated |= {"temperature": temperature, "support": support}
    shard = Shard.of(vocabulary_axis, {"logits": logits}, replicated | {"top_k_ids": recorded})
    row_map = RowMap.of(temperature, support, vocabulary_size, leading=leading, of=of, width=logits.shape[-1], shard=shard)

    def run(logits: jax.Array, row_map: RowMap, *arrays: Any) -> tuple[None, Divergences]:  # noqa: ANN401 -- those below
        return None, _top_k_divergences(logits, *arrays, rows=row_map.ready())

    behavior = jax.lax.stop_gradient((behavior_log_prob, recorded))
    _, result = in_auto_mode(run, logits, row_map, log_normalizer, tokens, *behavior)
    return result  # type: ignore[no-any-return]


def check_divergence(divergence: Divergence | None, leading: tuple[int, ...], vocabulary: int) -> None:
    """Raise for what is no divergence of tokens of this shape."""
    if isinstance(divergence, TopKDivergence):
        log_prob = {"divergence.behavior_log_prob": divergence.behavior_log_prob}
        check_top_k(leading, "divergence.ids", divergence.ids, **log_prob)
    elif isinstance(divergence, FullDivergence):
        check_full("divergence", divergence, leading, vocabulary)
    elif divergence is not None:
        check_float(divergence=divergence)
        check_shape("divergence", divergence, leading, "the tokens")


def check_full(name: str, record: Any, leading: tuple[int, ...], vocabulary: int) -> None:  # noqa: ANN401 -- to be checked
    """Raise unless a record has logits of the whole vocabulary, or a head that has them, for tokens of this shape."""
    if isinstance(record.temperature, jax.Array):
        check_temperatures(f"{name}.temperature", record.temperature, leading, "the tokens")
    name, behavior = f"{name}.behavior", record.behavior
    if not isinstance(behavior, LinearHead):
        check_float(**{name: behavior})
        check_shape(name, behavior, (*leading, vocabulary), "the tokens and the vocabulary, (…, V)")
        return
    prefix = f"{name}."
    check_head(behavior.hidden, behavior.weight, None, prefix=prefix)
    check_shape(f"{prefix}hidden", behavior.hidden, (*leading, *behavior.hidden.shape[-1:]), "the tokens and one more axis, H")
    if behavior.weight.shape[0] != vocabulary:
        msg = f"{prefix}weight: expected one row for each of the {vocabulary} tokens, got {behavior.weight.shape}"
        raise ValueError(msg)
    check_head(behavior.hidden, behavior.weight, behavior.bias, prefix=prefix)


def shard_of(axis: object, divided: dict[str, Any], replicated: dict[str, Any], **records: Any) -> Shard:  # noqa: ANN401
    """The device's part of the vocabulary, if what is given fits it; `hidden` is not divided, records are as they say."""
    replicated, divided = dict(replicated), dict(divided)
    if "hidden" in divided:
        replicated["hidden"] = divided.pop("hidden")
    for name, record in records.items():
        behavior = getattr(record, "behavior", None)
        if isinstance(behavior, LinearHead):
            divided |= {f"{name}.behavior.{part}": getattr(behavior, part) for part in ("weight", "bias")}
            replicated |= {f"{name}.behavior.hidden": behavior.hidden}
        else:
            (replicated if behavior is None else divided)[name] = record
    return Shard.of(axis, divided, replicated)


def keep_valid(mask: jax.Array, arrays: Any) -> Any:  # noqa: ANN401 -- a pytree
    """Per-token arrays, with a 0 in what masked tokens hold; of a `LinearHead`, only `hidden` is per token."""

    def kept(array: Any) -> Any:  # noqa: ANN401 -- an array or a head
        if isinstance(array, LinearHead):
            return replace(array, hidden=kept(array.hidden))
        return jnp.where(mask.reshape(*mask.shape, *(1,) * (array.ndim - mask.ndim)), array, jnp.zeros((), array.dtype))

    return jax.tree.map(kept, arrays, is_leaf=lambda leaf: isinstance(leaf, LinearHead))


def with_usable_temperature(record: Any) -> Any:  # noqa: ANN401 -- a divergence or a centring
    """The record, with NaN for temperatures that are not finite and positive."""
    temperature = getattr(record, "temperature", None)
    return replace(record, temperature=usable(temperature)) if isinstance(temperature, jax.Array) else record


def broken_tokens(tokens: jax.Array, records: Any, rows: Rows) -> jax.Array:  # noqa: ANN401 -- a pytree
    """True at tokens without a log-prob, and where a recorded id or temperature is not valid."""
    broken = rows.broken(tokens)
    for record in jax.tree.leaves(records, is_leaf=lambda leaf: hasattr(leaf, "temperature")):
        temperature = getattr(record, "temperature", None)
        broken = broken | jnp.isnan(temperature) if isinstance(temperature, jax.Array) else broken
    for ids in jax.tree.leaves(records):
        if jnp.issubdtype(ids.dtype, jnp.integer):
            broken = broken | jnp.any(outside_vocabulary(ids, rows.vocabulary), axis=-1)
    return broken


def measure(
    divergence: Divergence | None,
    *,
    logits: jax.Array,
    log_normalizer: jax.Array,
    tokens: jax.Array,
    behavior_log_prob: jax.Array,
    rows: Rows,
    mask: jax.Array | None = None,
) -> jax.Array | None:
    """The divergence per token that was asked for; checks nothing. The mask is that of the logits' rows."""
    if isinstance(divergence, FullDivergence):
        head = divergence.behavior
        behavior_logits = head.logits(working_dtype(head.hidden, head.weight)) if isinstance(head, LinearHead) else head
        both = _full_divergences(masked(logits, mask), replace(divergence, behavior=behavior_logits), rows)
    elif isinstance(divergence, TopKDivergence):
        both = _top_k_divergences(logits, log_normalizer, tokens, behavior_log_prob, divergence, rows=rows, mask=mask)
    else:
        return divergence
    return both.tv if divergence.kind == "tv" else both.kl


def _full_divergences(logits: jax.Array, recorded: FullDivergence, row_map: RowMap | Rows) -> Divergences:
    behavior: Any = recorded.behavior
    dtype, shard = working_dtype(logits, behavior), row_map.shard

    # differentiated as it stands, it would keep several arrays of the logits' shape
    @partial(jax.checkpoint, prevent_cse=False)
    def both(logits: jax.Array, recorded: Any, row_map: RowMap | Rows) -> Divergences:  # noqa: ANN401 -- with arrays of logits
        rows = row_map.ready()
        of_behavior = rows.at_temperature(recorded.temperature)
        x = shard.log_softmax(rows.repaired().logits(logits.astype(dtype)))
        b = shard.log_softmax(of_behavior.repaired().logits(recorded.behavior.astype(dtype)))
        # sums over columns
        found = Divergences(shard.total(full_tv(x, b, xp=jnp)), shard.total(full_kl(x, b, xp=jnp)))
        for unusable in (rows.unusable, of_behavior.unusable):
            found = found if unusable is None else Divergences(*(poisoned(each, unusable) for each in found))
        return found

    return both(logits, recorded, row_map)  # type: ignore[no-any-return]


def _top_k_divergences(
    logits: jax.Array,
    log_normalizer: jax.Array,
    tokens: jax.Array,
    behavior_log_prob: jax.Array,
    recorded: TopKDivergence,
    *,
    rows: Rows,
    mask: jax.Array | None = None,
) -> Divergences:
    broken = broken_tokens(tokens, recorded, rows)

    def log_prob(ids: jax.Array) -> jax.Array:
        return log_probs_at(logits, ids, log_normalizer, rows=rows.repaired(), mask=mask)

    nothing = counted_nowhere(recorded.ids, rows)
    both = tuple(
        function(
            log_prob(tokens[..., None])[..., 0],
            behavior_log_prob,
            # an outcome without mass under either policy adds nothing
            top_k_log_prob=jnp.where(nothing, -jnp.inf, log_prob(recorded.ids)),
            top_k_behavior_log_prob=jnp.where(nothing, -jnp.inf, recorded.behavior_log_prob),
            sampled_in_top_k=sampled_in_top_k(tokens, recorded.ids, xp=jnp),
            xp=jnp,
        )
        for function in (top_k_tv, top_k_kl)
    )
    return Divergences(*(poisoned(x, broken) for x in both))


def log_probs_at(
    logits: jax.Array, ids: jax.Array, log_normalizer: jax.Array, *, rows: Rows, mask: jax.Array | None
) -> jax.Array:
    """log π at ids (…, K), differentiable in the logits and the log-normaliser; a constant −∞ outside the support."""  # noqa: D403
    dtype = working_dtype(logits, log_normalizer)
    log_probs = rows.over_temperature(entries(logits, ids, mask, rows.shard).astype(dtype)) - log_normalizer[..., None].astype(
        dtype
    )
    holds = rows.holds(ids)
    return log_probs if holds is None else jnp.where(holds, log_probs, -jnp.inf)


def counted_nowhere(ids: jax.Array, rows: Rows) -> jax.Array:
    """True where a recorded id (…, K) has occurred before in its row, or is outside the support, which is that of μ too."""
    holds = rows.holds(ids)
    return repeated(ids) if holds is None else repeated(ids) | ~holds


def repeated(ids: jax.Array) -> jax.Array:
    """True where an id has occurred before in its row; comparisons that fuse, not an array of (…, K, K)."""
    earlier = jnp.tril(jnp.ones((ids.shape[-1], ids.shape[-1]), bool), -1)
    return jnp.any((ids[..., :, None] == ids[..., None, :]) & jnp.broadcast_to(earlier, (*ids.shape, ids.shape[-1])), axis=-1)


def check_top_k(leading: tuple[int, ...], name: str, ids: jax.Array, **log_probs: jax.Array) -> None:
    """Raise unless ids and log-probs are of K tokens at each position; names are those of the arguments."""
    check_top_k_ids(name, ids, leading)
    check_float(**log_probs)
    for of, log_prob in log_probs.items():
        check_shape(of, log_prob, ids.shape, name)
