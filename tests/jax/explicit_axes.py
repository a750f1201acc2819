"""Every function on a mesh with explicit axes, the default of `jax.make_mesh`; run by test_sharding.py on four devices.

Writes, for every function, layout and way of calling it, the largest relative difference from one device, or the error.
"""

import contextlib
import json
import sys
from functools import partial
from pathlib import Path

import drpo_jax
import jax
import jax.numpy as jnp
import numpy as np
import vocabulary_axis
from drpo_jax import loss as loss_module
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from drpo_core import (
    DPPO,
    DRPO,
    expand_advantages,
    group_advantages,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_diagnostics,
    token_mean,
)

N, T, V, H, K = 8, 8, 16, 4, 3
OBJECTIVE = DRPO(delta=0.1)
REDUCTIONS = {
    "token_mean": token_mean,
    "sequence_mean_token_mean": sequence_mean_token_mean,
    "sequence_mean_token_sum": partial(sequence_mean_token_sum, horizon=7.0),
    "linear_reduction": drpo_jax.linear_reduction(lambda values, mask: jnp.where(mask, values, 0.0).sum(axis=-1).mean()),
}
LAYOUTS = {
    "sequences": ((4,), ("x",), ("x", None)),
    "tokens": ((4,), ("x",), (None, "x")),
    "sequences × tokens": ((2, 2), ("x", "y"), ("x", "y")),
    "vocabulary": ((4,), ("x",), (None, None)),
}
PER_TOKEN = (
    "log_prob",
    "behavior_log_prob",
    "advantages",
    "mask",
    "tokens",
    "segment_ids",
    "divergence",
    "ids",
    "top",
    "hidden",
)


def batch():
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(N, T, H)), 0.5 * rng.normal(size=(V, H))
    logits = hidden @ weight.T
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    behavior = log_probs + 0.2 * rng.normal(size=logits.shape)
    behavior -= np.log(np.exp(behavior).sum(-1, keepdims=True))
    tokens = rng.integers(0, V, size=(N, T))
    support = (rng.random((N, T, V)) < 0.3) | (np.arange(V) == tokens[..., None])
    ids = np.argsort(-behavior, axis=-1)[..., :K]
    arrays = {
        "hidden": hidden,
        "weight": weight,
        "logits": logits,
        "behavior_logits": behavior,
        "log_prob": np.take_along_axis(log_probs, tokens[..., None], -1)[..., 0],
        "behavior_log_prob": np.take_along_axis(behavior, tokens[..., None], -1)[..., 0],
        "advantages": rng.normal(size=(N, T)),
        "divergence": rng.random((N, T)),
        "mask": rng.random((N, T)) < 0.8,
        "tokens": tokens,
        "ids": ids,
        "temperature": rng.uniform(0.5, 2.0, size=(N, T)),
        "support_ids": np.nonzero(support)[-1],
        "support_offsets": np.cumsum([0, *support.sum(-1).ravel()]),
        "top": np.take_along_axis(behavior, ids, -1),
        "rewards": rng.normal(size=(N, T)),
        "flat_rewards": rng.normal(size=N * T),
        "group_ids": rng.integers(0, 9, size=N * T),
        "sequence_advantages": rng.normal(size=12),
        "segment_ids": np.sort(rng.integers(0, 12, size=(N, T)).ravel()).reshape(N, T),
    }
    return {name: jnp.asarray(a) for name, a in arrays.items()}


def spec_of(name, axes):
    """Where an array's axes lie on the mesh."""
    x, y = axes
    if axes == (None, None):
        return {"weight": P("x"), "logits": P(None, None, "x"), "behavior_logits": P(None, None, "x")}.get(name, P())
    if name in ("weight", "sequence_advantages", "support_ids", "support_offsets"):
        return P()
    if name in ("flat_rewards", "group_ids"):
        return P(tuple(axis for axis in axes if axis))
    return P(x, y)


