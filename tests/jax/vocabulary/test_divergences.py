"""What a rollout has recorded of the behaviour policy is checked as the policy's own arrays are."""

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
    linear_policy_loss,
    logits_policy_loss,
    top_k_divergences,
)

from drpo_core import DPPO

N, H, V, K = 4, 3, 7, 2
OBJECTIVE = DPPO(delta=0.1, divergence="per_token")
BAD = [0.0, -1.0, np.nan, np.inf, np.zeros(1), "1", True, 10**400, jnp.asarray(2.0)]


def batch():
    rng = np.random.default_rng(0)
    return {
        "tokens": jnp.asarray(rng.integers(0, V, size=N)),
        "behavior_log_prob": jnp.asarray(-rng.random(N)),
        "advantages": jnp.asarray(rng.normal(size=N)),
        "mask": jnp.asarray([True, True, False, True]),
    }


def hidden_and_weight():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(N, H))), jnp.asarray(rng.normal(size=(V, H)))


def by_logits(divergence):
    hidden, weight = hidden_and_weight()
    return logits_policy_loss(OBJECTIVE, logits=hidden @ weight.T, **batch(), divergence=divergence)


def by_head(divergence):
    hidden, weight = hidden_and_weight()
    return linear_policy_loss(OBJECTIVE, hidden=hidden, weight=weight, **batch(), divergence=divergence)


each_function = pytest.mark.parametrize("function", [by_logits, by_head])


@pytest.mark.parametrize("given", BAD, ids=repr)
def test_numbers_of_a_recorded_policy_are_checked(given):
    hidden, weight = hidden_and_weight()
    with pytest.raises((TypeError, ValueError), match=r"^logit_softcap: expected"):
        LinearHead(hidden, weight, logit_softcap=given)
    if isinstance(given, jax.Array):
        return  # one per token, where it is used
    with pytest.raises((TypeError, ValueError), match=r"^temperature: expected"):
        FullDivergence(kind="kl", behavior=hidden @ weight.T, temperature=given)


@pytest.mark.parametrize("given", [2, np.float64(2.0), np.float32(2.0), np.array(2.0)], ids=repr)
def test_numbers_of_a_recorded_policy_are_kept_as_floats(given):
    hidden, weight = hidden_and_weight()
    head = LinearHead(hidden, weight, logit_softcap=given)
    recorded = FullDivergence(kind="kl", behavior=head, temperature=given)
    assert (type(head.logit_softcap), type(recorded.temperature)) == (float, float)
    assert jax.tree.structure(recorded) == jax.tree.structure(
        FullDivergence(kind="kl", behavior=LinearHead(hidden, weight, logit_softcap=2.0), temperature=2.0)
    )


@each_function
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"bias": jnp.zeros(1)},
            ValueError,
            r"divergence\.behavior\.bias: expected the shape of the vocabulary, \(V,\), \(7,\), got",
        ),
        ({"bias": jnp.zeros((N, V))}, ValueError, r"divergence\.behavior\.bias: expected the shape of the vocabulary"),
        ({"bias": jnp.zeros(V, int)}, TypeError, r"divergence\.behavior\.bias: expected a real floating dtype, got int64"),
        ({"bias": np.zeros(V)}, TypeError, r"divergence\.behavior\.bias: expected a jax\.Array, got ndarray"),
        (
            {"weight": jnp.zeros((V + 1, H)), "bias": None},
            ValueError,
            r"divergence\.behavior\.weight: expected one row for each of the 7 tokens",
        ),
        (
            {"weight": jnp.zeros((V, H + 1))},
            ValueError,
            r"divergence\.behavior\.weight: expected the shape of the vocabulary and",
        ),
        ({"weight": jnp.zeros(V)}, ValueError, r"divergence\.behavior\.weight: expected shape \(V, H\)"),
        (
            {"hidden": jnp.zeros((N + 1, H))},
            ValueError,
            r"divergence\.behavior\.hidden: expected the shape of the tokens and one",
        ),
        ({"hidden": jnp.zeros(())}, ValueError, r"divergence\.behavior\.hidden: expected shape \(…, H\)"),
        ({"hidden": jnp.zeros((N, H), int)}, TypeError, r"divergence\.behavior\.hidden: expected a real floating dtype"),
        ({"hidden": None}, TypeError, r"divergence\.behavior\.hidden: expected an array of real floating dtype, got NoneType"),
    ],
)
def test_a_recorded_head_is_checked(function, change, error, message):
    hidden, weight = hidden_and_weight()
    head = LinearHead(**{"hidden": hidden, "weight": weight, "bias": jnp.zeros(V)} | change)
    with pytest.raises(error, match=f"^{message}"):
        function(FullDivergence(kind="kl", behavior=head))


