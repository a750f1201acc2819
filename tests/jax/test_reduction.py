"""linear_reduction: any linear function is a reduction of the policy losses, and a function that is not is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drpo_jax import linear_policy_loss, linear_reduction, logits_policy_loss, policy_loss, token_loss

from drpo_core import (
    DRPO,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_loss_and_gradient,
    token_mean,
)

OBJECTIVE = DRPO(delta=0.15)


def over_width(values, mask):
    return jnp.where(mask, values, 0.0).sum(axis=-1).mean() / values.shape[-1]


def of_rows(values, mask):
    return ((values * mask).sum(axis=-1) / jnp.clip(mask.sum(axis=-1), min=1)).mean()


LINEAR = {
    "sum": lambda values, mask: (values * mask).sum(),
    "mean": lambda values, mask: (values * mask).sum() / mask.sum(),
    "mean-where": lambda values, mask: jnp.mean(values, where=mask),
    "average": lambda values, mask: jnp.average(values, weights=mask),
    "of-rows": of_rows,
    "over-width": over_width,
    "no-mask": lambda values, _: values.mean(),
    "discounted": lambda values, mask: jnp.cumsum(jnp.where(mask, values, 0.0), axis=-1).sum(),
    "segments": lambda values, mask: jax.ops.segment_sum((values * mask).ravel(), jnp.arange(24) // 5, 5).mean(),
    "jitted": jax.jit(lambda values, mask: (values * mask).sum()),
    "rematerialised": jax.checkpoint(lambda values, mask: (values * mask).sum()),
    "bfloat16": lambda values, mask: (values * mask).sum().astype(jnp.bfloat16),
    "drpo_core's": token_mean,
    "zero": lambda values, mask: 0.0 * (values * mask).sum(),
}
NOT_LINEAR = {
    "squares": lambda values, mask: (values**2 * mask).sum(),
    "products": lambda values, mask: (values * values * mask).sum(),
    "absolute": lambda values, _: jnp.abs(values).sum(),
    "largest": lambda values, _: values.max(),
    "softmax": lambda values, mask: (jax.nn.softmax(values) * values * mask).sum(),
    "clipped": lambda values, _: jnp.clip(values, -1.0, 1.0).sum(),
    "divided": lambda values, _: (values / (1.0 + values.sum())).sum(),
}
each_linear = pytest.mark.parametrize("function", LINEAR.values(), ids=LINEAR)
each_other = pytest.mark.parametrize("function", NOT_LINEAR.values(), ids=NOT_LINEAR)


def batch(shape=(4, 6)):
    rng = np.random.default_rng(0)
    behavior = -3.0 * rng.random(shape) - 0.01
    data = {
        "log_prob": np.minimum(behavior + 0.5 * rng.normal(size=shape), -0.001),
        "behavior_log_prob": behavior,
        "advantages": rng.normal(size=shape),
        "mask": rng.random(shape) < 0.7,
    }
    return {name: jnp.asarray(array) for name, array in data.items()}


def both(data, reduction, **options):
    return jax.value_and_grad(lambda x: policy_loss(OBJECTIVE, **data | {"log_prob": x}, reduction=reduction, **options)[0])(
        data["log_prob"]
    )


def by_token(data, function):
    def loss(log_prob):
        return function(token_loss(OBJECTIVE, **data | {"log_prob": log_prob}), data["mask"]).astype(jnp.float64)

    return jax.value_and_grad(loss)(data["log_prob"])


@each_linear
@pytest.mark.parametrize("jitted", [False, True])
def test_it_is_the_function_of_the_losses(function, jitted):
    data = batch()
    evaluate = functools.partial(both, reduction=linear_reduction(function))
    value, gradient = (jax.jit(evaluate) if jitted else evaluate)(data)
    expected, expected_gradient = by_token(data, function)
    rtol = 1e-2 if function is LINEAR["bfloat16"] else 1e-12
    np.testing.assert_allclose(value, expected, rtol=rtol)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-15)


@each_linear
def test_what_masked_tokens_hold_is_nothing(function):
    data = batch()
    dirty = data | {name: jnp.where(data["mask"], data[name], jnp.nan) for name in ("log_prob", "advantages")}
    reduction = linear_reduction(function)
    jax.tree.map(np.testing.assert_array_equal, both(dirty, reduction), both(data, reduction))


@pytest.mark.parametrize(
    "known", [token_mean, sequence_mean_token_mean, functools.partial(sequence_mean_token_sum, horizon=7.0)]
)
def test_of_a_reduction_of_drpo_core_it_is_that_reduction(known):
    data, weights = batch(), jnp.linspace(0.5, 2.0, 24).reshape(4, 6)
    found, expected = (both(data, r, token_weights=weights) for r in (linear_reduction(known), known))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-13), found, expected)


def test_at_vocabulary_scale():
    data = batch()
    rng = np.random.default_rng(1)
    hidden, weight = jnp.asarray(rng.normal(size=(4, 6, 5))), jnp.asarray(rng.normal(size=(7, 5)))
    arguments = {name: data[name] for name in ("behavior_log_prob", "advantages", "mask")}
    arguments |= {"tokens": jnp.asarray(rng.integers(0, 7, size=(4, 6))), "reduction": linear_reduction(of_rows)}

    def of_logits(logits):
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), arguments["tokens"][..., None], -1)[..., 0]
        return of_rows(token_loss(OBJECTIVE, **data | {"log_prob": log_prob}), data["mask"])

    expected = jax.grad(of_logits)(hidden @ weight.T)
    found = jax.grad(lambda z: logits_policy_loss(OBJECTIVE, logits=z, **arguments).loss)(hidden @ weight.T)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)
    found = jax.grad(lambda h: linear_policy_loss(OBJECTIVE, hidden=h, weight=weight, **arguments, chunk_tokens=5).loss)(
        hidden
    )
    np.testing.assert_allclose(found, expected @ weight, rtol=1e-10, atol=1e-13)


def test_no_valid_token_is_a_loss_of_zero():
    data = batch()
    data["mask"] = jnp.zeros((4, 6), bool)
    for name in ("mean", "mean-where", "sum"):
        value, gradient = both(data, linear_reduction(LINEAR[name]))
        assert float(value) == 0.0
        assert not gradient.any()


@each_other
@pytest.mark.parametrize("jitted", [False, True])
def test_what_is_not_linear_is_refused(function, jitted):
    evaluate = functools.partial(both, reduction=linear_reduction(function))
    with pytest.raises(TypeError, match=r"^linear_reduction: expected a function that is linear in its values, got"):
        (jax.jit(evaluate) if jitted else evaluate)(batch())


def test_a_constant_is_refused_where_it_is_known():
    reduction = linear_reduction(lambda values, mask: (values * mask).sum() + 0.5)
    with pytest.raises(ValueError, match=r"^linear_reduction: expected a function that is 0 .*, got 0\.5"):
        both(batch(), reduction)


@pytest.mark.parametrize(
    "function",
    [
        lambda values, mask: values * mask,
        lambda values, _: values.sum(axis=0),
        lambda *_: 0.0,
        lambda values, _: values.astype(int).sum(),
    ],
)
def test_what_is_no_scalar_is_refused(function):
    with pytest.raises(TypeError, match=r"^linear_reduction: expected a function to a 0-d floating-point jax\.Array, got"):
        both(batch(), linear_reduction(function))


@pytest.mark.parametrize("name", ["normalizer", "segment_ids"])
def test_what_the_function_can_not_use_is_refused(name):
    data = batch((24,))
    given = {"normalizer": 3.0, "segment_ids": jnp.zeros(24, int)}[name]
    with pytest.raises(ValueError, match=f"^{name}: expected None"):
        both(data, linear_reduction(LINEAR["sum"]), **{name: given})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (jnp.ones(6), ValueError, "token_weights: expected the shape of mask"),
        (jnp.ones((4, 6), int), TypeError, "token_weights: expected a real floating dtype"),
        (np.ones((4, 6)), TypeError, "token_weights: expected a jax.Array"),
    ],
)
def test_token_weights_are_checked(given, error, message):
    with pytest.raises(error, match=f"^{message}"):
        both(batch(), linear_reduction(LINEAR["sum"]), token_weights=given)


def test_the_users_own_errors_are_his_own():
    def broken(*_):
        raise KeyError("mine")  # noqa: EM101

    with pytest.raises(KeyError, match="mine"):
        both(batch(), linear_reduction(broken))
    with pytest.raises(TypeError, match=r"^function: expected a function of values and a mask, got float"):
        linear_reduction(3.0)


def test_equal_functions_share_a_compilation():
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(reduction, data):
        traced.append(reduction)
        return both(data, reduction)

    for _ in range(2):
        step(linear_reduction(of_rows), batch())
    step(linear_reduction(over_width), batch())
    assert len(traced) == 2


def test_the_loss_is_that_of_the_kernel():
    data = batch()
    core = token_loss_and_gradient(
        OBJECTIVE, data["log_prob"], data["behavior_log_prob"], data["advantages"], mask=data["mask"]
    )
    value, gradient = both(data, linear_reduction(LINEAR["sum"]))
    np.testing.assert_allclose(value, core.loss.sum(), rtol=1e-13)
    np.testing.assert_allclose(gradient, core.gradient, rtol=1e-13)
