"""From hidden states and the LM head to a policy loss and its gradients; (tokens × vocabulary) logits never exist."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from drpo_core import token_diagnostics, token_loss_and_gradient, token_mean
from drpo_jax.checks import check_float, check_jax_arrays, check_positive, check_shape, working_dtype
from drpo_jax.divergence import FullDivergence, LinearHead, TopKDivergence, check_divergence, measure
from drpo_jax.loss import coefficients_of
from drpo_jax.vocabulary import VocabularyLoss, check_tokens, entropy_of, normalize, one_hot, select

if TYPE_CHECKING:
    from drpo_core import Objective
    from drpo_core.reduction import Reduction

__all__ = ["linear_policy_loss"]

# rows of ∂weight that a chunk adds to at a time: a product of its own size would be a second ∂weight
_WEIGHT_ROWS = 8192


def linear_policy_loss(
    objective: Objective,
    *,
    hidden: jax.Array,
    weight: jax.Array,
    tokens: jax.Array,
    behavior_log_prob: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None = None,
    reduction: Reduction = token_mean,
    normalizer: float | jax.Array | None = None,
    token_weights: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    divergence: jax.Array | TopKDivergence | FullDivergence | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    entropy: bool = False,
    chunk_tokens: int = 256,
) -> VocabularyLoss:
    """Policy loss of tokens from hidden states and the LM head, π = softmax(cap·tanh((h Wᵀ + b)/cap) / T).

    The gradients ∂hidden, ∂weight and ∂bias are formed in the forward pass, one chunk of tokens after the other, with
    three matrix products a chunk. Masked tokens are left out. No gradient is formed for an array that isn't
    differentiated, such as a frozen head. Reverse mode only; meant to be called under `jit`. Works under `shard_map`
    over the tokens.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``.
    hidden
        Last hidden states, (…, H); anything where the mask is False.
    weight, bias
        Of the LM head, (V, H) and (V,). Products are accumulated in float32 at least.
    tokens
        Ids of the sampled tokens, (…); anything where the mask is False.
    behavior_log_prob, advantages
        log μ (nats, ≤ 0) and A of the sampled tokens; (…).
    mask
        Boolean, (…), True at tokens that count.
    reduction, normalizer, token_weights, segment_ids
        See `drpo_jax.policy_loss`; the reduction is one of drpo_core's.
    divergence
        For ``DPPO(divergence="per_token")``: a divergence per token, or a `TopKDivergence` or `FullDivergence` to measure
        chunk by chunk. A `LinearHead` in it takes another chunk of logits.
    temperature
        T > 0.
    logit_softcap
        cap > 0; None for none.
    entropy
        Whether to return the entropies too.
    chunk_tokens
        How many tokens' logits exist at once.

    Returns
    -------
    VocabularyLoss
        `loss` (0-d, float32 at least), `diagnostics`, `log_prob` and `entropy`.

    Raises
    ------
    TypeError
        If a dtype or the reduction is wrong.
    ValueError
        If shapes disagree, or a number is out of its range.

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
    check_float(hidden=hidden, weight=weight)
    vocabulary, leading = weight.shape[0], hidden.shape[:-1]
    check_shape("weight", weight, (vocabulary, hidden.shape[-1]))
    if bias is not None:
        check_float(bias=bias)
        check_shape("bias", bias, (vocabulary,))
    check_tokens(leading, tokens, behavior_log_prob, advantages, mask)
    check_divergence(divergence, leading, vocabulary)
    check_jax_arrays(token_weights=token_weights, segment_ids=segment_ids)
    check_positive(temperature=temperature, logit_softcap=logit_softcap)
    if chunk_tokens < 1:
        msg = f"chunk_tokens: expected 1 or more, got {chunk_tokens!r}"
        raise ValueError(msg)
    options = {"normalizer": normalizer, "token_weights": token_weights, "segment_ids": segment_ids}
    coefficients = coefficients_of(reduction, mask, working_dtype(hidden, weight), options)

    def flat(array: jax.Array, trailing: int = 0) -> jax.Array:
        return jax.lax.stop_gradient(array).reshape(-1, *array.shape[array.ndim - trailing :])

    # of a recorded head, only the hidden states are per token
    behavior_head = None
    if isinstance(divergence, FullDivergence) and isinstance(divergence.behavior, LinearHead):
        behavior_head = divergence.behavior
        divergence = replace(divergence, behavior=behavior_head.hidden)
    rows = {
        "tokens": flat(tokens),
        "behavior_log_prob": flat(behavior_log_prob),
        "advantages": flat(advantages),
        "coefficients": flat(jnp.broadcast_to(coefficients, leading)),
        "divergence": jax.tree.map(lambda a: flat(a, a.ndim - len(leading)), divergence),
    }
    step = _Step(objective, temperature, logit_softcap, entropy, min(chunk_tokens, max(1, mask.size)))
    loss, measured = _with_gradients(
        step,
        hidden.reshape(-1, hidden.shape[-1]),
        _varying_like(hidden, weight),
        None if bias is None else _varying_like(hidden, bias),
        flat(mask),
        rows,
        jax.lax.stop_gradient(behavior_head),
    )
    per_token = {name: jax.lax.stop_gradient(array).reshape(leading) for name, array in measured.items()}
    statistics = token_diagnostics(
        objective,
        per_token["log_prob"],
        *(jax.lax.stop_gradient(array) for array in (behavior_log_prob, advantages)),
        mask=mask,
        divergence=per_token.get("divergence"),
        xp=jnp,
    )
    return VocabularyLoss(loss, statistics, per_token["log_prob"], per_token.get("entropy"))


