"""The row map z → x of every function: a temperature a token, a support, a padded vocabulary; against softmaxes over the ids."""

import functools

import drpo_jax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drpo_jax import FullCentering, FullDivergence, LinearHead, Support, TopKCentering, TopKDivergence
from drpo_jax.vocabulary import support as support_module

from drpo_core import CISPO, DPPO, DRPO
from drpo_core.centering import score_centering

N, H, V, WIDTH, K = 7, 3, 37, 40, 3
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MASK = np.array([True, True, False, True, True, False, True])
MU_TEMPERATURE = 0.9


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Of the ids of a chunk of two tokens."""
    monkeypatch.setattr(support_module, "_IDS", 4)


def sets():
    """The support of each token: one id, some in any order, one that was not recorded, and all."""
    rng = np.random.default_rng(0)
    return [rng.choice(V, size=size, replace=False) for size in (1, 5, 9, 0, V, 3, 20)]


def inside():
    """Booleans (N, V); all for a support that was not recorded."""
    rows = np.zeros((N, V), dtype=bool)
    for row, ids in zip(rows, sets(), strict=True):
        row[ids if len(ids) else slice(None)] = True
    return rows


def support_of(kind, spoilt=None):
    """The sets as a `Support`, with an id that comes twice, with junk at masked tokens and beyond the vocabulary."""
    if kind == "ids":
        lists = [np.append(ids, ids[:1]) if m else np.full_like(ids, -7) for ids, m in zip(sets(), MASK, strict=True)]
        offsets = np.cumsum([0, *map(len, lists)])
        ids = np.concatenate(lists)
        if spoilt is not None:
            ids[offsets[spoilt]] = V
        return Support(jnp.asarray(ids), jnp.asarray(offsets))
    rows = np.zeros((N, WIDTH), dtype=bool)
    for row, ids in zip(rows, sets(), strict=True):
        row[ids] = True
    if kind == "mask":
        return Support.from_mask(jnp.asarray(rows[:, :V]))
    rows[:, V:] = rows.any(-1, keepdims=True)
    words = np.packbits(np.pad(rows, [(0, 0), (0, 64 - WIDTH)]), axis=-1, bitorder="little").view(np.int32)
    return Support.from_bits(jnp.asarray(words))


def batch():
    """A head with NaN in its padding, and tokens of the supports; masked ones hold anything."""
    rng = np.random.default_rng(1)
    data = {"hidden": rng.normal(size=(N, H)), "weight": rng.normal(size=(WIDTH, H)), "bias": rng.normal(size=WIDTH)}
    data["behavior_hidden"] = data["hidden"] + 0.3 * rng.normal(size=(N, H))
    data["behavior_weight"] = data["weight"] + 0.1 * rng.normal(size=(WIDTH, H))
    ids = np.stack([rng.choice(V, size=K, replace=False) for _ in range(N)])
    tokens = np.array([rng.choice(np.flatnonzero(row)) for row in inside()])
    data["logits"] = data["hidden"] @ data["weight"].T + data["bias"]
    data["behavior"] = data["behavior_hidden"] @ data["behavior_weight"].T
    log_mu = np.asarray(log_softmax_over_ids(data["behavior"][:, :V], np.full(N, MU_TEMPERATURE)))
    data["behavior_log_prob"] = log_mu[np.arange(N), tokens]
    data["top_k_behavior_log_prob"] = np.take_along_axis(log_mu, ids, -1)
    data |= {"advantages": rng.normal(size=N), "temperature": rng.uniform(0.5, 2.0, size=N)}
    for name in ("hidden", "behavior_log_prob", "advantages"):
        data[name][~MASK] = np.nan
    for name in ("weight", "bias", "behavior_weight"):
        data[name][V:] = np.nan
    for name in ("logits", "behavior"):
        data[name][:, V:] = np.nan
    data["temperature"][~MASK] = 0.0
    data |= {"tokens": np.where(MASK, tokens, -100), "top_k_ids": np.where(MASK[:, None], ids, WIDTH), "mask": MASK}
    return jax.tree.map(jnp.asarray, data)


def log_softmax_over_ids(z, temperature):
    """log π (N, V): a softmax over each token's ids alone, −∞ elsewhere."""
    rows = []
    for row, t, allowed in zip(z, temperature, inside(), strict=True):
        ids = np.flatnonzero(allowed)
        rows.append(jnp.full(V, -jnp.inf).at[ids].set(jax.nn.log_softmax(jnp.asarray(row)[ids] / t)))
    return jnp.stack(rows)


# --- what every function should give ------------------------------------------------------------------------------------------


