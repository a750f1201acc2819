"""drpo_jax from hidden states and the LM head, against plain autodiff of the logits of every token at once."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_devices
from drpo_jax import FullDivergence, LinearHead, TopKDivergence, linear_policy_loss, logits_policy_loss, policy_loss
from drpo_jax.vocabulary import chunks

from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    PolicyGradient,
    PPOClip,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
)

H, V, K = 5, 13, 3
OBJECTIVES = [
    PolicyGradient(max_ratio=2.0),
    PPOClip(eps=0.2),
    CISPO(max_ratio=2.0),
    SPO(eps=0.2),
    DPPO(delta=0.05, divergence="binary_kl"),
    DRPO(delta=0.15),
    MaskDRPO(delta=0.15),
]
PARAMETERS = ("hidden", "weight", "bias")


def make(shape=(4, 6), dtype=jnp.float64):
    rng = np.random.default_rng(0)
    parameters = {
        "hidden": jnp.asarray(rng.normal(size=(*shape, H)), dtype=dtype),
        "weight": jnp.asarray(rng.normal(size=(V, H)), dtype=dtype),
        "bias": jnp.asarray(rng.normal(size=V), dtype=dtype),
    }
    tokens = jnp.asarray(rng.integers(0, V, size=shape))
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits_of(**parameters)), tokens[..., None], -1)[..., 0]
    batch = {
        "tokens": tokens,
        "behavior_log_prob": jnp.minimum(log_prob + 0.4 * rng.normal(size=shape), -0.001),
        "advantages": jnp.asarray(rng.normal(size=shape)),
        "mask": jnp.asarray(rng.random(shape) < 0.7),
    }
    return parameters, batch


def logits_of(hidden, weight, bias=None, softcap=None):
    z = hidden.astype(jnp.float64) @ weight.astype(jnp.float64).T
    z = z if bias is None else z + jnp.broadcast_to(bias.astype(jnp.float64), z.shape)
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def plain(objective, parameters, batch, *, softcap=None, temperature=1.0, **options):
    log_probs = jax.nn.log_softmax(logits_of(**parameters, softcap=softcap) / temperature)
    log_prob = jnp.take_along_axis(log_probs, batch["tokens"][..., None], axis=-1)[..., 0]
    rest = {name: array for name, array in batch.items() if name != "tokens"}
    return policy_loss(objective, log_prob=log_prob, **rest, **options)[0]


def ours(objective, batch, **options):
    options = {"chunk_tokens": 5} | options
    return lambda parameters: linear_policy_loss(objective, **parameters, **batch, **options).loss


def agree(found, expected, rtol=1e-10, atol=1e-13):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_loss_and_every_gradient(objective):
    parameters, batch = make()
    found = jax.jit(jax.value_and_grad(ours(objective, batch)))(parameters)
    agree(found, jax.value_and_grad(lambda p: plain(objective, p, batch))(parameters))


@pytest.mark.parametrize("chunk", [1, 7, 24, 1000])
def test_temperature_and_softcap_at_every_chunk_size(chunk, monkeypatch):
    monkeypatch.setattr(chunks, "_WEIGHT_ROWS", 4)
    parameters, batch = make()
    found = jax.jit(jax.value_and_grad(ours(DRPO(delta=0.15), batch, temperature=0.8, logit_softcap=3.0, chunk_tokens=chunk)))
    agree(
        found(parameters),
        jax.value_and_grad(lambda p: plain(DRPO(delta=0.15), p, batch, temperature=0.8, softcap=3.0))(parameters),
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", [sequence_mean_token_mean, sequence_mean_token_sum])
def test_reductions(reduction, packed):
    shape = (24,) if packed else (4, 6)
    parameters, batch = make(shape)
    options = {"reduction": reduction, "normalizer": 9.0, "token_weights": jnp.linspace(0.5, 2.0, 24).reshape(shape)}
    if packed:
        options["segment_ids"] = jnp.arange(24) // 5
    found = jax.jit(jax.value_and_grad(ours(DRPO(delta=0.15), batch, **options)))(parameters)
    agree(found, jax.value_and_grad(lambda p: plain(DRPO(delta=0.15), p, batch, **options))(parameters))


def test_statistics_are_those_of_the_logits():
    parameters, batch = make()
    found = linear_policy_loss(DRPO(delta=0.15), **parameters, **batch, entropy=True, chunk_tokens=5)
    expected = logits_policy_loss(DRPO(delta=0.15), logits=logits_of(**parameters), **batch, entropy=True)
    agree(tuple(found), tuple(expected), atol=1e-12)
    assert linear_policy_loss(DRPO(delta=0.15), **parameters, **batch).entropy is None


@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("source", ["given", "top-k", "full", "head"])
def test_dppo_measures_its_divergence_in_the_chunk(kind, source):
    parameters, batch = make()
    head = LinearHead(parameters["hidden"] + 0.2, parameters["weight"] * 0.9, parameters["bias"], 4.0)
    behavior = logits_of(head.hidden, head.weight, head.bias, head.logit_softcap)
    log_mu = jax.nn.log_softmax(behavior)
    batch["behavior_log_prob"] = jnp.take_along_axis(log_mu, batch["tokens"][..., None], -1)[..., 0]
    top, ids = jax.lax.top_k(log_mu, K)
    divergence = {
        "given": jnp.linspace(0.0, 1.0, 24).reshape(4, 6),
        "top-k": TopKDivergence(kind=kind, ids=ids, behavior_log_prob=top),
        "full": FullDivergence(kind=kind, behavior=behavior),
        "head": FullDivergence(kind=kind, behavior=head),
    }[source]
    objective = DPPO(delta=0.12, divergence="per_token")
    found = jax.jit(jax.grad(ours(objective, batch, divergence=divergence)))(parameters)

    def whole(parameters):
        return logits_policy_loss(objective, logits=logits_of(**parameters), **batch, divergence=divergence).loss

    agree(found, jax.grad(whole)(parameters))
    kept = jnp.any(found["hidden"] != 0.0, axis=-1)
    assert 0 < int(kept.sum()) < int(batch["mask"].sum())


def test_masked_positions_may_hold_anything():
    parameters, batch = make()
    mask = batch["mask"]
    dirty = {name: jnp.where(mask, batch[name], jnp.nan) for name in ("behavior_log_prob", "advantages")}
    dirty |= {"mask": mask, "tokens": jnp.where(mask, batch["tokens"], -100)}
    hidden = jnp.where(mask[..., None], parameters["hidden"], jnp.nan)
    found = jax.value_and_grad(ours(DRPO(delta=0.15), dirty))(parameters | {"hidden": hidden})
    agree(found, jax.value_and_grad(ours(DRPO(delta=0.15), batch))(parameters), rtol=0.0, atol=0.0)
    assert not bool(jnp.any(jnp.where(mask[..., None], 0.0, found[1]["hidden"])))


@pytest.mark.parametrize("shape", [(0, 6), (4, 6)])
def test_no_valid_token(shape):
    parameters, batch = make(shape)
    batch["mask"] = jnp.zeros(shape, dtype=bool)
    loss, gradients = jax.value_and_grad(ours(DRPO(delta=0.15), batch))(parameters)
    assert float(loss) == 0.0
    assert all(not bool(jnp.any(g)) for g in jax.tree.leaves(gradients))


def products(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general")


def test_only_the_needed_gradients_are_formed():
    parameters, batch = make()
    loss = ours(DRPO(delta=0.15), batch)

    def count(*names):
        def of(some):
            return loss(parameters | some)

        return products(jax.grad(of) if names else of, {name: parameters[name] for name in names})

    nothing, hidden, bias = count(), count("hidden"), count("bias")
    assert (nothing, hidden, bias) == (1, 2, 1)
    # blocks of ∂weight, of which there may be a smaller last one
    assert count("weight") == 2
    frozen = jax.grad(lambda h: loss(parameters | {"hidden": h}))(parameters["hidden"])
    agree(frozen, jax.grad(loss)(parameters)["hidden"])
    frozen = jax.grad(lambda w: loss(parameters | {"weight": w}))(parameters["weight"])
    agree(frozen, jax.grad(loss)(parameters)["weight"])


def test_without_a_bias():
    parameters, batch = make()
    del parameters["bias"]
    found = jax.value_and_grad(ours(DRPO(delta=0.15), batch))(parameters)
    agree(found, jax.value_and_grad(lambda p: plain(DRPO(delta=0.15), p, batch))(parameters))


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_low_precision(dtype, rtol):
    # bfloat16: the gradient of the logits is rounded to 8 bits before the products, whose sums are float32
    parameters, batch = make((64, 4), dtype=dtype)
    batch = {name: a.astype(jnp.float32) if a.dtype == jnp.float64 else a for name, a in batch.items()}
    loss, gradients = jax.jit(jax.value_and_grad(ours(DRPO(delta=0.15), batch, chunk_tokens=32)))(parameters)
    expected, expected_gradients = jax.value_and_grad(lambda p: plain(DRPO(delta=0.15), p, batch))(
        jax.tree.map(lambda a: a.astype(jnp.float64), parameters)
    )
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    for name in PARAMETERS:
        assert gradients[name].dtype == dtype
        scale = float(jnp.abs(expected_gradients[name]).max())
        found = gradients[name].astype(jnp.float64)
        np.testing.assert_allclose(found, expected_gradients[name], rtol=rtol, atol=rtol * scale)


def test_vmap_and_cotangents():
    parameters, batch = make()

    def loss(hidden, batch):
        return 3.0 * linear_policy_loss(DRPO(delta=0.15), **parameters | {"hidden": hidden}, **batch, chunk_tokens=4).loss

    found = jax.vmap(jax.grad(loss))(parameters["hidden"], batch)
    for i in range(4):
        row = {name: array[i] for name, array in batch.items()}
        expected = jax.grad(lambda h, row=row: 3.0 * plain(DRPO(delta=0.15), parameters | {"hidden": h}, row))(
            parameters["hidden"][i]
        )
        np.testing.assert_allclose(found[i], expected, rtol=1e-10, atol=1e-13)


def test_a_second_derivative_in_forward_mode_is_that_of_the_formula():
    parameters, batch = make()
    rng = np.random.default_rng(2)
    direction = {name: jnp.asarray(rng.normal(size=a.shape)) for name, a in parameters.items()}
    found, expected = (
        jax.jit(lambda p, f=f: jax.jvp(jax.grad(f), (p,), (direction,))[1])(parameters)
        for f in (ours(DRPO(delta=0.15), batch), lambda p: plain(DRPO(delta=0.15), p, batch))
    )
    agree(found, expected)


def test_a_second_derivative_in_reverse_mode_is_refused():
    parameters, batch = make()
    gradient = jax.grad(ours(DRPO(delta=0.15), batch))
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.jit(jax.grad(lambda p: gradient(p)["weight"].sum()))(parameters)


def test_float16_holds_the_gradient_of_a_share_of_a_million_tokens():
    """With the loss scaled, as it has to be in float16; what is within a chunk is scaled by the function itself."""
    parameters, batch = make((64,), dtype=jnp.float16)
    batch = {name: a.astype(jnp.float32) if a.dtype == jnp.float64 else a for name, a in batch.items()}
    options = {"normalizer": 1e6, "chunk_tokens": 16}
    found = jax.grad(lambda p: 1e6 * ours(DRPO(delta=0.15), batch, **options)(p))(parameters)
    exact = jax.tree.map(lambda a: a.astype(jnp.float64), parameters)
    expected = jax.grad(lambda p: 1e6 * plain(DRPO(delta=0.15), p, batch, normalizer=1e6))(exact)
    for name in PARAMETERS:
        scale = float(jnp.abs(expected[name]).max())
        np.testing.assert_allclose(found[name].astype(jnp.float64), expected[name], rtol=0.0, atol=2e-3 * scale)


def compiled(n, vocabulary, chunk):
    shapes = {"hidden": (n, 64), "weight": (vocabulary, 64)}
    parameters = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    floats, integers = jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)
    batch = {"tokens": integers, "behavior_log_prob": floats, "advantages": floats}
    batch["mask"] = jax.ShapeDtypeStruct((n,), jnp.bool_)

    @jax.jit
    def step(parameters, batch):
        return jax.value_and_grad(ours(DRPO(delta=0.15), batch, chunk_tokens=chunk))(parameters)

    return step.lower(parameters, batch).compile()


def test_the_matrix_of_tokens_by_vocabulary_never_exists():
    n, vocabulary, chunk = 512, 4099, 16
    step = compiled(n, vocabulary, chunk)
    assert f"[{n},{vocabulary}]" not in step.as_text()
    assert f"[{chunk},{vocabulary}]" in step.as_text()
    one_chunk, weight = chunk * vocabulary * 4, vocabulary * 64 * 4
    per_token = n * (64 + 16) * 4 * 2
    assert step.memory_analysis().temp_size_in_bytes < 5 * one_chunk + 2 * weight + per_token


def test_memory_does_not_grow_with_the_tokens():
    small, large = (compiled(n, 4099, 16).memory_analysis().temp_size_in_bytes for n in (512, 2048))
    assert large - small <= (2048 - 512) * (64 + 32) * 4 * 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens: expected a finite number, 1 or more, got 0"),
        ({"logit_softcap": -1.0}, ValueError, "logit_softcap: expected a finite number greater than 0, got -1.0"),
        (
            {"weight": jnp.zeros((V, H + 1))},
            ValueError,
            r"weight: expected the shape of the vocabulary and hidden, \(V, H\), \(13, 5\), got \(13, 6\)",
        ),
        ({"bias": jnp.zeros(V - 1)}, ValueError, r"bias: expected the shape of the vocabulary, \(V,\), \(13,\), got \(12,\)"),
        ({"mask": jnp.ones((4, 6))}, TypeError, "mask: expected a bool dtype"),
        ({"hidden": np.zeros((4, 6, H))}, TypeError, "hidden: expected a jax.Array, got ndarray"),
        ({"reduction": lambda *_, **__: 0.0}, TypeError, "reduction: expected token_mean, .* or a linear_reduction"),
    ],
)
def test_errors(change, error, message):
    parameters, batch = make()
    with pytest.raises(error, match=message):
        linear_policy_loss(DRPO(delta=0.15), **parameters | batch | change)


SHARDED = """
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from drpo_core import DRPO
from drpo_jax import Support, linear_log_prob, linear_policy_loss