class _Gradients(NamedTuple):
    """∂loss/∂ each differentiable input; None for those that need none."""

    hidden: jax.Array | None
    weight: jax.Array | None
    bias: jax.Array | None


class _Step(NamedTuple):
    """What is done to a chunk, apart from its arrays."""

    objective: Objective
    temperature: float
    logit_softcap: float | None
    entropy: bool
    chunk: int

    def values(
        self, head: LinearHead, rows: dict[str, Any], behavior_head: LinearHead | None
    ) -> tuple[dict[str, jax.Array], jax.Array, jax.Array, jax.Array]:
        """Per token what is measured; c ∂L/∂log π; the softmax; the logits before the temperature."""
        logits = head.logits(working_dtype(head.hidden, head.weight))
        log_normalizer, probability = normalize(logits / self.temperature)
        log_prob = select(logits, rows["tokens"]) / self.temperature - log_normalizer
        divergence = rows["divergence"]
        if behavior_head is not None:
            divergence = replace(divergence, behavior=replace(behavior_head, hidden=divergence.behavior))
        divergence = measure(
            divergence,
            logits=logits,
            log_normalizer=log_normalizer,
            tokens=rows["tokens"],
            behavior_log_prob=rows["behavior_log_prob"],
            temperature=self.temperature,
        )
        result = token_loss_and_gradient(
            self.objective, log_prob, rows["behavior_log_prob"], rows["advantages"], divergence=divergence, xp=jnp
        )
        # by selection: a weight of 0 stops the gradient whatever its coefficient is
        slope = jnp.where(result.gradient == 0.0, 0.0, result.gradient * rows["coefficients"])
        measured = {"log_prob": log_prob, "loss": result.loss * rows["coefficients"]}
        if divergence is not None:
            measured["divergence"] = divergence
        if self.entropy:
            measured["entropy"] = entropy_of(logits / self.temperature, log_normalizer, probability)
        return measured, slope, probability, logits

    def gradient_of_logits(self, ids: jax.Array, slope: jax.Array, probability: jax.Array, logits: jax.Array) -> jax.Array:
        """∂loss/∂(h Wᵀ + b): slope (1[v = token] − π(v)) / T, times the derivative of the soft-cap."""
        difference = jnp.where(one_hot(ids, logits), 1.0, 0.0) - probability
        if self.logit_softcap is not None:
            difference = difference * (1.0 - jnp.square(logits / self.logit_softcap))
        # by selection: a dropped token's row may hold a NaN
        return jnp.where(slope[:, None] == 0.0, 0.0, difference * (slope / self.temperature)[:, None])


