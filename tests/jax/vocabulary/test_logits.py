"""drpo_jax from logits: log-probs, entropy, divergences and policy losses against plain autodiff of a log-softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drpo_jax import (
    FullDivergence,
    LinearHead,
    TopKDivergence,
    full_divergences,
    logits_policy_loss,
    policy_loss,
    token_log_prob,
    top_k_divergences,
)

from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    PolicyGradient,
    PPOClip,
    full_kl,
    full_tv,
    sampled_in_top_k,
    sequence_mean_token_mean,
    token_mean,
    top_k_kl,
    top_k_tv,
)

V, K = 17, 4
OBJECTIVES = [
    PolicyGradient(max_ratio=2.0),
    PPOClip(eps=0.2),
    CISPO(max_ratio=2.0),
    SPO(eps=0.2),
    DPPO(delta=0.05, divergence="binary_kl"),
    DRPO(delta=0.15),
    MaskDRPO(delta=0.15),
]
each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)


def make(shape=(4, 6), dtype=jnp.float64):
    rng = np.random.default_rng(0)
    logits, behavior = 2.0 * rng.normal(size=(2, *shape, V))
    tokens = rng.integers(0, V, size=shape)
    behavior = 0.5 * behavior + 0.5 * logits
    log_mu = np.asarray(jax.nn.log_softmax(jnp.asarray(behavior)))
    ids = np.argsort(-log_mu, axis=-1)[..., :K]
    return {
        "logits": jnp.asarray(logits, dtype=dtype),
        "behavior_logits": jnp.asarray(behavior, dtype=dtype),
        "tokens": jnp.asarray(tokens),
        "behavior_log_prob": jnp.asarray(np.take_along_axis(log_mu, tokens[..., None], -1)[..., 0]),
        "advantages": jnp.asarray(rng.normal(size=shape)),
        "mask": jnp.asarray(rng.random(shape) < 0.7),
        "ids": jnp.asarray(ids),
        "top_k": jnp.asarray(np.take_along_axis(log_mu, ids, -1)),
    }


def batch_of(data):
    return {name: data[name] for name in ("tokens", "behavior_log_prob", "advantages", "mask")}


def plain(objective, logits, data, temperature=1.0, **options):
    """The loss by a log-softmax of everything, differentiated by JAX."""
    log_probs = jax.nn.log_softmax(logits / temperature)
    log_prob = jnp.take_along_axis(log_probs, data["tokens"][..., None], axis=-1)[..., 0]
    rest = {name: data[name] for name in ("behavior_log_prob", "advantages", "mask")}
    return policy_loss(objective, log_prob=log_prob, **rest, **options)[0]


def close(found, expected, rtol=1e-10, atol=1e-13):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def test_minus_infinity_is_a_probability_of_zero():
    logits = jnp.asarray([[0.0, -jnp.inf, 1.0]])

    def total(logits):
        selected = token_log_prob(logits=logits, tokens=jnp.asarray([0]), entropy=True)
        return jnp.sum(selected.log_prob + selected.entropy)

    def without(logits):
        log_probs = jax.nn.log_softmax(logits)
        return log_probs[0] - jnp.sum(jnp.exp(log_probs) * log_probs)

    gradient = jax.grad(total)(logits)
    assert gradient[0, 1] == 0.0
    close(gradient[0, ::2], jax.grad(without)(jnp.asarray([0.0, 1.0])))


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-5)])
def test_low_precision_logits_are_accumulated_in_float32(dtype, rtol):
    data = make((64,))
    low = data["logits"].astype(dtype)
    columns = {"tokens": data["tokens"], "top_k_ids": data["ids"]}
    selected = token_log_prob(logits=low, **columns, entropy=True)
    exact = token_log_prob(logits=low.astype(jnp.float64), **columns, entropy=True)
    for name, found, expected in zip(selected._fields, selected, exact, strict=True):
        assert found.dtype == (jnp.int32 if name == "top_k_ids" else jnp.float32)
        close(found, expected, rtol=rtol, atol=1e-6)
    gradient = jax.grad(lambda x: token_log_prob(logits=x, tokens=data["tokens"]).log_prob.sum())(low)
    assert gradient.dtype == dtype


def test_divergences_are_the_cores():
    data = make()
    x, b = (jax.nn.log_softmax(data[name] / 0.7) for name in ("logits", "behavior_logits"))
    found = full_divergences(logits=data["logits"], behavior_logits=data["behavior_logits"], temperature=0.7)
    close(found.tv, full_tv(x, b))
    close(found.kl, full_kl(x, b))
    selected = token_log_prob(logits=data["logits"], tokens=data["tokens"], temperature=0.7)
    recorded = {"top_k_log_prob": jnp.take_along_axis(x, data["ids"], -1), "top_k_behavior_log_prob": data["top_k"]}
    found = top_k_divergences(
        logits=data["logits"],
        log_normalizer=selected.log_normalizer,
        tokens=data["tokens"],
        behavior_log_prob=data["behavior_log_prob"],
        top_k_ids=data["ids"],
        top_k_behavior_log_prob=data["top_k"],
        temperature=0.7,
    )
    inside = sampled_in_top_k(data["tokens"], data["ids"])
    for value, function in zip(found, (top_k_tv, top_k_kl), strict=True):
        close(value, function(selected.log_prob, data["behavior_log_prob"], **recorded, sampled_in_top_k=inside))


def test_gradient_of_the_full_divergences():
    data = make()

    def naive(logits):
        difference = jax.nn.softmax(logits) - jax.nn.softmax(data["behavior_logits"])
        log_mu = jax.nn.log_softmax(data["behavior_logits"])
        kl = jnp.exp(log_mu) * (log_mu - jax.nn.log_softmax(logits))
        return 0.5 * jnp.abs(difference).sum() + kl.sum()

    def ours(logits):
        tv, kl = full_divergences(logits=logits, behavior_logits=data["behavior_logits"])
        return (tv + kl).sum()

    close(jax.grad(ours)(data["logits"]), jax.grad(naive)(data["logits"]), rtol=1e-9, atol=1e-12)


@each_objective
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_policy_loss_from_logits(objective, temperature):
    data = make()

    @jax.jit
    def step(logits):
        result = logits_policy_loss(objective, logits=logits, **batch_of(data), temperature=temperature, entropy=True)
        return result.loss, result

    (loss, result), gradient = jax.value_and_grad(step, has_aux=True)(data["logits"])
    expected, expected_gradient = jax.value_and_grad(lambda x: plain(objective, x, data, temperature))(data["logits"])
    close(loss, expected)
    close(gradient, expected_gradient)
    assert bool(jnp.all(data["mask"] | ((result.log_prob == 0.0) & (result.entropy == 0.0))))
    assert float(result.diagnostics["ratio_mean"].count) == float(data["mask"].sum())


def test_packed_tokens_and_token_weights():
    data = make((24,))
    options = {
        "reduction": sequence_mean_token_mean,
        "segment_ids": jnp.arange(24) // 5,
        "token_weights": jnp.linspace(0.5, 2.0, 24),
        "normalizer": 7,
    }
    found = jax.grad(lambda x: logits_policy_loss(DRPO(delta=0.15), logits=x, **batch_of(data), **options).loss)
    close(found(data["logits"]), jax.grad(lambda x: plain(DRPO(delta=0.15), x, data, **options))(data["logits"]))


@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("source", ["top-k", "full", "head"])
def test_dppo_measures_its_divergence(kind, source):
    data = make()
    log_probs = jax.nn.log_softmax(data["logits"])
    if source == "top-k":
        divergence = TopKDivergence(kind=kind, ids=data["ids"], behavior_log_prob=data["top_k"])
        measured = {"tv": top_k_tv, "kl": top_k_kl}[kind](
            jnp.take_along_axis(log_probs, data["tokens"][..., None], -1)[..., 0],
            data["behavior_log_prob"],
            top_k_log_prob=jnp.take_along_axis(log_probs, data["ids"], -1),
            top_k_behavior_log_prob=data["top_k"],
            sampled_in_top_k=sampled_in_top_k(data["tokens"], data["ids"]),
        )
    else:
        behavior = data["behavior_logits"] if source == "full" else LinearHead(data["behavior_logits"], jnp.eye(V))
        divergence = FullDivergence(kind=kind, behavior=behavior)
        measured = {"tv": full_tv, "kl": full_kl}[kind](log_probs, jax.nn.log_softmax(data["behavior_logits"]))
    objective = DPPO(delta=float(jnp.median(measured)), divergence="per_token")

    @jax.jit
    def ours(logits, divergence):
        return logits_policy_loss(objective, logits=logits, **batch_of(data), divergence=divergence).loss

    found = jax.grad(ours)(data["logits"], divergence)
    close(found, jax.grad(lambda x: plain(objective, x, data, divergence=measured))(data["logits"]))
    kept = jnp.any(found != 0.0, axis=-1)
    assert 0 < int(kept.sum()) < int(data["mask"].sum())


def test_masked_positions_may_hold_anything():
    data = make()
    mask = data["mask"]
    dirty = data | {
        "logits": jnp.where(mask[..., None], data["logits"], jnp.nan),
        "behavior_log_prob": jnp.where(mask, data["behavior_log_prob"], jnp.nan),
        "advantages": jnp.where(mask, data["advantages"], jnp.inf),
        "tokens": jnp.where(mask, data["tokens"], -100),
    }

    def step(data):
        return jax.value_and_grad(lambda x: logits_policy_loss(DRPO(delta=0.15), logits=x, **batch_of(data)).loss)(
            data["logits"]
        )

    (loss, gradient), (expected, expected_gradient) = step(dirty), step(data)
    assert float(loss) == float(expected)
    np.testing.assert_array_equal(gradient, expected_gradient)
    assert not bool(jnp.any(jnp.where(mask[..., None], 0.0, gradient)))


def test_vmap():
    data = make()

    def loss(logits, row):
        return logits_policy_loss(DRPO(delta=0.15), logits=logits, **row).loss

    found = jax.vmap(jax.grad(loss))(data["logits"], batch_of(data))
    for i in range(4):
        row = {name: array[i] for name, array in data.items()}
        close(found[i], jax.grad(lambda x, row=row: plain(DRPO(delta=0.15), x, row))(data["logits"][i]))


def test_no_log_softmax_is_kept():
    data = make((64,))
    _, pull = jax.vjp(lambda x: logits_policy_loss(DRPO(delta=0.15), logits=x, **batch_of(data)).loss, data["logits"])
    given = data["logits"].unsafe_buffer_pointer()
    large = [a for a in jax.tree.leaves(pull) if a.size >= data["logits"].size and a.unsafe_buffer_pointer() != given]
    assert not large


def test_a_step_has_no_array_of_the_logits_size_beside_the_gradient():
    n, vocabulary = 64, 4096
    logits = jax.ShapeDtypeStruct((n, vocabulary), jnp.float32)
    data = make((n,))

    @jax.jit
    def step(logits):
        return jax.value_and_grad(lambda x: logits_policy_loss(DRPO(delta=0.15), logits=x, **batch_of(data)).loss)(logits)

    memory = step.lower(logits).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.25 * n * vocabulary * 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number greater than 0, got 0.0"),
        ({"tokens": jnp.zeros((4, 6))}, TypeError, "tokens: expected an integral dtype"),
        (
            {"tokens": jnp.zeros((4, 5), int)},
            ValueError,
            r"tokens: expected the shape of logits without its last axis, \(4, 6\), got \(4, 5\)",
        ),
        ({"logits": np.zeros((4, 6, V))}, TypeError, "logits: expected a jax.Array, got ndarray"),
        ({"reduction": lambda *_, **__: 0.0}, TypeError, "reduction: expected token_mean, .* or a linear_reduction"),
        ({"divergence": jnp.zeros(3)}, ValueError, r"divergence: expected the shape of the tokens, \(4, 6\), got \(3,\)"),
    ],
)
def test_errors(change, error, message):
    data = make()
    arguments = {"logits": data["logits"], **batch_of(data), "reduction": token_mean} | change
    with pytest.raises(error, match=message):
        logits_policy_loss(DRPO(delta=0.15), **arguments)
    with pytest.raises(ValueError, match="kind: expected one of 'tv', 'kl', got 'js'"):
        functools.partial(TopKDivergence, kind="js")(ids=data["ids"], behavior_log_prob=data["top_k"])
