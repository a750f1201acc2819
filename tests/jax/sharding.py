"""Loss and gradient of one batch, whole and in every way of spreading it over four devices; run by test_distributed.py."""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from drpo_jax import policy_loss
from drpo_jax.distributed import all_reduce_diagnostics, global_coefficients, global_normalizer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from drpo_core import (
    DRPO,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    summarize,
    token_mean,
)

OBJECTIVE = DRPO(delta=0.05)
REDUCTIONS = {
    "token_mean": token_mean,
    "sequence_mean_token_mean": sequence_mean_token_mean,
    "sequence_mean_token_sum": partial(sequence_mean_token_sum, horizon=16),
}
LENGTHS = np.array([7, 16, 1, 12, 3, 9, 16, 0])
IN_FLOAT32 = ("packed, tokens, jit", "padded, sequences", "packed, tokens", "padded, sequences × tokens")
TOKENS, VOCABULARY, WIDTH, DEVICES = 16, 13, 8, 4


def parameters(dtype):
    rng = np.random.default_rng(0)
    shapes = {"embedding": (VOCABULARY, WIDTH), "hidden": (WIDTH, WIDTH), "head": (WIDTH, VOCABULARY)}
    return {k: jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype=dtype) for k, shape in shapes.items()}


def padded_batch(dtype):
    rng = np.random.default_rng(1)
    shape = (len(LENGTHS), TOKENS)
    return {
        "previous": jnp.asarray(rng.integers(VOCABULARY, size=shape)),
        "token": jnp.asarray(rng.integers(VOCABULARY, size=shape)),
        "behavior_log_prob": jnp.asarray(rng.normal(-2.5, 0.5, size=shape).astype(np.float32), dtype=dtype),
        "advantages": jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype=dtype),
        "mask": jnp.asarray((np.arange(TOKENS) < LENGTHS[:, None]) & (rng.random(shape) < 0.9)),
    }


def packed_batch(dtype):
    """The same tokens in one row; sequences lie across the borders of its quarters, and padding is a sequence too."""
    inside = np.arange(TOKENS) < LENGTHS[:, None]
    rows = {k: np.asarray(v)[inside] for k, v in padded_batch(dtype).items()}
    rows["segment_ids"] = np.repeat(np.arange(len(LENGTHS)) * 3 - 5, LENGTHS)
    return {k: jnp.asarray(np.pad(v, (0, -len(v) % DEVICES))) for k, v in rows.items()}


def share(parameters, batch, reduction, **how):
    x = parameters["embedding"][batch["previous"]]
    logits = jnp.tanh(x @ parameters["hidden"]) @ parameters["head"]
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["token"][..., None], axis=-1)[..., 0]
    tokens = {k: batch[k] for k in ("behavior_log_prob", "advantages", "mask")}
    return policy_loss(OBJECTIVE, log_prob=log_prob, reduction=reduction, **tokens, **how)


def whole(parameters, batch):
    return stacked(share(parameters, batch, r, segment_ids=batch.get("segment_ids")) for r in REDUCTIONS.values())


def by_sequence(parameters, batch):
    """Inside shard_map, with whole sequences on each device."""
    how = {"segment_ids": batch.get("segment_ids")}
    parts = []
    for reduction in REDUCTIONS.values():
        normalizer = global_normalizer(reduction, batch["mask"], axis_name="data", **how)
        parts.append(share(parameters, batch, reduction, normalizer=normalizer, **how))
    return summed(stacked(parts), ("data",))


def by_token(axes, parameters, batch):
    """Inside shard_map, with a part of the token axis on each device."""
    how = {"segment_ids": batch.get("segment_ids"), "shard_axis_name": "tokens"}
    parts = []
    for reduction in REDUCTIONS.values():
        normalizer = global_normalizer(reduction, batch["mask"], axis_name=axes, **how)
        coefficients = global_coefficients(reduction, batch["mask"], normalizer=normalizer, **how)
        coefficients = coefficients.astype(batch["advantages"].dtype)
        parts.append(share(parameters, batch, token_mean, normalizer=1, token_weights=coefficients))
    return summed(stacked(parts), axes)


def local_means(parameters, batch):
    """What goes wrong without the helper: every device divides by its own count, and the means are averaged."""
    losses, diagnostics = whole(parameters, batch)
    return summed((losses / DEVICES, diagnostics), ("data",))


