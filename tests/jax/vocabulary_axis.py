"""The functions at vocabulary scale with vocabulary and tokens over devices, beside drpo_torch on one; see explicit_axes.py.

Under `shard_map` with `vocabulary_axis`, and under `jit` with divided arrays, where XLA must gather nothing.
"""

import re
from functools import partial

import drpo_jax
import drpo_torch
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from drpo_core import DPPO, DRPO
from drpo_core.anchors import Behavior, Sequence
from drpo_core.modes import Mode

N, T, V, H, K = 4, 6, 10, 4, 3
PER_TOKEN = DPPO(delta=0.15, divergence="per_token")
MODE = Mode(DRPO(delta=0.3), anchor=Sequence(Behavior()), reduction="sequence_mean_token_mean")
SPECS = {
    "logits": P("tokens", None, "vocabulary"),
    "finite": P("tokens", None, "vocabulary"),
    "rounded": P("tokens", None, "vocabulary"),
    "behavior_logits": P("tokens", None, "vocabulary"),
    "weight": P("vocabulary"),
    "bias": P("vocabulary"),
}


def batch():
    """Arrays by name; masked tokens hold NaN and wild ids, and two of the bias's entries are −inf."""
    rng = np.random.default_rng(0)
    hidden, weight, bias = rng.normal(size=(N, T, H)), rng.normal(size=(V, H)), rng.normal(size=V)
    mask = rng.random((N, T)) < 0.8
    bias[:2] = -np.inf
    behavior = rng.normal(size=(N, T, V))
    log_mu = behavior - np.log(np.exp(behavior).sum(-1, keepdims=True))
    tokens, ids = rng.integers(2, V, size=(N, T)), np.argsort(-log_mu[..., 2:], axis=-1)[..., :K] + 2
    finite = behavior + 0.5 * rng.normal(size=behavior.shape)
    return {
        "logits": np.where(mask[..., None], finite, np.nan),
        "finite": finite,
        "log_normalizer": np.log(np.exp(finite).sum(-1)),
        "behavior_logits": behavior,
        "hidden": np.where(mask[..., None], hidden, np.nan),
        "weight": weight,
        "bias": bias,
        "behavior_log_prob": np.take_along_axis(log_mu, tokens[..., None], -1)[..., 0],
        "advantages": rng.normal(size=(N, T)),
        "top_k_behavior_log_prob": np.take_along_axis(log_mu, ids, -1),
        "scale": rng.normal(size=(N, T)),
        "mask": mask,
        # many of which are equal
        "rounded": np.round(finite),
        "tokens": np.where(mask, tokens, -100),
        "inside": tokens,
        "few": np.minimum(tokens, V - 3),
        "temperature": 0.5 + rng.random((N, T)),
        "support": (rng.random((N, T, V)) < 0.5) | (np.arange(V) == np.minimum(tokens, V - 3)[..., None]),
        "top_k_ids": ids,
    }


def log_prob(inputs, module, d, **options):
    """Those of K + 1 tokens."""
    function = module.token_log_prob if inputs == ("logits",) else module.linear_log_prob
    return function(**{name: d[name] for name in (*inputs, "tokens", "mask", "top_k_ids")}, entropy=True, **options)


def most_probable(module, d, **options):
    """More than a device has columns, from hidden states over a support, and from logits of which many are equal."""
    rows = {"tokens": d["few"], "mask": d["mask"], "top_k": V - 3} | options
    head = {name: d[name] for name in HEAD}
    support = module.Support.from_mask(d["support"])
    narrow = {"support": support, "vocabulary_size": V - 2, "logit_softcap": 9.0, "chunk_tokens": 4}
    found = module.linear_log_prob(**head, **rows, **narrow), module.token_log_prob(logits=d["rounded"], **rows)
    return [x for f in found for x in (f.top_k_log_prob, f.top_k_ids)]


def with_row_map(module, d, **options):
    """Those over a support, with a temperature a token and two ids of padding."""
    arrays = {"tokens": d["few"], "mask": d["mask"], "temperature": d["temperature"]}
    head = {name: d[name] for name in HEAD}
    support = module.Support.from_mask(d["support"])
    return module.linear_log_prob(**head, **arrays, support=support, vocabulary_size=V - 2, entropy=True, **options)


