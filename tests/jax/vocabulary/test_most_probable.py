"""`top_k`: the ids against a sort of plain numbers, a row at a time, and all that follows against the same ids, given.

Hidden states and weights are small whole numbers, so that many logits are equal, and exact in every dtype and order of sums.
On several devices: tests/jax/vocabulary_axis.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drpo_jax import Support, linear_log_prob, token_log_prob

N, V, PADDED, H, K = 9, 13, 16, 4, 4
MASK = np.array([True] * 7 + [False, True])
SUPPORTS = [[0], [12, 3, 5], [2], [], [*range(V)], [1, 2, 9], [4, 7, 0], [], [6, 8, 10, 11, 12, 0, 1]]
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
HEAD = ("hidden", "weight", "bias")


def data():
    """A head with NaN in its padding and −inf in its bias, and tokens of which some are masked and hold NaN."""
    rng = np.random.default_rng(0)
    hidden, weight, bias = (rng.integers(-1, 2, size=size).astype(float) for size in ((N, H), (PADDED, H), PADDED))
    hidden[0] = 0.0  # all columns are equal
    bias[:] = 0.0
    bias[[2, 7]] = -np.inf
    weight[V:], hidden[~MASK] = np.nan, np.nan
    return {"hidden": hidden, "weight": weight, "bias": bias}


def first(step, k):
    """By plain comparisons: ids with a probability by decreasing z, then the others, the lower id first; 0 where masked."""
    inputs, found = data(), []
    z = np.nan_to_num(inputs["hidden"]) @ inputs["weight"][:V].T + inputs["bias"][:V]
    for row, ids, valid in zip(z.tolist(), SUPPORTS, MASK, strict=True):
        allowed = ids if step != "none" and ids else range(V)
        # −inf is −cap to a soft-cap
        value = [(max(x, -1e30) if step == "cap" else x) if v in allowed else -np.inf for v, x in enumerate(row)]
        found.append(sorted(range(V), key=lambda v, value=value: (-value[v], v))[:k] if valid else [0] * k)
    return np.array(found)


def evaluate(function, options, inputs):
    """Results and gradients by ids that are found, and by the same ids."""

    def of(inputs, **k):
        found = function(**inputs, **options, **k)
        possible = found.top_k_log_prob > -jnp.inf
        cotangent = jnp.linspace(0.5, 2.0, possible.size).reshape(possible.shape)
        return jnp.sum(jnp.where(possible, found.top_k_log_prob * cotangent, 0.0)), found

    (_, found), gradients = jax.value_and_grad(of, has_aux=True)(inputs, top_k=K)
    (_, same), same_gradients = jax.value_and_grad(of, has_aux=True)(inputs, top_k_ids=found.top_k_ids)
    return (found, gradients), (same, same_gradients)


def program(function, step, dtype):
    """Of the logits or of the head, compiled."""
    rows = np.zeros((N, PADDED), dtype=bool)
    for row, ids in zip(rows, SUPPORTS, strict=True):
        row[ids] = True
    offsets = np.cumsum([0, *map(len, SUPPORTS)])
    options = {"tokens": jnp.asarray([min(ids or [0]) for ids in SUPPORTS]), "mask": jnp.asarray(MASK)}
    options |= {"vocabulary_size": V, "temperature": jnp.linspace(0.5, 2.0, N)}
    if step != "none":
        options["support"] = Support(jnp.asarray(np.concatenate(SUPPORTS).astype(int)), jnp.asarray(offsets))
    if step == "cap":
        options["support"] = Support.from_mask(jnp.asarray(rows))

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(inputs):
        if function is linear_log_prob:
            return evaluate(function, options | {"chunk_tokens": 4, "logit_softcap": 0.01 if step == "cap" else None}, inputs)
        logits = jnp.einsum("nh,vh->nv", inputs["hidden"], inputs["weight"]) + jnp.broadcast_to(inputs["bias"], (N, PADDED))
        return evaluate(function, options, {"logits": logits})

    return run(jax.tree.map(lambda a: jnp.asarray(a, dtype), data()))


@pytest.mark.parametrize(
    ("function", "step", "dtype"),
    [
        (token_log_prob, "none", jnp.float16),
        (token_log_prob, "ids", jnp.float32),
        (linear_log_prob, "ids", jnp.bfloat16),
        (linear_log_prob, "cap", jnp.float64),
    ],
)
def test_ids_are_those_of_a_sort_and_the_rest_is_as_of_ids_that_were_given(function, step, dtype):
    found, same = program(function, step, dtype)
    assert found[0].top_k_ids.dtype == jnp.int32
    np.testing.assert_array_equal(found[0].top_k_ids, first(step, K))
    assert (found[0].top_k_log_prob[~MASK] == 0.0).all()
    jax.tree.map(np.testing.assert_array_equal, found, same)


def test_what_has_no_probability_is_a_constant():
    """Also where the cotangent is NaN, as that of π log π at 0 is."""
    logits = jnp.asarray([[0.0, -jnp.inf, 1.0, -jnp.inf]])

    def entropy(logits):
        found = token_log_prob(logits=logits, tokens=jnp.asarray([0]), top_k=4)
        return jnp.sum(jnp.exp(found.top_k_log_prob) * found.top_k_log_prob), found

    gradient, found = jax.jit(jax.grad(entropy, has_aux=True), compiler_options=FAST)(logits)
    assert found.top_k_ids.tolist() == [[2, 0, 1, 3]]
    assert found.top_k_log_prob[0, 2:].tolist() == [-jnp.inf, -jnp.inf]
    p = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    np.testing.assert_allclose(gradient[0, ::2], p * (np.log(p) - p @ np.log(p)))
    assert (gradient[0, 1::2] == 0.0).all()


def test_a_row_of_nan_is_nan_and_no_other():
    known = {"tokens": jnp.asarray([0, 0]), "top_k": 2, "vocabulary_size": 2}
    run = jax.jit(lambda logits: token_log_prob(logits=logits, **known), compiler_options=FAST)
    for sign in (1.0, -1.0):  # a NaN has one
        found = run(jnp.asarray(np.copysign([[0.0, np.nan, 1.0], [0.0, 1.0, 2.0]], sign)))
        assert jnp.isnan(found.top_k_log_prob[0]).all()
        assert jnp.isfinite(found.top_k_log_prob[1]).all()
        assert (found.top_k_ids < 2).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64], ids=str)
def test_zeros_of_either_sign_are_equal(dtype):
    logits = jnp.asarray([[-1.0, -0.0, 0.0, -0.0, 0.0]], dtype)
    found = jax.jit(lambda z: token_log_prob(logits=z, tokens=jnp.asarray([0]), top_k=3), compiler_options=FAST)(logits)
    assert found.top_k_ids.tolist() == [[1, 2, 3]]


def test_the_matrix_of_tokens_by_vocabulary_never_exists():
    n, vocabulary, chunk = 512, 4099, 16
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, 8), (vocabulary, 8))]

    def of(hidden, weight):
        known = {"tokens": jnp.zeros(n, int), "top_k": 5, "chunk_tokens": chunk}
        return jnp.sum(linear_log_prob(hidden=hidden, weight=weight, **known).top_k_log_prob)

    text = str(jax.make_jaxpr(jax.grad(of, (0, 1)))(*shapes))
    assert f"[{n},{vocabulary}]" not in text
    assert f"[{chunk},{vocabulary}]" in text


@pytest.mark.parametrize("function", [token_log_prob, linear_log_prob], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 2, "top_k_ids": jnp.zeros((3, 2), int)}, ValueError, "^top_k: .* beside top_k_ids, got 2"),
        ({"top_k": 0}, ValueError, "^top_k: expected a finite number, 1 or more and at most 5, got 0"),
        ({"top_k": 6}, ValueError, "^top_k: expected a finite number, 1 or more and at most 5, got 6"),
        ({"top_k": 2.0}, TypeError, "^top_k: expected a whole number"),
        ({"top_k": jnp.asarray(2)}, TypeError, "^top_k: expected a whole number"),
    ],
    ids=["both", "none", "too many", "a fraction", "an array"],
)
def test_errors(function, options, error, message):
    inputs = {"logits": jnp.ones((3, 7))}
    if function is linear_log_prob:
        inputs = {"hidden": jnp.ones((3, 2)), "weight": jnp.ones((7, 2))}
    with pytest.raises(error, match=message):
        function(**inputs, tokens=jnp.zeros(3, int), vocabulary_size=5, **options)
