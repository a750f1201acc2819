"""What drpo_jax promises besides the contract matrix: ids outside the vocabulary, debugging switches, numbers as arrays."""

import functools
from dataclasses import dataclass

import drpo_jax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_core import DPPO, DRPO

H, V, K, SHAPE = 5, 13, 3, (4, 6)
TOP_K = DPPO(delta=0.12, divergence="per_token")


def arrays_of(dtype=np.float64):
    """One batch from which every function takes what it needs; nothing of it is near a kink of an objective."""
    rng = np.random.default_rng(3)
    hidden, weight, bias = rng.normal(size=(*SHAPE, H)), rng.normal(size=(V, H)), rng.normal(size=V)
    logits = hidden @ weight.T + bias
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    behavior = logits + 0.3 * rng.normal(size=logits.shape)
    log_mu = behavior - np.log(np.exp(behavior).sum(-1, keepdims=True))
    tokens = rng.integers(0, V, size=SHAPE)
    ids = np.argsort(-log_mu, axis=-1)[..., :K]
    floats = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "logits": logits,
        "behavior_logits": behavior,
        "log_prob": np.take_along_axis(log_probs, tokens[..., None], -1)[..., 0],
        "behavior_log_prob": np.take_along_axis(log_mu, tokens[..., None], -1)[..., 0],
        "log_normalizer": np.log(np.exp(logits).sum(-1)),
        "top_k_behavior_log_prob": np.take_along_axis(log_mu, ids, -1),
        "advantages": np.where(rng.random(SHAPE) < 0.5, -1.0, 1.0) * (0.2 + rng.random(SHAPE)),
        "token_weights": 0.5 + rng.random(SHAPE),
        "divergence": 0.2 * rng.random(SHAPE),
    }
    others = {"tokens": tokens, "top_k_ids": ids, "mask": rng.random(SHAPE) < 0.7}
    # rounded by NumPy, so that JAX is asked for no dtype that it does not have
    return {k: jnp.asarray(v.astype(dtype)) for k, v in floats.items()} | {k: jnp.asarray(v) for k, v in others.items()}


@dataclass(frozen=True)
class Case:
    """A function, the names of its arrays, those it is differentiable in, and the scalar that is differentiated."""

    name: str
    arrays: tuple[str, ...]
    differentiable: tuple[str, ...]
    scalar: object
    objective: object = None
    numbers: tuple[str, ...] = ()
    options: tuple = ()

    @property
    def function(self):
        """The function of drpo_jax, or one that calls it."""
        return getattr(drpo_jax, self.name)

    def call(self, arrays, **options):
        """The function of its own among the arrays."""
        positional = () if self.objective is None else (self.objective,)
        return self.function(*positional, **{name: arrays[name] for name in self.arrays}, **dict(self.options) | options)

    def value_and_gradients(self, arrays, **options):
        """The scalar and its gradient in every differentiable array."""

        def scalar(inputs):
            return self.scalar(self.call(arrays | inputs, **options), arrays)

        return jax.value_and_grad(scalar)({name: arrays[name] for name in self.differentiable})

    def compiled(self, **options):
        """`value_and_gradients` of arrays, compiled without the optimisations that take most of the time."""
        return compiled(self, tuple(options.items()))


@functools.cache
def compiled(case, options):
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(functools.partial(case.value_and_gradients, **dict(options)), compiler_options=fast)


def top_k_policy_loss(function):
    """A function at vocabulary scale that measures the top-K divergence."""

    def call(objective, *, top_k_ids, top_k_behavior_log_prob, **arguments):
        recorded = drpo_jax.TopKDivergence(kind="kl", ids=top_k_ids, behavior_log_prob=top_k_behavior_log_prob)
        return function(objective, **arguments, divergence=recorded)

    return call


class TopK(Case):
    """A function at vocabulary scale with a recorded top-K divergence."""

    @property
    def function(self):
        """The function with that divergence of arrays."""
        return top_k_policy_loss(getattr(drpo_jax, self.name))


