"""token_log_prob: its derivatives, second ones too, and what an id or a row that does not count does to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drpo_jax import logits_policy_loss, policy_loss, token_log_prob

from drpo_core import CISPO, DRPO


def make(n=4, vocabulary=7):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(n, vocabulary))), jnp.asarray(rng.integers(0, vocabulary, size=n))


def test_second_derivatives_in_reverse_mode():
    logits, tokens = make()
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4)))
    direction = jnp.asarray(np.random.default_rng(2).normal(size=logits.shape))

    def ours(logits):
        result = token_log_prob(logits=logits, tokens=tokens, temperature=0.7, entropy=True)
        return jnp.sum(weights[0] * result.log_prob**2 + weights[1] * result.entropy)

    def plain(logits):
        log_probs = jax.nn.log_softmax(logits / 0.7)
        log_prob = jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]
        return jnp.sum(weights[0] * log_prob**2 - weights[1] * jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))

    found, expected = (jax.grad(lambda z, f=f: jnp.sum(jax.grad(f)(z) * direction))(logits) for f in (ours, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", [DRPO(delta=0.3), CISPO(max_ratio=2.0)], ids=repr)
def test_second_derivatives_of_the_policy_loss(objective):
    logits, tokens = make()
    rng = np.random.default_rng(1)
    batch = {"behavior_log_prob": jnp.asarray(-1.0 - rng.random(4)), "advantages": jnp.asarray(rng.normal(size=4))}
    batch["mask"] = jnp.asarray([True, False, True, True])
    direction = jnp.asarray(rng.normal(size=logits.shape))

    def ours(logits):
        return logits_policy_loss(objective, logits=logits, tokens=tokens, **batch).loss

    def plain(logits):
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)[:, 0]
        return policy_loss(objective, log_prob=log_prob, **batch)[0]

    found, expected = (jax.grad(lambda z, f=f: jnp.sum(jax.grad(f)(z) * direction))(logits) for f in (ours, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)


def test_forward_mode_is_refused():
    logits, tokens = make()
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda z: token_log_prob(logits=z, tokens=tokens).log_prob, (logits,), (logits,))


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_every_row_of_the_gradient_sums_to_zero(scale, dtype):
    logits, tokens = make(64, 50)
    gradient = jax.grad(lambda z: token_log_prob(logits=z, tokens=tokens).log_prob.sum())((scale * logits).astype(dtype))
    np.testing.assert_allclose(gradient.sum(axis=-1), 0.0, atol=8 * jnp.finfo(dtype).eps)
    assert (jnp.abs(gradient) <= 1.0).all()


def test_a_row_that_no_cotangent_reaches_has_a_gradient_of_zero():
    logits, tokens = make()
    dirty = logits.at[1].set(jnp.nan)
    ids = tokens.at[2].set(-100)

    def total(logits, ids, rows):
        result = token_log_prob(logits=logits, tokens=ids, entropy=True)
        return jnp.sum((result.log_prob + result.entropy)[rows])

    rows = jnp.asarray([0, 3])
    found, expected = jax.grad(total)(dirty, ids, rows), jax.grad(total)(logits, tokens, rows)
    np.testing.assert_array_equal(found, expected)


def test_only_what_an_id_enters_is_nan():
    """Entropy and log-normaliser are of the row; they and their gradients do not look at the id."""
    logits, tokens = make()
    ids = tokens.at[2].set(7)
    wrong, right = (token_log_prob(logits=logits, tokens=t, entropy=True) for t in (ids, tokens))
    np.testing.assert_array_equal(jnp.isnan(wrong.log_prob), [False, False, True, False])
    np.testing.assert_array_equal(wrong.entropy, right.entropy)
    np.testing.assert_array_equal(wrong.log_normalizer, right.log_normalizer)
    found, expected = (
        jax.grad(lambda z, t=t: token_log_prob(logits=z, tokens=t, entropy=True).entropy.sum())(logits) for t in (ids, tokens)
    )
    np.testing.assert_array_equal(found, expected)