def policy(reduction, data, *, packed=False, chunk=None):
    names = ("log_prob", "behavior_log_prob", "advantages", "mask")
    arrays = {name: data[name].reshape(-1) if packed else data[name] for name in names}
    options = {"segment_ids": data["segment_ids"].reshape(-1)} if packed else {}
    if chunk:
        loss_module._CHUNK = chunk  # noqa: SLF001 -- a CPU takes large batches in chunks
    options |= {"reduction": REDUCTIONS[reduction], "diagnostics": reduction == "token_mean"}
    loss, diagnostics = drpo_jax.policy_loss(OBJECTIVE, **arrays, **options)
    loss_module._CHUNK = 1 << 15  # noqa: SLF001
    return loss, diagnostics


def of_batch(data, objective=OBJECTIVE, **options):
    names = ("tokens", "behavior_log_prob", "advantages", "mask")
    return (objective,), {name: data[name] for name in names} | {"entropy": True} | options


def vocabulary(function, inputs, data, **options):
    positional, named = of_batch(data, **options)
    extra = {"chunk_tokens": 5, "diagnostics": positional[0] is OBJECTIVE} if "hidden" in inputs else {"diagnostics": False}
    return tuple(function(*positional, **{name: data[name] for name in inputs}, **named, **extra))


def columns(data):
    return {"tokens": data["tokens"], "top_k_ids": data["ids"], "mask": data["mask"]}


def row_map(data):
    return {
        "temperature": data["temperature"],
        "support": drpo_jax.Support(data["support_ids"], data["support_offsets"]),
    }


def top_k(data):
    return drpo_jax.TopKDivergence(kind="tv", ids=data["ids"], behavior_log_prob=data["top"])


def recorded_head(data):
    return drpo_jax.FullDivergence(kind="kl", behavior=drpo_jax.LinearHead(data["hidden"] * 1.1, data["weight"]))


PER = DPPO(delta=0.1, divergence="per_token")
LOGITS, LINEAR = (
    partial(vocabulary, drpo_jax.logits_policy_loss, ("logits",)),
    partial(vocabulary, drpo_jax.linear_policy_loss, ("hidden", "weight")),
)
# name → function of the batch, and what it is differentiated in (by the first of its results)
CASES = {
    "token_loss": (
        lambda d: drpo_jax.token_loss(OBJECTIVE, **{k: d[k] for k in ("log_prob", "behavior_log_prob", "advantages", "mask")}),
        ("log_prob",),
    ),
    **{f"policy_loss {r}": (partial(policy, r), ("log_prob",)) for r in REDUCTIONS},
    **{f"policy_loss {r} packed": (partial(policy, r, packed=True), ("log_prob",)) for r in list(REDUCTIONS)[:3]},
    "policy_loss in chunks": (partial(policy, "token_mean", chunk=5), ("log_prob",)),
    "token_log_prob": (
        lambda d: tuple(drpo_jax.token_log_prob(logits=d["logits"], **columns(d), entropy=True)),
        ("logits",),
    ),
    "linear_log_prob": (
        lambda d: tuple(
            drpo_jax.linear_log_prob(
                hidden=d["hidden"],
                weight=d["weight"],
                **columns(d),
                **row_map(d),
                entropy=True,
                chunk_tokens=5,
            )
        ),
        ("hidden", "weight"),
    ),
    "logits_policy_loss": (LOGITS, ("logits",)),
    "logits_policy_loss top-k": (lambda d: LOGITS(d, objective=PER, divergence=top_k(d)), ("logits",)),
    "logits_policy_loss full": (
        lambda d: LOGITS(d, objective=PER, divergence=drpo_jax.FullDivergence(kind="kl", behavior=d["behavior_logits"])),
        ("logits",),
    ),
    "linear_policy_loss": (LINEAR, ("hidden", "weight")),
    "linear_policy_loss head": (lambda d: LINEAR(d, objective=PER, divergence=recorded_head(d)), ("hidden", "weight")),
    "full_divergences": (
        lambda d: tuple(drpo_jax.full_divergences(logits=d["logits"], behavior_logits=d["behavior_logits"])),
        ("logits",),
    ),
    "top_k_divergences": (
        lambda d: tuple(
            drpo_jax.top_k_divergences(
                logits=d["logits"],
                log_normalizer=jax.scipy.special.logsumexp(d["logits"], axis=-1),
                tokens=d["tokens"],
                behavior_log_prob=d["behavior_log_prob"],
                top_k_ids=d["ids"],
                top_k_behavior_log_prob=d["top"],
            )
        ),
        ("logits",),
    ),
    "group_advantages": (lambda d: group_advantages(d["rewards"], divide_by_std=True), ()),
    "group_advantages ids": (
        lambda d: group_advantages(d["flat_rewards"], group_ids=d["group_ids"], divide_by_std=True, leave_one_out=True),
        (),
    ),
    "expand_advantages": (
        lambda d: expand_advantages(d["sequence_advantages"], d["mask"].reshape(-1), segment_ids=d["segment_ids"].reshape(-1)),
        (),
    ),
    "token_diagnostics": (
        lambda d: token_diagnostics(
            OBJECTIVE, *(d[k] for k in ("log_prob", "behavior_log_prob", "advantages")), mask=d["mask"]
        ),
        (),
    ),
    "sequence_mean_token_mean packed": (
        lambda d: sequence_mean_token_mean(
            d["log_prob"].reshape(-1), d["mask"].reshape(-1), segment_ids=d["segment_ids"].reshape(-1)
        ),
        (),
    ),
}


