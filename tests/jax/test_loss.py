"""What drpo_jax promises beyond what both adapters do: transformations, sharding, residuals, x64 off."""

import collections
import dataclasses
import functools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_devices
from drpo_jax import loss as loss_module
from drpo_jax import policy_loss, token_loss
from drpo_jax._namespace import xp

from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    PolicyGradient,
    PPOClip,
    Tokens,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_diagnostics,
    token_loss_and_gradient,
    token_mean,
)
from drpo_core import tokens as tokens_module

OBJECTIVES = [
    PolicyGradient(max_ratio=2.0),
    PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
    CISPO(max_ratio=2.0),
    SPO(eps=0.2),
    DPPO(delta=0.05, divergence="binary_kl"),
    DPPO(delta=0.1, divergence="per_token"),
    DRPO(delta=0.15),
    MaskDRPO(delta=0.15),
]
ONE_OF_A_KIND = [PPOClip(eps=0.2), CISPO(max_ratio=2.0), DPPO(delta=0.1, divergence="per_token"), DRPO(delta=0.15)]
REDUCTIONS = [token_mean, sequence_mean_token_mean, functools.partial(sequence_mean_token_sum, horizon=7.0)]

each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
each_kind = pytest.mark.parametrize("objective", ONE_OF_A_KIND, ids=repr)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS, ids=["token-mean", "seq-mean-token-mean", "token-sum"])


def batch(shape=(4, 6), dtype=np.float64):
    rng = np.random.default_rng(0)
    behavior = -3.0 * rng.random(shape) - 0.01
    data = {
        "log_prob": np.minimum(behavior + 0.8 * rng.normal(size=shape), -0.001),
        "behavior_log_prob": behavior,
        "advantages": rng.normal(size=shape),
        "divergence": 0.3 * rng.random(shape),
    }
    mask = jnp.asarray(rng.random(shape) < 0.7)
    return {name: jnp.asarray(array, dtype=dtype) for name, array in data.items()} | {"mask": mask}


def core(objective, data):
    arrays = [data[name] for name in ("log_prob", "behavior_log_prob", "advantages")]
    return token_loss_and_gradient(objective, *arrays, mask=data["mask"], divergence=data["divergence"])


def in_log_prob(objective, data, function=policy_loss, **options):
    """The loss as a function of `log_prob` alone, jitted."""

    @jax.jit
    def loss(log_prob):
        result = function(objective, **data | {"log_prob": log_prob}, **options)
        return result[0] if isinstance(result, tuple) else result

    return loss


@each_kind
def test_jit_with_a_static_objective_and_grad_with_diagnostics(objective):
    data = batch()
    expected = core(objective, data)
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(objective, data):
        traced.append(objective)

        def loss(log_prob):
            return policy_loss(objective, **data | {"log_prob": log_prob})

        return jax.value_and_grad(loss, has_aux=True)(data["log_prob"])

    (value, statistics), gradient = step(objective, data)
    step(dataclasses.replace(objective), data)
    assert len(traced) == 1, "equal objectives share a compilation"
    count = float(data["mask"].sum())
    np.testing.assert_allclose(value, expected.loss.sum() / count, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected.gradient / count, rtol=1e-12, atol=1e-14)
    assert all(part.shape == () for part in jax.tree.leaves(statistics))
    assert policy_loss(objective, **data, diagnostics=False)[1] is None
    closed_over = jax.jit(jax.grad(in_log_prob(objective, data)))(data["log_prob"])
    np.testing.assert_allclose(closed_over, gradient, rtol=1e-12, atol=1e-14)


@each_kind
def test_vmap(objective):
    data = batch()

    @jax.jit
    @jax.vmap
    def rows(row):
        return jax.value_and_grad(lambda x: policy_loss(objective, **row | {"log_prob": x})[0])(row["log_prob"])

    expected = core(objective, data)
    count = np.maximum(data["mask"].sum(axis=1), 1)
    values, gradients = rows(data)
    np.testing.assert_allclose(values, expected.loss.sum(axis=1) / count, rtol=1e-12)
    np.testing.assert_allclose(gradients, expected.gradient / count[:, None], rtol=1e-12, atol=1e-14)