def loss(inputs, objective, records, module, d, **options):
    """A policy loss whose denominator is that of all devices."""
    function = module.logits_policy_loss if inputs == ("logits",) else module.linear_policy_loss
    named = {name: d[name] for name in (*inputs, "tokens", "behavior_log_prob", "advantages", "mask")}
    top = {"ids": d["top_k_ids"], "behavior_log_prob": d["top_k_behavior_log_prob"]}
    behavior = d["behavior_logits"]
    if inputs != ("logits",):
        behavior = module.LinearHead(d["hidden"] * 0.9, d["weight"], d["bias"])
    divergence, centering = {
        "none": lambda: (None, None),
        "top-k": lambda: (module.TopKDivergence(kind="tv", **top), module.TopKCentering(**top)),
        "full": lambda: (
            module.FullDivergence(kind="kl", behavior=behavior),
            module.FullCentering(behavior=behavior, temperature=0.9),
        ),
    }[records]()
    options |= {"normalizer": 13.0, "entropy": True, "entropy_coefficient": 0.2, "diagnostics": False, "temperature": 1.3}
    return function(objective, **named, divergence=divergence, centering=centering, **options)


def full_divergences(module, d, **options):
    """Between the logits of both policies."""
    return module.full_divergences(logits=d["finite"], behavior_logits=d["behavior_logits"], **options)


def top_k_divergences(module, d, **options):
    """Of recorded tokens."""
    names = ("log_normalizer", "behavior_log_prob", "top_k_ids", "top_k_behavior_log_prob")
    return module.top_k_divergences(logits=d["finite"], tokens=d["inside"], **{name: d[name] for name in names}, **options)


LOGITS, HEAD = ("logits",), ("hidden", "weight", "bias")
# name → function of a module and arrays, what it is differentiated in
CASES = {
    "token_log_prob": (partial(log_prob, LOGITS), LOGITS),
    "linear_log_prob": (partial(log_prob, HEAD, chunk_tokens=4), HEAD),
    "linear_log_prob row map": (with_row_map, HEAD),
    "linear_log_prob most probable": (most_probable, (*HEAD, "rounded")),
    "logits_policy_loss full": (partial(loss, LOGITS, PER_TOKEN, "full"), LOGITS),
    "logits_policy_loss top-k": (partial(loss, LOGITS, PER_TOKEN, "top-k"), LOGITS),
    "linear_policy_loss full": (partial(loss, HEAD, PER_TOKEN, "full", chunk_tokens=4), HEAD),
    "linear_policy_loss top-k": (partial(loss, HEAD, PER_TOKEN, "top-k", logit_softcap=9.0), HEAD),
    "linear_policy_loss mode": (partial(loss, HEAD, MODE, "none", chunk_tokens=4), HEAD),
    "full_divergences": (full_divergences, ("finite",)),
    "top_k_divergences": (top_k_divergences, ("finite",)),
}
REPLICATED = ("token_log_prob", "linear_policy_loss top-k")


def scalar(outputs, scale):
    """A number that depends on each output differently."""
    factors = [scale.reshape(*scale.shape, *(1,) * (x.ndim - 2)) if x.ndim else 1.0 for x in outputs]
    return sum((x * (factor * (i + 1.0))).sum() for i, (x, factor) in enumerate(zip(outputs, factors, strict=True)))


def by_torch(name, arrays):
    """Outputs and gradients of a case on one device."""
    function, names = CASES[name]
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    leaves = {key: tensors[key].clone().requires_grad_() for key in names}
    options = {} if function is top_k_divergences else {"engine": "arrays"}
    outputs = [x for x in function(drpo_torch, tensors | leaves, **options) if x is not None]
    given = torch.autograd.grad(scalar(outputs, tensors["scale"]), list(leaves.values()))
    return [x.detach().numpy() for x in outputs], {key: g.numpy() for key, g in zip(leaves, given, strict=True)}