def _with_gradients(
    step: _Step,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
    rows: dict[str, Any],
    behavior_head: LinearHead | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    @jax.custom_vjp
    def run(
        hidden: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None,
        *others: Any,  # noqa: ANN401
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return _sweep(step, (False, False, False), hidden, weight, bias, *others)[0]

    def forward(*arguments: Any) -> tuple[Any, _Gradients]:  # noqa: ANN401
        needed = tuple(a is not None and a.perturbed for a in arguments[:3])
        values = jax.tree.map(lambda a: a.value, arguments, is_leaf=lambda a: isinstance(a, CustomVJPPrimal))
        return _sweep(step, needed, *values)

    def backward(gradients: _Gradients, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
        scale = cotangents[0]
        if isinstance(scale, SymbolicZero):
            scale = jnp.zeros(scale.shape, scale.dtype)
        dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        scaled = (None if g is None else (g * scale).astype(d) for g, d in zip(gradients, dtypes, strict=True))
        return (*scaled, None, None, None)

    run.defvjp(forward, backward, symbolic_zeros=True)
    result: tuple[jax.Array, dict[str, jax.Array]] = run(hidden, weight, bias, mask, rows, behavior_head)
    return result


def _sweep(
    step: _Step,
    needed: tuple[bool, ...],
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
    rows: dict[str, Any],
    behavior_head: LinearHead | None,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], _Gradients]:
    """Take every valid token through `step`, a chunk at a time; the loop ends where the masked tokens begin."""
    dtype = working_dtype(hidden, weight)
    n, chunk = mask.shape[0], step.chunk
    padded = -(-n // chunk) * chunk
    order = jnp.argsort(~mask, stable=True)
    order = jnp.concatenate((order, jnp.zeros(padded - n, order.dtype)))
    count = jnp.sum(mask.astype(jnp.int32))

    def zeros(shape: tuple[int, ...]) -> jax.Array:
        # like an array of the tokens, so that under shard_map it varies over the devices as they do
        return jnp.zeros_like(hidden, dtype=dtype, shape=shape)

    names = ("log_prob", "loss", *(("entropy",) if step.entropy else ()))
    names = names if rows["divergence"] is None else (*names, "divergence")
    measured = {name: zeros((padded,)) for name in names}
    shapes = ((padded, hidden.shape[1]), weight.shape, (weight.shape[0],))
    gradients = _Gradients(*(zeros(shape) if wanted else None for shape, wanted in zip(shapes, needed, strict=True)))

    def body(i: jax.Array, carry: tuple[dict[str, jax.Array], _Gradients]) -> tuple[dict[str, jax.Array], _Gradients]:
        measured, gradients = carry
        start = i * chunk
        here = jax.lax.dynamic_slice_in_dim(order, start, chunk)
        valid = start + jnp.arange(chunk) < count

        def take(array: jax.Array) -> jax.Array:
            # what masked positions hold is replaced before any arithmetic
            kept = valid.reshape(-1, *(1,) * (array.ndim - 1))
            return jnp.where(kept, array[here], jnp.zeros((), array.dtype))

        h, chunk_rows = take(hidden), jax.tree.map(take, rows)
        head = LinearHead(h, weight, bias, step.logit_softcap)
        found, slope, probability, logits = step.values(head, chunk_rows, behavior_head)
        slope = jnp.where(valid, slope, 0.0)
        measured = {
            name: jax.lax.dynamic_update_slice(measured[name], jnp.where(valid, x, 0.0).astype(dtype), (start,))
            for name, x in found.items()
        }
        if not any(needed):
            return measured, gradients
        of_logits = step.gradient_of_logits(chunk_rows["tokens"], slope, probability, logits)
        # a dropped token's hidden state may hold a NaN too
        h = jnp.where(slope[:, None] == 0.0, jnp.zeros((), h.dtype), h)
        return measured, _accumulate(gradients, of_logits, h, weight, start)

    if n:
        measured, gradients = jax.lax.fori_loop(0, (count + chunk - 1) // chunk, body, (measured, gradients))
    place = jnp.argsort(order[:n])
    measured = {name: array[place] for name, array in measured.items()}
    loss = jnp.sum(measured.pop("loss"))
    of_hidden = None if gradients.hidden is None else gradients.hidden[place]
    return (loss, measured), gradients._replace(hidden=of_hidden)


def _accumulate(
    gradients: _Gradients, of_logits: jax.Array, hidden: jax.Array, weight: jax.Array, start: jax.Array
) -> _Gradients:
    """Gradients with a chunk's share, whose products are taken in the dtype of the model."""
    dtype = of_logits.dtype
    of_hidden, of_weight, of_bias = gradients
    if of_bias is not None:
        of_bias = of_bias + jnp.sum(of_logits, axis=0)
    low = of_logits.astype(weight.dtype)
    if of_hidden is not None:
        share = jnp.matmul(low, weight, preferred_element_type=dtype)
        of_hidden = jax.lax.dynamic_update_slice(of_hidden, share, (start, 0))
    if of_weight is not None:

        def add(row: jax.Array | int, size: int, of_weight: jax.Array) -> jax.Array:
            share = jnp.einsum(
                "nv,nh->vh", jax.lax.dynamic_slice_in_dim(low, row, size, 1), hidden, preferred_element_type=dtype
            )
            sum_of_both = jax.lax.dynamic_slice_in_dim(of_weight, row, size) + share
            return jax.lax.dynamic_update_slice(of_weight, sum_of_both, (row, 0))

        size = min(_WEIGHT_ROWS, weight.shape[0])
        blocks, rest = divmod(weight.shape[0], size)
        of_weight = jax.lax.fori_loop(0, blocks, lambda i, g: add(i * size, size, g), of_weight)
        if rest:
            of_weight = add(blocks * size, rest, of_weight)
    return _Gradients(of_hidden, of_weight, of_bias)


def _varying_like(hidden: jax.Array, array: jax.Array) -> jax.Array:
    """Under shard_map, a replicated array as one that varies as the tokens do: its gradient is then summed over them."""
    axes = jax.typeof(hidden).manual_axis_type.varying - jax.typeof(array).manual_axis_type.varying
    return jax.lax.pcast(array, tuple(axes), to="varying") if axes else array