@each_function
@pytest.mark.parametrize(
    ("divergence", "error", "message"),
    [
        (
            FullDivergence(kind="tv", behavior=jnp.zeros((N, V - 1))),
            ValueError,
            r"divergence\.behavior: expected the shape of",
        ),
        (
            FullDivergence(kind="tv", behavior=jnp.zeros((N, V), int)),
            TypeError,
            r"divergence\.behavior: expected a real floating",
        ),
        (FullDivergence(kind="tv", behavior=np.zeros((N, V))), TypeError, r"divergence\.behavior: expected a jax\.Array"),
        (
            FullDivergence(kind="tv", behavior=jnp.zeros((N, V)), temperature=jnp.ones(N + 1)),
            ValueError,
            r"divergence\.temperature: expected the shape of the tokens, or a number, \(4,\), got",
        ),
        (
            TopKDivergence(kind="tv", ids=jnp.zeros((N, K)), behavior_log_prob=jnp.zeros((N, K))),
            TypeError,
            r"divergence\.ids: expected an integral dtype",
        ),
        (
            TopKDivergence(kind="tv", ids=jnp.zeros((N + 1, K), int), behavior_log_prob=jnp.zeros((N + 1, K))),
            ValueError,
            r"divergence\.ids: expected the shape of the tokens and one more axis, K, \(4, 2\), got \(5, 2\)",
        ),
        (
            TopKDivergence(kind="tv", ids=jnp.zeros((N, K), int), behavior_log_prob=jnp.zeros((N, K + 1))),
            ValueError,
            r"divergence\.behavior_log_prob: expected the shape of divergence\.ids",
        ),
        (
            TopKDivergence(kind="tv", ids=jnp.zeros((), int), behavior_log_prob=jnp.zeros(())),
            ValueError,
            r"divergence\.ids: expected",
        ),
        ("kl", TypeError, r"divergence: expected a jax\.Array, got str"),
        (np.zeros(N), TypeError, r"divergence: expected a jax\.Array, got ndarray"),
    ],
    ids=str,
)
def test_other_records_are_checked(function, divergence, error, message):
    with pytest.raises(error, match=f"^{message}"):
        function(divergence)


@pytest.mark.parametrize(
    "change",
    [{"log_normalizer": jnp.zeros(1)}, {"tokens": jnp.zeros(1, int)}, {"behavior_log_prob": jnp.zeros((N, 1))}],
    ids=str,
)
def test_nothing_is_broadcast(change):
    hidden, weight = hidden_and_weight()
    arguments = {
        "logits": hidden @ weight.T,
        "log_normalizer": jnp.zeros(N),
        "tokens": batch()["tokens"],
        "behavior_log_prob": batch()["behavior_log_prob"],
        "top_k_ids": jnp.zeros((N, K), int),
        "top_k_behavior_log_prob": jnp.zeros((N, K)),
    }
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name}: expected the shape of logits without its last axis"):
        top_k_divergences(**arguments | change)


@each_function
def test_records_are_pytrees_that_jit_takes(function):
    hidden, weight = hidden_and_weight()
    records = [
        FullDivergence(kind="kl", behavior=LinearHead(hidden, weight, logit_softcap=3.0), temperature=jnp.full(N, 0.7)),
        TopKDivergence(kind="tv", ids=jnp.arange(N * K).reshape(N, K) % V, behavior_log_prob=jnp.full((N, K), -2.0)),
    ]
    for record in records:
        np.testing.assert_allclose(jax.jit(function)(record).loss, function(record).loss, rtol=1e-12)


def test_divergences_of_full_distributions_do_not_depend_on_masked_probabilities_of_zero():
    logits = jnp.asarray([[0.0, 1.0, -jnp.inf]])
    found = full_divergences(logits=logits, behavior_logits=logits + jnp.asarray([[0.3, 0.0, 0.0]]))
    expected = full_divergences(logits=logits[:, :2], behavior_logits=(logits + jnp.asarray([[0.3, 0.0, 0.0]]))[:, :2])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-14), found, expected)


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_the_behavior_policy_is_constant(kind):
    rng = np.random.default_rng(0)
    logits, behavior = jnp.asarray(rng.normal(size=(2, 5, 7)))
    recorded = jax.nn.log_softmax(behavior)

    def full(logits, behavior):
        return getattr(full_divergences(logits=logits, behavior_logits=behavior), kind).sum()

    def top_k(logits, recorded):
        found = top_k_divergences(
            logits=logits,
            log_normalizer=jax.nn.logsumexp(logits, axis=-1),
            tokens=jnp.zeros(5, int),
            behavior_log_prob=recorded[:, 0],
            top_k_ids=jnp.broadcast_to(jnp.arange(1, 4), (5, 3)),
            top_k_behavior_log_prob=recorded[:, 1:4],
        )
        return getattr(found, kind).sum()

    for function, other in ((full, behavior), (top_k, recorded)):
        of_policy, of_behavior = jax.grad(function, argnums=(0, 1))(logits, other)
        assert jnp.abs(of_policy).max() > 0.0
        assert (of_behavior == 0.0).all()