def evaluate(names, d, **options):
    """Outputs and gradients of cases; a loss is that of this device's tokens."""

    def value(leaves, function):
        outputs = [x for x in function(drpo_jax, d | leaves, **options) if x is not None]
        return scalar(outputs, d["scale"]), outputs

    found = {}
    for name in names:
        function, leaves = CASES[name]
        gradients, outputs = jax.grad(value, has_aux=True)({leaf: d[leaf] for leaf in leaves}, function)
        found[name] = outputs, gradients
    return found


def divided(mesh, d):
    """`evaluate` under shard_map."""
    specs = {name: SPECS.get(name, P("tokens")) for name in d}

    def of_device(d):
        found = evaluate(CASES, d, vocabulary_axis="vocabulary")
        return {name: ([x if x.ndim else jax.lax.psum(x, "tokens") for x in o], g) for name, (o, g) in found.items()}

    shapes = jax.eval_shape(partial(evaluate, CASES), d)
    out = {
        name: ([P("tokens") if x.ndim else P() for x in outputs], {leaf: specs[leaf] for leaf in gradients})
        for name, (outputs, gradients) in shapes.items()
    }
    return jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=(specs,), out_specs=out))(d)


def replicated(mesh, arrays, name):
    """A case whose tokens are divided under shard_map, but not its first input; the difference from one device."""
    _, leaves = CASES[name]
    half = N // 2
    names = (leaves[0], "mask", "tokens")
    arrays = {k: np.concatenate([a[:half]] * 2) if k in names else a for k, a in arrays.items()}
    outputs, gradients = by_torch(name, arrays)
    gradients[leaves[0]] = gradients[leaves[0]].reshape(2, half, *gradients[leaves[0]].shape[1:]).sum(0)
    data = {k: jnp.asarray(a[:half] if k == leaves[0] else a) for k, a in arrays.items()}
    specs = {k: P() if k in leaves else P("tokens") for k in data}

    def of_device(d):
        found, of_leaves = evaluate((name,), d)[name]
        return [x if x.ndim else jax.lax.psum(x, "tokens") for x in found], of_leaves

    out = ([P("tokens") if x.ndim else P() for x in outputs], {leaf: P() for leaf in leaves})
    found = jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=(specs,), out_specs=out))(data)
    return difference(found, (outputs, gradients))


def difference(found, expected):
    """The largest, relative to the largest number of the array or 1."""
    worst = 0.0
    for leaves in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(leaf, np.float64) for leaf in leaves)
        finite = np.isfinite(b)
        if not np.array_equal(finite, np.isfinite(a)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return float("inf")
        worst = max(worst, float(np.abs(a - b)[finite].max(initial=0.0) / max(1.0, np.abs(b[finite]).max(initial=0.0))))
    return worst


def gathers(compiled):
    """How many all-gathers a compiled program has."""
    return len(re.findall(r" all-gather(?:-start)?\(", compiled.as_text()))


def measure(dtype=jnp.float64):
    """Every case under `shard_map` on tokens × vocabulary, and one under `jit` with the vocabulary alone divided."""
    arrays = batch()
    whole = {name: by_torch(name, arrays) for name in CASES}
    data = {name: jnp.asarray(a, dtype) if a.dtype == np.float64 else jnp.asarray(a) for name, a in arrays.items()}
    auto = {"axis_names": ("tokens", "vocabulary"), "axis_types": (AxisType.Auto,) * 2}
    found, alone = divided(jax.make_mesh((2, 2), **auto), data), jax.make_mesh((1, 2), **auto)
    results = [{"vocabulary": name, "how": "shard_map", "gap": difference(found[name], whole[name])} for name in CASES]
    placed = {name: jax.device_put(array, NamedSharding(alone, SPECS.get(name, P()))) for name, array in data.items()}
    name = "token_log_prob"
    compiled = jax.jit(partial(evaluate, (name,))).lower(placed).compile()
    gap = difference(compiled(placed)[name], whole[name])
    results.append({"vocabulary": name, "how": "jit", "gap": gap, "gathers": gathers(compiled)})
    two = jax.make_mesh((2,), ("tokens",), axis_types=(AxisType.Auto,))
    return results + [{"replicated": name, "gap": replicated(two, arrays, name)} for name in REPLICATED]