def stacked(parts):
    losses, diagnostics = zip(*parts, strict=True)
    return jnp.stack(losses), diagnostics[0]


def summed(part, axes):
    losses, diagnostics = part
    return jax.lax.psum(losses, axes), all_reduce_diagnostics(diagnostics, axis_name=axes)


def with_gradients(function):
    """Losses, diagnostics and a gradient for each loss: one compilation for all reductions."""

    def run(parameters, batch):
        def twice(parameters):
            losses, diagnostics = function(parameters, batch)
            return losses, (losses, diagnostics)

        gradients, (losses, diagnostics) = jax.jacrev(twice, has_aux=True)(parameters)
        return losses, diagnostics, jnp.concatenate([g.reshape(len(losses), -1) for g in jax.tree.leaves(gradients)], axis=1)

    return run


def sharded(function, mesh, spec):
    """Differentiated from outside shard_map."""
    return with_gradients(jax.shard_map(function, mesh=mesh, in_specs=(P(), spec), out_specs=P()))


def sharded_inside(function, mesh, spec):
    """Differentiated inside shard_map, where JAX sums the gradient of replicated parameters over the mesh."""
    return jax.shard_map(with_gradients(function), mesh=mesh, in_specs=(P(), spec), out_specs=P())


def main(path):
    auto = jax.sharding.AxisType.Auto
    data = jax.make_mesh((DEVICES,), ("data",), axis_types=(auto,))
    tokens = jax.make_mesh((DEVICES,), ("tokens",), axis_types=(auto,))
    both = jax.make_mesh((2, 2), ("data", "tokens"), axis_types=(auto, auto))
    over_tokens, over_both = partial(by_token, ("tokens",)), partial(by_token, ("data", "tokens"))
    unsharded = with_gradients(whole)
    layouts = {
        "padded, sequences, jit": (data, P("data"), unsharded),
        "padded, tokens, jit": (data, P(None, "data"), unsharded),
        "packed, tokens, jit": (data, P("data"), unsharded),
        "padded, sequences": (data, P("data"), sharded(by_sequence, data, P("data"))),
        "padded, sequences, gradient inside": (data, P("data"), sharded_inside(by_sequence, data, P("data"))),
        "padded, tokens": (tokens, P(None, "tokens"), sharded(over_tokens, tokens, P(None, "tokens"))),
        "packed, tokens": (tokens, P("tokens"), sharded(over_tokens, tokens, P("tokens"))),
        "padded, sequences × tokens": (both, P("data", "tokens"), sharded(over_both, both, P("data", "tokens"))),
        "padded, local means": (data, P("data"), sharded(local_means, data, P("data"))),
    }
    results = []
    for dtype in (jnp.float64, jnp.float32):
        weights, unit = parameters(dtype), float(jnp.finfo(dtype).eps)
        batches = {"padded": padded_batch(dtype), "packed": packed_batch(dtype)}
        losses, diagnostics, gradients = jax.jit(unsharded)(weights, batches["padded"])
        expected = summarize(diagnostics)
        for layout, (mesh, spec, run) in layouts.items():
            if dtype == jnp.float32 and layout not in IN_FLOAT32:
                continue
            placed = jax.device_put(batches[layout.split(",")[0]], NamedSharding(mesh, spec))
            assert len(placed["mask"].sharding.device_set) == DEVICES
            found_losses, found_diagnostics, found_gradients = jax.jit(run)(weights, placed)
            figures = summarize(found_diagnostics)
            results += [
                {
                    "layout": layout,
                    "reduction": name,
                    "dtype": jnp.dtype(dtype).name,
                    "loss": float(abs(found_losses[i] - losses[i]) / abs(losses[i])) / unit,
                    "gradient": float(abs(found_gradients[i] - gradients[i]).max() / abs(gradients[i]).max()) / unit,
                    "diagnostics": max(abs(figures[k] - v) / max(1.0, abs(v)) for k, v in expected.items()) / unit,
                }
                for i, name in enumerate(REDUCTIONS)
            ]
    Path(path).write_text(json.dumps(results))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)  # noqa: FBT003 -- JAX's signature
    main(sys.argv[1])