def evaluate(function, names, data, *, jitted):
    def value(inputs, data):
        result = function(data | inputs)
        first = result[0] if isinstance(result, tuple) else result
        return (jnp.sum(first), result) if names else (jnp.zeros(()), result)

    run = jax.value_and_grad(value, has_aux=True) if names else lambda _, data: (value({}, data), {})
    inputs = {name: data[name] for name in names}
    if not jitted:
        (_, result), gradients = run(inputs, data)
        return result, gradients, 0
    compiled = jax.jit(run).lower(inputs, data).compile()
    (_, result), gradients = compiled(inputs, data)
    return result, gradients, vocabulary_axis.gathers(compiled)


def difference(found, expected):
    worst = 0.0
    for leaves in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(leaf, np.float64) for leaf in leaves)
        finite = np.isfinite(b)
        if not np.array_equal(finite, np.isfinite(a)) or not np.array_equal(a[~finite], b[~finite]):
            return float("inf")
        worst = max(worst, float(np.abs(a - b)[finite].max(initial=0.0) / max(1.0, np.abs(b[finite]).max(initial=0.0))))
    return worst


def run(case, layout, how, data, expected):
    function, names = CASES[case]
    shape, mesh_axes, axes = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, mesh_axes)
    placed = {name: jax.device_put(a, NamedSharding(mesh, spec_of(name, axes))) for name, a in data.items()}
    context = jax.set_mesh(mesh) if "set_mesh" in how else contextlib.nullcontext()
    with context:
        result, gradients, gathers = evaluate(function, names, placed, jitted="jit" in how)
    same = {name: jax.typeof(g).sharding.spec == jax.typeof(placed[name]).sharding.spec for name, g in gradients.items()}
    return {
        "difference": max(difference(result, expected[0]), difference(gradients, expected[1])),
        "placed": all(same.values()),
        "gathers": gathers,
    }


def ways(case, layout):
    """How to call it: within `jit` or not, in the context of the mesh or not."""
    if layout == "vocabulary":
        return ("jit, set_mesh",) if set(CASES[case][1]) & {"logits", "weight"} else ()
    if layout == "tokens" and ("packed" in case or case == "expand_advantages"):
        return ()  # it is this test that can't flatten them there
    if layout != "sequences":
        return ("jit, set_mesh",)
    return ("jit", "jit, set_mesh", *(("set_mesh",) if set(CASES[case][1]) <= {"log_prob"} else ()))


def main(path):
    data, results = batch(), []
    for case, (function, names) in CASES.items():
        *expected, _ = evaluate(function, names, data, jitted=True)
        for layout in LAYOUTS:
            for how in ways(case, layout):
                try:
                    result = run(case, layout, how, data, expected)
                except Exception as error:  # noqa: BLE001 -- whatever it is, it is the result
                    result = {"error": f"{type(error).__name__}: {error}"[:400]}
                results.append({"case": case, "layout": layout, "how": how} | result)
    Path(path).write_text(json.dumps(results + vocabulary_axis.measure()))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)  # noqa: FBT003 -- JAX's signature
    assert jax.device_count() == 4
    main(sys.argv[1])