BATCH = ("tokens", "behavior_log_prob", "advantages", "mask", "token_weights")
POLICY = ("log_prob", "behavior_log_prob", "advantages", "divergence", "mask")
RECORDED = ("top_k_ids", "top_k_behavior_log_prob")
CASES = [
    Case("token_loss", POLICY, ("log_prob",), lambda r, _: r.sum(), DRPO(delta=0.15)),
    Case("policy_loss", (*POLICY, "token_weights"), ("log_prob",), lambda r, _: r[0], DRPO(delta=0.15), ("normalizer",)),
    Case(
        "token_log_prob",
        ("logits", "tokens"),
        ("logits",),
        lambda r, a: jnp.sum(jnp.where(a["mask"], r.log_prob + 0.3 * r.entropy, 0.0)),
        numbers=("temperature",),
        options=(("entropy", True),),
    ),
    Case(
        "logits_policy_loss",
        ("logits", *BATCH, "divergence"),
        ("logits",),
        lambda r, _: r.loss,
        DRPO(delta=0.15),
        ("temperature", "normalizer"),
        (("entropy", True),),
    ),
    Case(
        "linear_policy_loss",
        ("hidden", "weight", "bias", *BATCH, "divergence"),
        ("hidden", "weight", "bias"),
        lambda r, _: r.loss,
        DRPO(delta=0.15),
        ("temperature", "normalizer", "logit_softcap", "chunk_tokens"),
        (("chunk_tokens", 5), ("entropy", True)),
    ),
    Case(
        "full_divergences",
        ("logits", "behavior_logits"),
        ("logits",),
        lambda r, a: jnp.sum(jnp.where(a["mask"], r.tv + r.kl, 0.0)),
        numbers=("temperature", "behavior_temperature"),
    ),
    Case(
        "top_k_divergences",
        ("logits", "log_normalizer", "tokens", "behavior_log_prob", *RECORDED),
        ("logits", "log_normalizer"),
        lambda r, a: jnp.sum(jnp.where(a["mask"], r.tv + r.kl, 0.0)),
        numbers=("temperature",),
    ),
    TopK("logits_policy_loss", ("logits", *BATCH, *RECORDED), ("logits",), lambda r, _: r.loss, TOP_K),
    TopK(
        "linear_policy_loss",
        ("hidden", "weight", *BATCH, *RECORDED),
        ("hidden", "weight"),
        lambda r, _: r.loss,
        TOP_K,
        options=(("chunk_tokens", 5),),
    ),
]
IDS = [c.name + ("-top-k" if isinstance(c, TopK) else "") for c in CASES]

each_case = pytest.mark.parametrize("case", CASES, ids=IDS)


def is_float(array):
    return jnp.issubdtype(array.dtype, jnp.floating)


# numbers


@pytest.mark.parametrize("case", [c for c in CASES if "temperature" in c.numbers], ids=lambda c: c.name)
def test_a_temperature_is_no_array(case):
    for given in (jnp.asarray(2.0), jnp.ones(1)):
        with pytest.raises(TypeError, match=r"^temperature: expected a real number, got .*shape"):
            case.call(arrays_of(), temperature=given)
    arrays = arrays_of()
    with pytest.raises(TypeError, match=r"^temperature: expected a real number"):
        jax.jit(lambda t: case.call(arrays, temperature=t))(2.0)


REDUCED = [c for c in CASES if "normalizer" in c.numbers]


# ids

OUTSIDE = [-1, V, -100, 2**31 - 1]
WITH_IDS = [(c, ids) for c in CASES for ids in ("tokens", "top_k_ids") if ids in c.arrays]
each_with_ids = pytest.mark.parametrize(
    ("case", "ids"), WITH_IDS, ids=[f"{c.name}-{n}-{type(c).__name__}" for c, n in WITH_IDS]
)


def rows_with_nan(gradients):
    """Which tokens have a NaN in the gradient of their own row."""
    return {name: np.isnan(np.asarray(g)).reshape(*SHAPE, -1).any(-1) for name, g in gradients.items() if g.shape[:2] == SHAPE}


@each_with_ids
@pytest.mark.parametrize(("outside", "jitted"), [(-1, False), *((outside, True) for outside in OUTSIDE)])
def test_an_id_outside_the_vocabulary_at_a_valid_token_is_nan(case, ids, outside, jitted):
    arrays = arrays_of()
    places = [tuple(int(i) for i in place) for place in np.argwhere(np.asarray(arrays["mask"]))]
    # some of which DPPO drops
    broken = places[::3]
    for place in broken:
        index = place if ids == "tokens" else (*place, 1)
        arrays[ids] = arrays[ids].at[index].set(outside)
    evaluate = case.compiled() if jitted else case.value_and_gradients
    value, gradients = evaluate(arrays)
    assert jnp.isnan(value)
    for name, rows in rows_with_nan(gradients).items():
        assert [tuple(int(i) for i in place) for place in np.argwhere(rows)] == broken, name
    for name in set(gradients) - set(rows_with_nan(gradients)):
        assert jnp.isnan(gradients[name]).any(), name