assert jax.device_count() == 4
keys = jax.random.split(jax.random.key(0), 6)
n, size, vocabulary = 32, 5, 11
rows = (
    jax.random.normal(keys[0], (n, size)),
    jax.random.randint(keys[2], (n,), 0, vocabulary),
    -3.0 * jax.random.uniform(keys[3], (n,)) - 0.01,
    jax.random.normal(keys[4], (n,)),
    jax.random.uniform(keys[5], (n,)) < 0.7,
)
weight, count = 0.3 * jax.random.normal(keys[1], (vocabulary, size)), rows[-1].sum()
weight = jnp.append(weight, jnp.full((1, size), jnp.nan), axis=0)
# a support of the token and the next ids, as bits, which are divided as the tokens are
rows += (jnp.linspace(0.5, 2.0, n), ((7 << rows[1]).astype(jnp.int32))[:, None])

def loss(weight, hidden, tokens, behavior, advantages, mask, temperature, bits, count):
    batch = {"tokens": tokens, "behavior_log_prob": behavior, "advantages": advantages, "mask": mask}
    how = {"hidden": hidden, "weight": weight, "chunk_tokens": 3, "vocabulary_size": vocabulary}
    row_map = {"temperature": temperature, "support": Support.from_bits(bits)}
    loss = linear_policy_loss(DRPO(delta=0.15), **how, **batch, normalizer=count).loss
    found = linear_log_prob(**how, **row_map, tokens=tokens, mask=mask, top_k_ids=tokens[:, None], entropy=True)
    return loss + jnp.sum(found.log_prob - 0.1 * found.entropy + 0.3 * found.top_k_log_prob[:, 0])

def same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), found, expected)

step = jax.jit(jax.value_and_grad(loss, (0, 1)))
expected = step(weight, *rows, count)
specs = (P(), *[P("data")] * 7, P())

def inside(*arguments):
    part, gradients = jax.value_and_grad(loss, (0, 1))(*arguments)
    return jax.lax.psum(part, "data"), gradients

for axis_type in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    placed = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a, spec in zip((weight, *rows, count), specs)]
    summed = jax.shard_map(lambda *a: jax.lax.psum(loss(*a), "data"), mesh=mesh, in_specs=specs, out_specs=P())
    same(jax.jit(jax.value_and_grad(summed, (0, 1)))(*placed), expected)
    out = (P(), (P(), P("data")))
    same(jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=out))(*placed), expected)
    same(step(*placed), expected)
"""


def test_sharded_over_four_devices():
    several_devices.run("-c", textwrap.dedent(SHARDED), optimised=True)