@each_kind
def test_forward_mode(objective):
    data = batch()
    tangent = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)))
    expected = core(objective, data)
    primal, derivative = jax.jvp(in_log_prob(objective, data, token_loss), (data["log_prob"],), (tangent,))
    np.testing.assert_allclose(primal, expected.loss, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(derivative, expected.gradient * tangent, rtol=1e-12, atol=1e-14)
    _, total = jax.jvp(in_log_prob(objective, data), (data["log_prob"],), (tangent,))
    np.testing.assert_allclose(total, (expected.gradient * tangent).sum() / data["mask"].sum(), rtol=1e-12)


@each_objective
def test_second_derivative_is_that_of_the_formula(objective):
    # the loss of a token depends on that token alone, so the Hessian of the sum is a diagonal
    data = batch()
    x, step = data["log_prob"], 1e-6

    @jax.jit
    def gradient(log_prob):
        return jax.grad(lambda y: token_loss(objective, **data | {"log_prob": y}).sum())(log_prob)

    _, second = jax.jvp(gradient, (x,), (jnp.ones_like(x),))
    differences = (gradient(x + step) - gradient(x - step)) / (2.0 * step)
    np.testing.assert_allclose(second, differences, rtol=1e-6, atol=1e-7)


def test_second_derivative_of_drpo_and_of_the_score_form():
    data = batch()
    a, r = data["advantages"], jnp.exp(data["log_prob"] - data["behavior_log_prob"])
    pi, mu = jnp.exp(data["log_prob"]), jnp.exp(data["behavior_log_prob"])
    # mathematics: −r A [1 − sign(A)(2π − μ)/δ]; the score form −sg(min(r, c)) A log π itself would have 0,
    # its rule −A min(r, c) has −A r below the cap
    cases = [
        (DRPO(delta=0.15), -r * a * (1.0 - jnp.sign(a) * (2.0 * pi - mu) / 0.15)),
        (CISPO(max_ratio=2.0), jnp.where(r < 2.0, -a * r, 0.0)),
    ]
    for objective, expected in cases:
        total = in_log_prob(objective, data, lambda *args, **kwargs: token_loss(*args, **kwargs).sum())
        diagonal = jnp.diag(jax.hessian(total)(data["log_prob"]).reshape(24, 24)).reshape(4, 6)
        np.testing.assert_allclose(diagonal, jnp.where(data["mask"], expected, 0.0), rtol=1e-10, atol=1e-12)


def test_hessian_of_the_scalar_is_symmetric():
    data = batch()
    hessian = jax.hessian(in_log_prob(DRPO(delta=0.15), data))(data["log_prob"]).reshape(24, 24)
    np.testing.assert_array_equal(hessian, jnp.diag(jnp.diag(hessian)))
    assert jnp.abs(hessian).max() > 0.0


# large batches, a chunk at a time on a CPU


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 7 tokens: 24 tokens are three and a remainder; 21 are three."""
    monkeypatch.setattr(loss_module, "_CHUNK", 7)


@pytest.mark.usefixtures("small_chunks")
@each_kind
@pytest.mark.parametrize("shape", [(4, 6), (24,), (3, 7), (2, 4)])
def test_chunks_add_up_to_the_whole(objective, shape):
    data = batch(shape)
    expected = core(objective, data)
    count = float(data["mask"].sum())
    value, gradient = jax.value_and_grad(in_log_prob(objective, data))(data["log_prob"])
    np.testing.assert_allclose(value, expected.loss.sum() / count, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected.gradient / count, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("small_chunks")
@each_kind
@pytest.mark.parametrize("shape", [(4, 6), (21,)])
@pytest.mark.parametrize("chosen", ["cpu", "default"])
def test_diagnostics_of_large_batches(objective, shape, chosen, monkeypatch):
    """In chunks on a CPU, and elsewhere as one reduction."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, **branches: branches[chosen](*arrays))
    data = batch(shape)
    data["advantages"] = data["advantages"].at[..., 2].set(0.0)
    value = jax.jit(lambda data: policy_loss(objective, **data)[0])(data)
    np.testing.assert_allclose(value, core(objective, data).loss.sum() / float(data["mask"].sum()), rtol=1e-12)
    data["advantages"] = data["advantages"].at[..., 3].set(jnp.nan)
    _, statistics = jax.jit(functools.partial(policy_loss, objective))(**data)
    expected = token_diagnostics(objective, **data)
    assert jax.tree.structure(statistics) == jax.tree.structure(expected)
    for name, statistic in expected.items():
        np.testing.assert_allclose(statistics[name], statistic, rtol=1e-12, err_msg=name)


@pytest.mark.usefixtures("small_chunks")
@each_reduction
def test_chunks_have_their_own_coefficients(reduction):
    data = batch()
    dirty = data | {name: jnp.where(data["mask"], data[name], jnp.nan) for name in ("log_prob", "advantages")}
    options = {"reduction": reduction, "token_weights": jnp.linspace(0.5, 2.0, 24).reshape(4, 6)}
    value, gradient = jax.value_and_grad(in_log_prob(DRPO(delta=0.15), dirty, **options))(dirty["log_prob"])

    @jax.jit
    def by_token(log_prob):
        losses = token_loss(DRPO(delta=0.15), **data | {"log_prob": log_prob})
        return reduction(losses, data["mask"], token_weights=options["token_weights"])

    expected, expected_gradient = jax.value_and_grad(by_token)(data["log_prob"])
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("small_chunks")
def test_chunks_under_other_transformations():
    data = batch((4, 10))
    loss = in_log_prob(DRPO(delta=0.15), data)
    hessian = jax.hessian(loss)(data["log_prob"]).reshape(40, 40)
    step = 1e-6 * jnp.ones((4, 10))
    gradient = jax.grad(loss)
    differences = (gradient(data["log_prob"] + step) - gradient(data["log_prob"] - step)) / 2e-6
    np.testing.assert_allclose(jnp.diag(hessian).reshape(4, 10), differences, rtol=1e-6, atol=1e-8)
    rows = jax.vmap(lambda row: jax.grad(in_log_prob(DRPO(delta=0.15), row))(row["log_prob"]))(data)
    for i in range(4):
        row = {name: array[i] for name, array in data.items()}
        expected = core(DRPO(delta=0.15), row).gradient / max(1.0, float(row["mask"].sum()))
        np.testing.assert_allclose(rows[i], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("small_chunks")
def test_the_derivative_of_value_and_gradient_is_that_of_the_rule():
    # of a loss in score form, automatic differentiation of the value would be something else
    data = batch()
    loss = in_log_prob(CISPO(max_ratio=2.0), data)
    tangent = jnp.ones((4, 6))
    (_, gradient), (slope, _) = jax.jvp(jax.value_and_grad(loss), (data["log_prob"],), (tangent,))
    np.testing.assert_allclose(slope, gradient.sum(), rtol=1e-12)


@pytest.mark.parametrize("objective", [CISPO(max_ratio=2.0), DRPO(delta=0.15)], ids=repr)
def test_the_derivative_of_losses_and_their_gradients_is_that_of_the_rule(objective):
    data = batch()
    losses = in_log_prob(objective, data, token_loss)
    tangent = jnp.ones((4, 6))

    def both(log_prob):
        value, pull = jax.vjp(losses, log_prob)
        return value, pull(tangent)[0]

    (_, gradient), (slope, curvature) = jax.jvp(both, (data["log_prob"],), (tangent,))
    np.testing.assert_allclose(slope, gradient, rtol=1e-12)
    _, expected = jax.jvp(jax.grad(lambda x: losses(x).sum()), (data["log_prob"],), (tangent,))
    np.testing.assert_allclose(curvature, expected, rtol=1e-12)


class AcrossTokens:
    """Weights that depend on the mean ratio of all tokens that an objective is shown."""

    def loss(self, tokens):
        """In score form."""
        return -tokens.advantages * self.weight(tokens) * tokens.log_prob

    def weight(self, tokens):
        """Relative to the mean."""
        return tokens.ratio / tokens.xp.mean(tokens.ratio)


@pytest.mark.usefixtures("small_chunks")
def test_an_objective_that_looks_across_tokens_sees_all_of_them():
    data = batch()
    expected, count = core(AcrossTokens(), data), float(data["mask"].sum())
    value, gradient = jax.value_and_grad(in_log_prob(AcrossTokens(), data))(data["log_prob"])
    np.testing.assert_allclose(value, expected.loss.sum() / count, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected.gradient / count, rtol=1e-12, atol=1e-14)


# one pass: a token is checked once, and its ratio and shift are computed once


@pytest.fixture
def counted(monkeypatch):
    """How often tokens are checked and made while JAX traces."""
    calls = collections.Counter()

    def counting(name, function):
        def count(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return count

    monkeypatch.setattr(Tokens, "of", counting("made", Tokens.of))
    check = counting("checked", tokens_module.check_tokens)
    for module in (tokens_module, loss_module):
        monkeypatch.setattr(module, "check_tokens", check)
    return calls


@pytest.mark.parametrize("function", [token_loss, policy_loss])
def test_tokens_are_checked_and_made_once(counted, function):
    data = batch()

    def total(log_prob):
        result = function(DRPO(delta=0.15), **data | {"log_prob": log_prob})
        return result if isinstance(result, tuple) else (result.sum(), None)

    jax.make_jaxpr(jax.value_and_grad(total, has_aux=True))(data["log_prob"])
    assert counted == {"checked": 1, "made": 1}


# the namespace of the formulas


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_expm1_is_as_accurate_as_its_exp(dtype):
    size = np.concatenate(
        [[0.0], np.geomspace(1e-30, 0.49999, 1000), np.linspace(0.45, 0.55, 1000), np.geomspace(0.5, 40.0, 1000)]
    )
    x = np.concatenate([size, -size]).astype(dtype)
    expected = np.expm1(x.astype(np.longdouble))
    assert np.all(np.abs(np.asarray(jax.jit(xp.expm1)(x)) - expected) <= 2.5 * np.finfo(dtype).eps * np.abs(expected))
    special = np.array([-np.inf, -1000.0, 1000.0, np.inf, np.nan], dtype)
    np.testing.assert_array_equal(xp.expm1(special), [-1.0, -1.0, np.inf, np.inf, np.nan])
    slope = jax.vmap(jax.grad(xp.expm1))(x)
    np.testing.assert_allclose(slope, np.exp(x), rtol=4.0 * np.finfo(dtype).eps)
    assert jax.grad(xp.expm1)(dtype(-np.inf)) == 0.0


@pytest.mark.parametrize("shape", [(), (0,), (0, 128), (5,), (64,), (3, 128), (2, 3, 192), (4, 100), (2, 1024)])
def test_count_nonzero_counts_every_element(shape):
    condition = jnp.asarray(np.random.default_rng(0).random(shape) < 0.7)
    assert xp.count_nonzero(condition) == np.count_nonzero(condition)
    assert xp.count_nonzero(jnp.ones(shape, bool)) == np.prod(shape, dtype=int)


# residuals


def residuals(function, *, inputs):
    """Shapes and dtypes of what `jax.vjp` keeps, apart from the inputs themselves."""
    _, vjp = jax.vjp(function, inputs["log_prob"])
    given = {array.unsafe_buffer_pointer() for array in inputs.values()}
    kept = [leaf for leaf in jax.tree.leaves(vjp) if isinstance(leaf, jax.Array)]
    return [(leaf.shape, leaf.dtype) for leaf in kept if leaf.unsafe_buffer_pointer() not in given]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16])
@pytest.mark.parametrize("objective", [DRPO(delta=0.15), CISPO(max_ratio=2.0)], ids=repr)
def test_only_the_gradient_is_kept(objective, dtype):
    data = batch(dtype=dtype)

    def losses(log_prob):
        return token_loss(objective, **data | {"log_prob": log_prob})

    ((shape, kept_dtype),) = residuals(losses, inputs=data)
    assert shape == (4, 6)
    assert kept_dtype == losses(data["log_prob"]).dtype


@each_reduction
@pytest.mark.parametrize("packed", [False, True])
def test_reductions_keep_nothing_but_their_inputs(reduction, packed):
    data = batch()
    options = {"token_weights": jnp.full((4, 6), 0.5)}
    if packed:
        data = {name: array.reshape(-1) for name, array in data.items()}
        options = {"token_weights": jnp.full(24, 0.5), "segment_ids": jnp.arange(24) // 6}

    def loss(log_prob):
        return policy_loss(DRPO(delta=0.15), **data | {"log_prob": log_prob}, reduction=reduction, **options)[0]

    kept = residuals(loss, inputs=data | options)
    assert [(shape, dtype) for shape, dtype in kept if shape != ()] == [(data["log_prob"].shape, np.float64)]


def test_under_checkpoint():
    data = batch()
    loss = in_log_prob(DRPO(delta=0.15), data)
    np.testing.assert_allclose(
        jax.grad(jax.checkpoint(loss))(data["log_prob"]), jax.grad(loss)(data["log_prob"]), rtol=1e-13, atol=0.0
    )


def test_no_callback_and_no_transfer():
    data = batch()
    text = str(jax.make_jaxpr(functools.partial(policy_loss, DRPO(delta=0.15)))(**data))
    assert "callback" not in text
    with jax.transfer_guard_device_to_host("disallow"):
        jax.block_until_ready(jax.jit(functools.partial(policy_loss, DRPO(delta=0.15)))(**data))


def test_an_objective_that_is_not_hashable_can_be_closed_over():
    class Unhashable:
        __hash__ = None

        def loss(self, tokens):
            return -tokens.advantages * tokens.ratio

        def weight(self, tokens):
            return tokens.xp.ones_like(tokens.ratio)

        def inside(self, tokens):
            return tokens.ratio == tokens.ratio

    data = batch()
    gradient = jax.grad(in_log_prob(Unhashable(), data, lambda o, **kw: token_loss(o, **kw).sum()))(data["log_prob"])
    np.testing.assert_allclose(gradient, core(PolicyGradient(), data).gradient, rtol=1e-12)


# in another process: what must be set before JAX is imported


def run(program):
    return several_devices.run("-W", "error", "-c", textwrap.dedent(program), devices=8)


PREAMBLE = """
import jax
jax.config.update("jax_enable_x64", {x64})
jax.config.update("jax_numpy_rank_promotion", "raise")
import jax.numpy as jnp
import numpy as np
from drpo_core import DPPO, DRPO, PPOClip, sequence_mean_token_mean
from drpo_jax import loss as loss_module
from drpo_jax import linear_reduction, policy_loss, token_loss
rng = np.random.default_rng(0)
behavior = -3.0 * rng.random((16, 6)) - 0.01
data = {{
    "log_prob": np.minimum(behavior + 0.8 * rng.normal(size=(16, 6)), -0.001),
    "behavior_log_prob": behavior,
    "advantages": rng.normal(size=(16, 6)),
}}
data = {{name: jnp.asarray(array, dtype=jnp.float32 if not {x64} else None) for name, array in data.items()}}
data["mask"] = jnp.asarray(rng.random((16, 6)) < 0.7)
"""


def test_shard_map_over_eight_devices():
    run(
        PREAMBLE.format(x64=True)
        + """
from jax.sharding import PartitionSpec as P
assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
objective = DRPO(delta=0.15)
count = data["mask"].any(axis=-1).sum()

def loss(log_prob, data, normalizer):
    arrays = data | {"log_prob": log_prob}
    return policy_loss(objective, **arrays, reduction=sequence_mean_token_mean, normalizer=normalizer)

(expected, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(data["log_prob"], data, count)

def inside(data, normalizer):
    (part, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(data["log_prob"], data, normalizer)
    return jax.lax.psum(part, "data"), gradient, jax.lax.psum(tuple(statistics["ratio_mean"]), "data")

specs = {"in_specs": (P("data"), P()), "out_specs": (P(), P("data"), P())}
total, sharded, (ratio, n) = jax.jit(jax.shard_map(inside, mesh=mesh, **specs))(data, count)
np.testing.assert_allclose(total, expected, rtol=1e-13)
np.testing.assert_allclose(sharded, gradient, rtol=1e-13, atol=0)
assert n == data["mask"].sum()

def summed(log_prob, data, normalizer):
    return jax.lax.psum(loss(log_prob, data, normalizer)[0], "data")

outside = jax.shard_map(summed, mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=P())
np.testing.assert_allclose(jax.jit(jax.grad(outside))(data["log_prob"], data, count), gradient, rtol=1e-13, atol=0)

@linear_reduction
def mean_over_devices(values, mask):
    return jnp.sum(jnp.where(mask, values, 0.0)) / jax.lax.psum(jnp.sum(mask), "data")

import drpo_jax.loss
drpo_jax.loss._CHUNK = 5
in_chunks, by_chunks, _ = jax.jit(jax.shard_map(lambda *args: inside(*args), mesh=mesh, **specs))(data, count)
np.testing.assert_allclose(in_chunks, expected, rtol=1e-13)
np.testing.assert_allclose(by_chunks, gradient, rtol=1e-13, atol=0)

whole = jax.jit(jax.grad(lambda x: policy_loss(objective, **data | {"log_prob": x})[0]))(data["log_prob"])
collective = jax.shard_map(
    lambda data: jax.lax.psum(policy_loss(objective, **data, reduction=mean_over_devices)[0], "data"),
    mesh=mesh,
    in_specs=P("data"),
    out_specs=P(),
)
gradient = jax.jit(jax.grad(lambda x: collective(data | {"log_prob": x})))(data["log_prob"])
np.testing.assert_allclose(gradient, whole, rtol=1e-13, atol=0)
"""
    )


def test_the_gradient_of_a_sharded_batch_stays_where_its_tokens_are():
    run(
        PREAMBLE.format(x64=True)
        + """
from jax.sharding import NamedSharding, PartitionSpec as P
loss_module._CHUNK = 5
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
placed = jax.device_put(data, NamedSharding(mesh, P("data")))

@jax.jit
def gradient(data):
    return jax.grad(lambda x: policy_loss(DRPO(delta=0.15), **data | {"log_prob": x})[0])(data["log_prob"])

compiled = gradient.lower(placed).compile()
assert "all-gather" not in compiled.as_text()
assert "all-reduce" in compiled.as_text(), "of the count of tokens"
found = compiled(placed)
assert found.sharding.spec == P("data"), found.sharding
np.testing.assert_allclose(found, gradient(data), rtol=1e-13, atol=0)
"""
    )


def test_x64_off():
    run(
        PREAMBLE.format(x64=False)
        + """
from drpo_core import token_loss_and_gradient
exact = {name: np.asarray(array, dtype=np.float64) for name, array in data.items() if name != "mask"}
mask = np.asarray(data["mask"])
for objective in (DRPO(delta=0.15), DPPO(delta=0.05, divergence="binary_kl"), PPOClip(eps=0.2)):
    step = jax.jit(jax.value_and_grad(lambda x: policy_loss(objective, **data | {"log_prob": x})[0]))
    loss, gradient = step(data["log_prob"])
    assert loss.dtype == gradient.dtype == jnp.float32
    expected = token_loss_and_gradient(objective, **exact, mask=mask)
    np.testing.assert_allclose(loss, expected.loss.sum() / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, expected.gradient / mask.sum(), rtol=1e-5, atol=1e-7)
    low = data["log_prob"].astype(jnp.bfloat16)
    loss, gradient = step(low)
    assert (loss.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    assert bool(jnp.isfinite(gradient).all())
"""
    )


def test_a_failing_program_fails():
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run("1 / 0")
