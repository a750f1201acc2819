"""`token_log_prob` and `linear_log_prob`: derivatives, second ones too, and what an id or a row that doesn't count does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drpo_jax import LinearHead, linear_log_prob, logits_policy_loss, policy_loss, token_log_prob

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


def test_large_logits_lose_no_digits():
    """Logits of some hundreds: their differences are exact, and so are log-probs and entropies of these."""
    logits, tokens = make(64, 50)
    small = logits.astype(jnp.float32)
    # a power of two that takes none of the digits away
    large = jnp.round(small * 2.0**10) / 2.0**10 + 512.0
    found = token_log_prob(logits=large, tokens=tokens, entropy=True)
    expected = token_log_prob(logits=(large - 512.0).astype(jnp.float64), tokens=tokens, entropy=True)
    np.testing.assert_allclose(found.log_prob, expected.log_prob, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.entropy, expected.entropy, rtol=1e-6, atol=1e-6)


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


# --- masks and more columns, from logits and from the head ----------------------------------------------------------------

H, V, K, SHAPE = 8, 37, 3, (4, 6)
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def head():
    """A head and tokens of which some are masked and hold NaN and wild ids, with ids that come twice among the K."""
    rng = np.random.default_rng(0)
    mask = rng.random(SHAPE) < 0.7
    ids = rng.integers(V, size=(*SHAPE, K))
    ids[..., 2] = ids[..., 0]
    hidden = np.where(mask[..., None], rng.normal(size=(*SHAPE, H)), np.nan)
    inputs = {"hidden": hidden, "weight": rng.normal(size=(V, H)), "bias": rng.normal(size=V)}
    columns = {"tokens": np.where(mask, rng.integers(V, size=SHAPE), -100), "mask": mask}
    columns["top_k_ids"] = np.where(mask[..., None], ids, -100)
    return jax.tree.map(jnp.asarray, (inputs, columns))


def plainly(logits, tokens, top_k_ids, mask):
    """The four results by log-softmax, 0 where masked."""
    log_p = jax.nn.log_softmax(jnp.where(mask[..., None], logits, 0.0))
    ids = jnp.maximum(jnp.concatenate((tokens[..., None], top_k_ids), axis=-1), 0)
    log_probs = jnp.where(mask[..., None], jnp.take_along_axis(log_p, ids, axis=-1), 0.0)
    lse = jax.scipy.special.logsumexp(jnp.where(mask[..., None], logits, 0.0), axis=-1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return log_probs[..., 0], jnp.where(mask, entropy, 0.0), jnp.where(mask, lse, 0.0), log_probs[..., 1:]


def plain_head(inputs, columns, temperature=1.0, softcap=None):
    hidden = jnp.where(columns["mask"][..., None], inputs["hidden"], 0.0)
    z = hidden @ inputs["weight"].T + jnp.broadcast_to(inputs["bias"], (*SHAPE, V))
    return plainly((z if softcap is None else softcap * jnp.tanh(z / softcap)) / temperature, **columns)


def compared(ours, plain, inputs):
    """Values, and the gradients of all results at once and of each alone: cotangents in one vmap."""
    shapes = jax.eval_shape(plain, inputs)
    rng = np.random.default_rng(1)
    every = [jnp.asarray(rng.normal(size=shape.shape)) for shape in shapes]
    some = np.concatenate((np.ones((1, 4)), np.eye(4)))
    cotangents = tuple(jnp.stack([c * row[i] for row in some]) for i, c in enumerate(every))

    def both(function):
        def run(inputs):
            values, pull = jax.vjp(function, inputs)
            return values, jax.vmap(pull)(cotangents)

        return jax.jit(run, compiler_options=FAST)(inputs)

    found, expected = both(ours), jax.tree.map(jnp.nan_to_num, both(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_prob_and_each_of_its_derivatives(temperature):
    inputs, columns = head()
    logits = jnp.einsum("nth,vh->ntv", inputs["hidden"], inputs["weight"])

    def ours(logits):
        return token_log_prob(logits=logits, **columns, temperature=temperature, entropy=True)[:4]

    compared(ours, lambda logits: plainly(logits / temperature, **columns), logits)


@pytest.mark.parametrize(("softcap", "chunk"), [(None, 5), (3.0, 99)])
def test_linear_log_prob_and_each_of_its_derivatives(softcap, chunk):
    inputs, columns = head()
    options = {"temperature": 0.7, "logit_softcap": softcap, "entropy": True, "chunk_tokens": chunk}

    def ours(inputs):
        return linear_log_prob(**inputs, **columns, **options)[:4]

    compared(ours, lambda inputs: plain_head(inputs, columns, 0.7, softcap), inputs)


def test_a_second_derivative_of_linear_log_prob_in_forward_mode():
    """Also of a rematerialised one."""
    inputs, columns = head()
    inputs["hidden"] = jnp.nan_to_num(inputs["hidden"])
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), inputs)

    def squares(results):
        return sum(jnp.sum((i + 1.0) * result**2) for i, result in enumerate(results))

    def ours(inputs):
        return squares(linear_log_prob(**inputs, **columns, logit_softcap=3.0, entropy=True, chunk_tokens=5)[:4])

    found, expected = (
        jax.jit(lambda p, f=f: jax.jvp(jax.grad(f), (p,), (direction,)), compiler_options=FAST)(inputs)
        for f in (jax.checkpoint(ours), lambda p: squares(plain_head(p, columns, softcap=3.0)))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, expected)


def test_only_the_needed_gradients_are_formed():
    inputs, columns = head()

    def products(*names):
        def total(some):
            return linear_log_prob(**inputs | some, **columns).log_prob.sum()

        of = jax.grad(total) if names else total
        return str(jax.make_jaxpr(of)({name: inputs[name] for name in names})).count("dot_general")

    # the logits, and again in the backward pass
    assert [products(*names) for names in ((), ("bias",), ("hidden",), ("weight",), tuple(inputs))] == [1, 2, 3, 3, 4]


def test_rows_that_no_cotangent_reaches_cost_nothing(monkeypatch):
    """Whatever they hold: the loop of each pass ends after the last chunk that it needs."""
    inputs, columns = head()
    columns.pop("mask")
    columns = jax.tree.map(lambda ids: jnp.maximum(ids, 0), columns)
    wanted = jnp.zeros(SHAPE, dtype=bool).at[1:3, ::2].set(True)
    chunks = []
    product = LinearHead.uncapped

    def counted(head, dtype):
        jax.debug.callback(lambda: chunks.append(len(head.hidden)))
        return product(head, dtype)

    monkeypatch.setattr(LinearHead, "uncapped", counted)

    def total(inputs):
        found = linear_log_prob(**inputs, **columns, entropy=True, chunk_tokens=5)
        return jnp.sum(jnp.where(wanted, found.log_prob + found.entropy + found.top_k_log_prob[..., 1], 0.0))

    dirty = jnp.where(wanted[..., None], jnp.nan_to_num(inputs["hidden"]), jnp.nan)
    gradient = jax.jit(jax.grad(total), compiler_options=FAST)
    found = gradient(inputs | {"hidden": dirty})
    jax.effects_barrier()
    assert chunks == [5] * (-(-24 // 5) + -(-6 // 5))
    expected = gradient(inputs | {"hidden": jnp.nan_to_num(inputs["hidden"])})
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_both_passes_need_the_memory_of_a_chunk():
    n, vocabulary, width, chunk = 512, 4099, 64, 16
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, width), (vocabulary, width))]

    def total(hidden, weight, tokens, ids):
        options = {"top_k_ids": ids, "entropy": True, "chunk_tokens": chunk}
        found = linear_log_prob(hidden=hidden, weight=weight, tokens=tokens, **options)
        return jnp.sum(found.log_prob + found.entropy) + jnp.sum(found.top_k_log_prob)

    ids = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((n,), (n, K))]
    step = jax.jit(jax.grad(total, (0, 1))).lower(*shapes, *ids).compile()
    assert f"[{n},{vocabulary}]" not in step.as_text()
    assert f"[{chunk},{vocabulary}]" in step.as_text()
    a_chunk, of_weight, per_token = chunk * vocabulary * 4, vocabulary * width * 4, n * (width + 32) * 4 * 2
    assert step.memory_analysis().temp_size_in_bytes < 5 * a_chunk + 2 * of_weight + per_token


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top_k_ids": jnp.zeros((4, 5, 2), int)}, ValueError, r"^top_k_ids: expected the shape of the tokens and one more"),
        ({"top_k_ids": jnp.zeros((*SHAPE, 2))}, TypeError, r"^top_k_ids: expected an integral dtype"),
        ({"top_k_ids": jnp.asarray(1)}, ValueError, r"^top_k_ids: expected shape \(…, K\), got \(\)"),
        ({"mask": jnp.ones((4, 5), bool)}, ValueError, "^mask: expected the shape of tokens"),
        ({"mask": np.ones(SHAPE, bool)}, TypeError, "^mask: expected a jax.Array"),
        ({"chunk_tokens": 0}, ValueError, "^chunk_tokens: expected a finite number, 1 or more"),
    ],
)
def test_errors_of_linear_log_prob(change, error, message):
    inputs, columns = head()
    with pytest.raises(error, match=message):
        linear_log_prob(**inputs, **columns | change)