@each_with_ids
@pytest.mark.parametrize("outside", OUTSIDE)
def test_an_id_outside_the_vocabulary_at_a_masked_token_is_nothing(case, ids, outside):
    arrays = arrays_of()
    mask = arrays["mask"]
    dirty = arrays | {ids: jnp.where(mask if ids == "tokens" else mask[..., None], arrays[ids], outside)}
    found, expected = case.compiled()(dirty), case.compiled()(arrays)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_ids_that_are_known_do_not_raise_either():
    assert jnp.isnan(drpo_jax.token_log_prob(logits=jnp.zeros((1, 3)), tokens=jnp.array([3])).log_prob[0])


@pytest.mark.parametrize("case", [c for c in CASES if "top_k_ids" in c.arrays], ids=lambda c: c.name)
def test_an_id_that_comes_twice_counts_once(case):
    arrays = arrays_of()
    twice = arrays | {name: jnp.concatenate((arrays[name], arrays[name][..., :2]), axis=-1) for name in RECORDED}
    # the first time: another log-prob beside the second is not looked at
    twice["top_k_behavior_log_prob"] = twice["top_k_behavior_log_prob"].at[..., K:].set(-0.1)
    found, expected = case.compiled()(twice), case.compiled()(arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), found, expected)


# debugging switches and masked tokens


@each_case
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("switch", ["nans", "infs"])
def test_debugging_does_not_raise_on_masked_tokens(case, jitted, switch):
    """Of token_log_prob and divergences the row itself is the result: they have no mask."""
    arrays = arrays_of(np.float32)
    if "mask" in case.arrays:
        mask = arrays["mask"]
        per_token = [n for n in case.arrays if n != "mask" and arrays[n].shape[:2] == SHAPE and is_float(arrays[n])]
        for name in per_token:
            where = mask.reshape(*SHAPE, *(1,) * (arrays[name].ndim - 2))
            arrays[name] = jnp.where(where, arrays[name], jnp.nan)
    evaluate = jax.jit(case.value_and_gradients) if jitted else case.value_and_gradients
    expected = evaluate(arrays)
    if switch == "infs" and not jitted:
        return  # every maximum begins with −inf
    with getattr(jax, f"debug_{switch}")(True):  # noqa: FBT003 -- JAX's signature
        found = evaluate(arrays)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("case", [c for c in CASES if "logits" in c.arrays], ids=lambda c: c.name + str(c.objective)[:4])
@pytest.mark.parametrize("jitted", [False, True])
def test_debugging_does_not_raise_on_a_probability_of_zero(case, jitted):
    arrays = arrays_of(np.float32)
    # the least likely token that was not sampled, which is none of the top-K
    sampled = jax.nn.one_hot(arrays["tokens"], V, dtype=bool)
    never = jax.nn.one_hot(jnp.argmin(jnp.where(sampled, jnp.inf, arrays["behavior_logits"]), axis=-1), V, dtype=bool)
    for name in ("logits", "behavior_logits"):
        arrays[name] = jnp.where(never, -jnp.inf, arrays[name])
    arrays["log_normalizer"] = jax.scipy.special.logsumexp(arrays["logits"], axis=-1)
    evaluate = jax.jit(case.value_and_gradients) if jitted else case.value_and_gradients
    with jax.debug_nans(True):  # noqa: FBT003 -- JAX's signature
        value, gradients = evaluate(arrays)
    assert jnp.isfinite(value)
    assert not gradients["logits"][never].any()


# transformations


@pytest.mark.parametrize("case", REDUCED, ids=lambda c: c.name)
def test_diagnostics_that_are_not_asked_for_are_none(case):
    arrays = arrays_of()
    with_them, without = case.call(arrays), case.call(arrays, diagnostics=False)
    assert without[1] is None
    assert float(with_them[0]) == float(without[0])
    jax.tree.map(np.testing.assert_array_equal, tuple(without[2:]), tuple(with_them[2:]))