def plain_log_probs(data):
    """log π of (N, V), at the tokens and the K ids; log μ of (N, V)."""
    valid = data["mask"][:, None]
    z = data["logits"][:, :V] if "logits" in data else jnp.where(valid, data["hidden"], 0.0) @ data["weight"][:V].T
    z = z if "logits" in data else z + jnp.broadcast_to(data["bias"][:V], z.shape)
    z = jnp.where(valid, z, 0.0)
    x = log_softmax_over_ids(z, jnp.where(data["mask"], data["temperature"], 1.0))
    ids = jnp.where(valid, jnp.concatenate((data["tokens"][:, None], data["top_k_ids"]), axis=-1), 0)
    chosen = jnp.take_along_axis(x, ids, axis=-1)
    return z, x, chosen[:, 0], chosen[:, 1:], log_softmax_over_ids(data["behavior"][:, :V], np.full(N, MU_TEMPERATURE))


def plain_log_prob(data):
    z, x, log_prob, top_k, _ = plain_log_probs(data)
    entropy = -jnp.sum(jnp.exp(x) * jnp.where(x > -jnp.inf, x, 0.0), axis=-1)
    t = jnp.where(data["mask"], data["temperature"], 1.0)[:, None]
    log_z = jax.scipy.special.logsumexp(jnp.where(inside(), z / t, -jnp.inf), axis=-1)
    found = log_prob, entropy, log_z, top_k
    return tuple(jnp.where(data["mask"].reshape(N, *(1,) * (a.ndim - 1)), a, 0.0) for a in found)


def plain_divergences(data):
    """TV and KL of the whole vocabulary."""
    _, x, _, _, b = plain_log_probs(data)
    p, q = jnp.exp(x), jnp.exp(b)
    terms = jnp.where(q > 0.0, q * (jnp.where(q > 0.0, b, 0.0) - jnp.where(q > 0.0, x, 0.0)), 0.0)
    found = 0.5 * jnp.sum(jnp.abs(p - q), axis=-1), jnp.sum(terms, axis=-1)
    return tuple(jnp.where(data["mask"], a, 0.0) for a in found)


def plain_top_k(data):
    """The same over the K ids, the sampled one and the rest."""
    _, _, log_prob, top_k, _ = plain_log_probs(data)
    again = (data["top_k_ids"] == data["tokens"][:, None])[..., None].any(-2)
    p, q = (
        jnp.concatenate((jnp.exp(ks), jnp.where(again, 0.0, jnp.exp(one)[:, None])), axis=-1)
        for ks, one in ((top_k, log_prob), (data["top_k_behavior_log_prob"], data["behavior_log_prob"]))
    )
    p, q = (jnp.concatenate((m, jnp.maximum(1.0 - m.sum(-1, keepdims=True), 0.0)), axis=-1) for m in (p, q))
    q = jnp.where(data["mask"][:, None], q, 0.0)
    some = (q > 1e-12) & (p > 1e-12)
    kl = jnp.where(some, q * (jnp.log(jnp.where(some, q, 1.0)) - jnp.log(jnp.where(some, p, 1.0))), 0.0).sum(-1)
    return jnp.where(data["mask"], 0.5 * jnp.abs(p - q).sum(-1), 0.0), kl


def plain_loss(objective, divergence=None, centred=None):
    def loss(data):
        _, x, log_prob, top_k, b = plain_log_probs(data)
        rest = {name: data[name] for name in ("behavior_log_prob", "advantages", "mask")}
        measured = None if divergence is None else jax.lax.stop_gradient(divergence(data)[0])
        found = drpo_jax.policy_loss(objective, log_prob=log_prob, **rest, divergence=measured)[0]
        outcomes = {"full": (x, b), "top_k": (top_k, data["top_k_behavior_log_prob"])}.get(centred)
        for i in np.flatnonzero(MASK) if outcomes else ():
            ids = np.flatnonzero(inside()[i]) if centred == "full" else slice(None)
            x_i, b_i = outcomes[0][i, ids], outcomes[1][i, ids]
            some = jnp.isfinite(x_i)
            figures = (np.asarray(jax.lax.stop_gradient(a)) for a in (x_i, b_i, data["advantages"][i]))
            term = score_centering(objective, *figures, tail=centred == "top_k")
            found = found + jnp.sum(jnp.where(some, term.gradient * jnp.where(some, x_i, 0.0), 0.0)) / MASK.sum()
        return (found,)

    return loss


# --- the functions --------------------------------------------------------------------------------------------------------

HEAD = ("hidden", "weight", "bias")


def of_log_probs(name, inputs):
    def outputs(data, options):
        chunk = {"chunk_tokens": 2} if inputs == HEAD else {}
        arrays = {key: data[key] for key in (*inputs, "tokens", "top_k_ids", "mask")}
        return tuple(getattr(drpo_jax, name)(**arrays, **options, **chunk, entropy=True))

    return outputs


def of_loss(name, inputs, objective, **record):
    def outputs(data, options):
        made = {key: make(data) for key, make in record.items()}
        chunk = {"chunk_tokens": 2} if inputs == HEAD else {}
        arrays = {key: data[key] for key in (*inputs, "tokens", "behavior_log_prob", "advantages", "mask")}
        return (getattr(drpo_jax, name)(objective, **arrays, **options, **made, **chunk, diagnostics=False).loss,)

    return outputs


