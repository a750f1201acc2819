"""The dense transformer and Adam in JAX: the second trainer of `python -m study parity`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from drpo_jax import policy_loss, token_log_prob

from study.task import PROMPT

if TYPE_CHECKING:
    from drpo_core import Objective
    from study.model import Shape

Parameters = dict[str, jax.Array]
Moments = tuple[Parameters, Parameters]


def hidden_states(p: Parameters, shape: Shape, tokens: jax.Array) -> jax.Array:
    """The same as `model.hidden_states`, for a dense shape in float32 and without a cache."""
    length = tokens.shape[1]
    causal = jnp.arange(length)[None, :] <= jnp.arange(length)[:, None]
    x = p["embedding"][tokens] + p["position"][None, :length]
    for i in range(shape.layers):
        x = x + _attention(p, i, shape, _normalised(x, p[f"{i}.norm1"]), causal)
        x = x + jax.nn.silu(_normalised(x, p[f"{i}.norm2"]) @ p[f"{i}.up"].T) @ p[f"{i}.down"].T
    return _normalised(x, p["norm"])


def _normalised(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * gain[None, None]


def _attention(p: Parameters, i: int, shape: Shape, x: jax.Array, causal: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    size = width // shape.heads
    q, k, v = jnp.transpose((x @ p[f"{i}.qkv"].T).reshape(batch, length, 3, shape.heads, size), (2, 0, 3, 1, 4))
    scores = jnp.where(causal[None, None], q @ jnp.swapaxes(k, -1, -2) * size**-0.5, -jnp.inf)
    mixed = jnp.swapaxes(jax.nn.softmax(scores, -1) @ v, 1, 2).reshape(batch, length, width)
    return mixed @ p[f"{i}.out"].T


@partial(jax.jit, static_argnames=("objective", "shape", "learning_rate", "clip_norm"))
def step(
    p: Parameters,
    moments: Moments,
    count: jax.Array,
    batch: dict[str, jax.Array],
    *,
    objective: Objective,
    shape: Shape,
    learning_rate: float,
    clip_norm: float,
) -> tuple[Parameters, Moments, jax.Array, jax.Array]:
    """Take one step on a padded batch; returns parameters, moments, loss and the gradient's norm before clipping."""

    def loss_of(p: Parameters) -> jax.Array:
        states = hidden_states(p, shape, batch["inputs"])[:, PROMPT - 1 :]
        log_prob = token_log_prob(logits=states @ p["embedding"].T, tokens=batch["responses"]).log_prob
        tokens = {name: batch[name] for name in ("behavior_log_prob", "advantages", "mask")}
        return policy_loss(objective, log_prob=log_prob, **tokens)[0]

    loss, gradient = jax.value_and_grad(loss_of)(p)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in gradient.values()))
    scale = jnp.minimum(1.0, clip_norm / (norm + 1e-6))
    first, second = moments
    first = {name: 0.9 * m + 0.1 * scale * gradient[name] for name, m in first.items()}
    second = {name: 0.999 * v + 0.001 * jnp.square(scale * gradient[name]) for name, v in second.items()}
    correct1, correct2 = 1.0 - 0.9**count, 1.0 - 0.999**count
    p = {
        name: value - learning_rate * (first[name] / correct1) / (jnp.sqrt(second[name] / correct2) + 1e-8)
        for name, value in p.items()
    }
    return p, (first, second), loss, norm