def of_full(data, options):
    arrays = {"logits": data["logits"], "behavior_logits": data["behavior"], "behavior_temperature": MU_TEMPERATURE}
    return tuple(jnp.where(MASK, a, 0.0) for a in drpo_jax.full_divergences(**arrays, **options))


def of_top_k(data, options):
    found = drpo_jax.token_log_prob(logits=data["logits"], tokens=data["tokens"], mask=data["mask"], **options)
    names = ("logits", "tokens", "behavior_log_prob", "top_k_ids", "top_k_behavior_log_prob")
    arrays = {name: data[name] for name in names} | {"log_normalizer": found.log_normalizer}
    return tuple(jnp.where(MASK, a, 0.0) for a in drpo_jax.top_k_divergences(**arrays, **options))


def head_of(data):
    return LinearHead(data["behavior_hidden"], data["behavior_weight"])


def recorded(data):
    return {"ids": data["top_k_ids"], "behavior_log_prob": data["top_k_behavior_log_prob"]}


MEASURED, CENTRED = DPPO(delta=0.2, divergence="per_token"), CISPO(max_ratio=1.2)
LOGITS, LINEAR = functools.partial(of_loss, "logits_policy_loss", ("logits",)), functools.partial(of_loss, "linear_policy_loss", HEAD)
# name → (our outputs, those by formulas)
FUNCTIONS = {
    "token_log_prob": (of_log_probs("token_log_prob", ("logits",)), plain_log_prob),
    "linear_log_prob": (of_log_probs("linear_log_prob", HEAD), plain_log_prob),
    "full_divergences": (of_full, plain_divergences),
    "top_k_divergences": (of_top_k, plain_top_k),
    "logits_policy_loss": (LOGITS(DRPO(delta=0.3)), plain_loss(DRPO(delta=0.3))),
    "logits_policy_loss, top-k": (
        LOGITS(MEASURED, divergence=lambda d: TopKDivergence(kind="tv", **recorded(d))),
        plain_loss(MEASURED, plain_top_k),
    ),
    "logits_policy_loss, full centring": (
        LOGITS(CENTRED, centering=lambda d: FullCentering(behavior=d["behavior"], temperature=MU_TEMPERATURE)),
        plain_loss(CENTRED, centred="full"),
    ),
    "linear_policy_loss": (LINEAR(DRPO(delta=0.3)), plain_loss(DRPO(delta=0.3))),
    "linear_policy_loss, full": (
        LINEAR(MEASURED, divergence=lambda d: FullDivergence(kind="tv", behavior=head_of(d), temperature=MU_TEMPERATURE)),
        plain_loss(MEASURED, plain_divergences),
    ),
    "linear_policy_loss, top-k centring": (
        LINEAR(CENTRED, centering=lambda d: TopKCentering(**recorded(d))),
        plain_loss(CENTRED, centred="top_k"),
    ),
    "linear_policy_loss, full centring": (
        LINEAR(CENTRED, centering=lambda d: FullCentering(behavior=head_of(d), temperature=MU_TEMPERATURE)),
        plain_loss(CENTRED, centred="full"),
    ),
}


def inputs_of(name, data):
    return {key: data[key] for key in (HEAD if name.startswith("linear") else ("logits",))}


def data_of(name):
    data = batch()
    if name.startswith("linear"):
        del data["logits"]
    elif "divergences" not in name:  # which has no mask, and so no rows that may hold anything
        data["logits"] = jnp.where(data["mask"][:, None], data["logits"], jnp.nan)
    return data


def pulled(function, inputs):
    """Outputs, and gradients of cotangents that are 0 nowhere, not at a log-prob of −∞ either."""
    values, pull = jax.vjp(function, inputs)
    rng = np.random.default_rng(2)
    return values, pull(tuple(jnp.asarray(rng.uniform(0.5, 1.0, size=value.shape)) for value in values))[0]


@functools.cache
def ours(name):
    """Compiled once for every kind of support and every change of an array."""

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(data, support):
        options = {"temperature": data["temperature"], "support": support, "vocabulary_size": V}
        return pulled(lambda inputs: FUNCTIONS[name][0](data | inputs, options), inputs_of(name, data))

    return run


@functools.cache
def expected(name):
    data = data_of(name)
    return pulled(lambda inputs: FUNCTIONS[name][1](data | inputs), inputs_of(name, data))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["ids", "bits", "mask"])
def test_values_and_gradients_are_those_of_a_softmax_over_the_ids(name, kind):
    if kind == "mask" and "," in name:
        pytest.skip("as bits")
    values, gradients = ours(name)(data_of(name), support_of(kind))
    wanted, wanted_gradients = expected(name)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
    jax.tree.map(close, values, wanted)
    for key, gradient in gradients.items():
        # padding has an exact 0
        wanted_gradient = np.nan_to_num(wanted_gradients[key])
        close(gradient, wanted_gradient, err_msg=key)
        np.testing.assert_array_equal(gradient == 0.0, wanted_gradient == 0.0, err_msg=key)
