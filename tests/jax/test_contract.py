"""What every function of drpo_jax promises, over one table of them: dtypes, numbers, ids, debugging switches.

Each test is generated from the table, so that a new argument is tested in every way by one more name in it.
"""

import functools
import inspect
import itertools
from dataclasses import dataclass

import drpo_jax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_core import DPPO, DRPO, sequence_mean_token_sum, token_mean

H, V, K, SHAPE = 5, 13, 3, (4, 6)
FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
PRECISION = {jnp.float16: 2.0**-11, jnp.bfloat16: 2.0**-8, jnp.float32: 2.0**-24, jnp.float64: 2.0**-53}
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
        "top_k_log_prob": np.take_along_axis(log_probs, ids, -1),
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


class Outcomes(Case):
    """A function of several outcomes of each token."""

    @property
    def function(self):
        """The function with the top K as those outcomes."""
        function = getattr(drpo_jax, self.name)

        def call(objective, *, top_k_log_prob, top_k_behavior_log_prob, **arguments):
            return function(objective, log_prob=top_k_log_prob, behavior_log_prob=top_k_behavior_log_prob, **arguments)

        return call


def of_log_probs(found):
    """A scalar of all that is found per token."""
    first, *others = jnp.moveaxis(found.top_k_log_prob, -1, 0)
    return jnp.sum(found.log_prob + 0.3 * found.entropy + 0.1 * found.log_normalizer - 0.2 * first + 0.4 * sum(others))


BATCH = ("tokens", "behavior_log_prob", "advantages", "mask", "token_weights")
POLICY = ("log_prob", "behavior_log_prob", "advantages", "divergence", "mask")
RECORDED = ("top_k_ids", "top_k_behavior_log_prob")
CASES = [
    Outcomes(
        "score_centering",
        ("top_k_log_prob", "top_k_behavior_log_prob", "advantages", "divergence", "mask"),
        ("top_k_log_prob",),
        # all of one sign
        lambda r, a: jnp.sum(r * jnp.where(a["mask"], a["advantages"], 0.0)),
        DRPO(delta=0.15),
    ),
    Case("token_loss", POLICY, ("log_prob",), lambda r, _: r.sum(), DRPO(delta=0.15)),
    Case("policy_loss", (*POLICY, "token_weights"), ("log_prob",), lambda r, _: r[0], DRPO(delta=0.15), ("normalizer",)),
    Case(
        "token_log_prob",
        ("logits", "tokens", "mask"),
        ("logits",),
        lambda r, _: of_log_probs(r),
        numbers=("temperature", "vocabulary_size", "top_k"),
        options=(("entropy", True), ("top_k", 2)),
    ),
    Case(
        "linear_log_prob",
        ("hidden", "weight", "bias", "tokens", "top_k_ids", "mask"),
        ("hidden", "weight", "bias"),
        lambda r, _: of_log_probs(r),
        numbers=("temperature", "vocabulary_size", "logit_softcap", "chunk_tokens"),
        options=(("chunk_tokens", 5), ("entropy", True)),
    ),
    Case(
        "logits_policy_loss",
        ("logits", *BATCH, "divergence"),
        ("logits",),
        lambda r, _: r.loss,
        DRPO(delta=0.15),
        ("temperature", "vocabulary_size", "normalizer", "entropy_coefficient"),
        (("entropy", True),),
    ),
    Case(
        "linear_policy_loss",
        ("hidden", "weight", "bias", *BATCH, "divergence"),
        ("hidden", "weight", "bias"),
        lambda r, _: r.loss,
        DRPO(delta=0.15),
        ("temperature", "vocabulary_size", "normalizer", "entropy_coefficient", "logit_softcap", "chunk_tokens"),
        (("chunk_tokens", 5), ("entropy", True)),
    ),
    Case(
        "full_divergences",
        ("logits", "behavior_logits"),
        ("logits",),
        lambda r, a: jnp.sum(jnp.where(a["mask"], r.tv + r.kl, 0.0)),
        numbers=("temperature", "vocabulary_size", "behavior_temperature"),
    ),
    Case(
        "top_k_divergences",
        ("logits", "log_normalizer", "tokens", "behavior_log_prob", *RECORDED),
        ("logits", "log_normalizer"),
        lambda r, a: jnp.sum(jnp.where(a["mask"], r.tv + r.kl, 0.0)),
        numbers=("temperature", "vocabulary_size"),
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


def test_the_table_has_every_function():
    functions = {name for name in drpo_jax.__all__ if inspect.isfunction(getattr(drpo_jax, name))}
    assert {case.name for case in CASES} == functions - {"linear_reduction"}


def is_float(array):
    return jnp.issubdtype(array.dtype, jnp.floating)


def working(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def plain(case):
    """Without diagnostics, which take most of the time of a compilation."""
    return {"diagnostics": False} if "diagnostics" in inspect.signature(getattr(drpo_jax, case.name)).parameters else {}


# dtypes


def combinations():
    """All arrays of every case in float32, then each one in another dtype, then a random combination."""
    rng = np.random.default_rng(0)
    for case, name in zip(CASES, IDS, strict=True):
        floats = [n for n in case.arrays if n not in ("tokens", "mask", "top_k_ids")]
        yield pytest.param(case, {}, id=f"{name}-float32")
        others = [dtype for dtype in FLOATS if dtype != jnp.float32]
        for array, dtype in zip(floats, itertools.cycle(others)):
            yield pytest.param(case, {array: dtype}, id=f"{name}-{array}-{jnp.dtype(dtype).name}")
        yield pytest.param(case, {n: FLOATS[rng.integers(4)] for n in floats}, id=f"{name}-random")


@pytest.mark.parametrize(("case", "dtypes"), list(combinations()))
def test_every_combination_of_dtypes(case, dtypes):
    arrays = arrays_of(np.float32)
    arrays |= {name: arrays[name].astype(dtype) for name, dtype in dtypes.items()}
    # that of the rounded logits, and itself in 32 bits at least: with another one, π would sum to more than 1
    log_normalizer = jax.scipy.special.logsumexp(arrays["logits"].astype(jnp.float64), axis=-1)
    arrays["log_normalizer"] = log_normalizer.astype(working(dtypes.get("log_normalizer", jnp.float32)))
    value, gradients = case.compiled(**plain(case))(arrays)
    exact = {name: a.astype(jnp.float64) if is_float(a) else a for name, a in arrays.items()}
    expected, expected_gradients = case.compiled(**plain(case))(exact)
    # matrix products are taken in the dtype of the model: the gradient of the logits is rounded to it
    products = max(PRECISION[arrays[n].dtype.type] for n in ("hidden", "weight")) if "hidden" in case.arrays else 0.0
    assert value.dtype in (jnp.float32, jnp.float64)
    np.testing.assert_allclose(value, expected, rtol=3e-5)
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype
        scale = float(jnp.abs(expected_gradients[name]).max())
        within = (3e-5 + 4.0 * products + 2.0 * PRECISION[gradient.dtype.type]) * scale
        np.testing.assert_allclose(gradient.astype(jnp.float64), expected_gradients[name], rtol=0.0, atol=within)


@each_case
@pytest.mark.parametrize("dtype", FLOATS)
def test_results_are_float32_at_least_and_float64_where_all_arrays_are(case, dtype):
    result = jax.eval_shape(case.call, arrays_of(dtype))
    expected = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} - {jnp.dtype(jnp.int32)} == {jnp.dtype(expected)}


@each_case
def test_without_x64(case):
    with jax.enable_x64(False):  # noqa: FBT003 -- JAX's signature
        arrays = arrays_of(np.float32)
        value, gradients = case.compiled()(arrays)
        assert {leaf.dtype for leaf in jax.tree.leaves((value, gradients))} == {jnp.dtype(jnp.float32)}
    expected, expected_gradients = case.compiled()(arrays_of())
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected_gradients[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.int32, jnp.uint32, jnp.int64, jnp.uint64])
@pytest.mark.parametrize("vocabulary", [100, 300, 70_000])
def test_ids_of_every_integer_type(dtype, vocabulary):
    # a vocabulary larger than the type can count
    logits = jax.random.normal(jax.random.key(0), (1, vocabulary))
    token = 7

    def log_prob(logits):
        return drpo_jax.token_log_prob(logits=logits, tokens=jnp.asarray([token], dtype)).log_prob[0]

    gradient = jax.grad(log_prob)(logits)
    expected = jax.grad(lambda z: jax.nn.log_softmax(z)[0, token])(logits)
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


# numbers

GOOD = [2, 2.0, np.float64(2.0), np.float32(2.0), np.float16(2.0), np.int64(2), np.array(2.0), np.array(2)]
BAD = [
    0.0,
    -1.0,
    np.nan,
    np.inf,
    -np.inf,
    np.float32(np.nan),
    np.zeros(1),
    np.ones(1),
    "2",
    True,
    np.True_,
    10**400,
    1j,
    [2.0],
]
NUMBERS = [(case, number) for case in CASES for number in case.numbers]
each_number = pytest.mark.parametrize(("case", "number"), NUMBERS, ids=[f"{c.name}-{n}" for c, n in NUMBERS])


def words(value):
    return f"{type(value).__name__}-{str(value)[:8]}"


# without x64 there is no 64-bit array that a float64 could promote to
each_good_number = pytest.mark.parametrize(
    ("given", "x64"),
    [(GOOD[2], False), *((given, True) for given in GOOD)],
    ids=lambda value: words(value) if not isinstance(value, bool) else f"x64-{value}",
)


def test_every_number_is_in_the_table():
    for case in CASES:
        parameters = inspect.signature(getattr(drpo_jax, case.name)).parameters.values()
        annotated = {p.name for p in parameters if str(p.annotation).startswith(("float", "int"))}
        annotated -= {"top_k"} if "top_k_ids" in case.arrays else set()
        assert isinstance(case, TopK) or annotated == set(case.numbers), case.name


def program_with(case, number, given, x64):
    with jax.enable_x64(x64):
        program = jax.make_jaxpr(functools.partial(case.value_and_gradients, **{number: given}))(arrays_of(np.float32))
    return str(program), {aval.dtype for aval in program.out_avals}


of_an_integer = functools.cache(program_with)


@each_number
@each_good_number
def test_a_number_of_any_type_promotes_nothing(case, number, given, x64):
    if number in ("chunk_tokens", "vocabulary_size", "top_k") and not isinstance(given, (int, np.integer)):
        return
    program, dtypes = program_with(case, number, given, x64)
    # the same program, so the same numbers
    assert program == of_an_integer(case, number, int(given), x64)[0]
    assert dtypes == {jnp.dtype(jnp.float32)}


@each_number
@pytest.mark.parametrize("given", BAD, ids=words)
def test_a_bad_number_is_refused_by_name(case, number, given):
    if not isinstance(given, np.ndarray):
        if number == "normalizer" and given == 0.0:
            return  # of a batch without a valid token
        if number == "entropy_coefficient" and given in (-1.0, 0.0):
            return  # any finite number
    with pytest.raises((TypeError, ValueError), match=f"^{number}: expected"):
        case.call(arrays_of(), **{number: given})


@pytest.mark.parametrize("case", [c for c in CASES if "temperature" in c.numbers], ids=lambda c: c.name)
def test_a_temperature_that_is_an_array_is_one_per_token(case):
    arrays = arrays_of(np.float32)
    for given in (jnp.asarray(2.0), jnp.ones(1), jnp.ones((*SHAPE, 1))):
        with pytest.raises(ValueError, match=r"^temperature: expected the shape of .*, or a number, \(4, 6\), got"):
            case.call(arrays, temperature=given)
    with pytest.raises(ValueError, match=r"^temperature: expected the shape of"):
        jax.jit(lambda t: case.call(arrays, temperature=t))(2.0)
    for dtype in FLOATS:
        shapes = jax.eval_shape(functools.partial(case.value_and_gradients, temperature=jnp.ones(SHAPE, dtype)), arrays)
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


REDUCED = [c for c in CASES if "normalizer" in c.numbers]


@pytest.mark.parametrize("case", REDUCED, ids=lambda c: c.name)
@each_good_number
def test_a_horizon_of_any_type_promotes_nothing(case, given, x64):
    with jax.enable_x64(x64):
        arrays = arrays_of(np.float32)
        horizons = {"horizon": given}, {"horizon": 2.0}, {"horizon": jnp.asarray(2.0)}
        reductions = [functools.partial(sequence_mean_token_sum, **horizon) for horizon in horizons]
        programs = [jax.make_jaxpr(functools.partial(case.value_and_gradients, reduction=r))(arrays) for r in reductions]
    assert str(programs[0]) == str(programs[1])
    assert {aval.dtype for program in programs for aval in program.out_avals} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("case", REDUCED, ids=lambda c: c.name)
@pytest.mark.parametrize("given", BAD, ids=words)
def test_a_bad_horizon_is_refused_by_name(case, given):
    with pytest.raises((TypeError, ValueError), match=r"^horizon: expected"):
        case.call(arrays_of(), reduction=functools.partial(sequence_mean_token_sum, horizon=given))


@pytest.mark.parametrize("case", REDUCED, ids=lambda c: c.name)
def test_a_normalizer_may_be_an_array_or_bound(case):
    arrays = arrays_of(np.float32)
    expected = case.compiled(normalizer=7.0)(arrays)[0]
    for given in (jnp.asarray(7), jnp.asarray(7.0, jnp.float64), jnp.asarray(7.0, jnp.bfloat16)):
        found = jax.jit(lambda n: case.value_and_gradients(arrays, normalizer=n)[0])(given)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    bound = functools.partial(token_mean, normalizer=7.0)
    assert float(case.compiled(reduction=bound)(arrays)[0]) == float(expected)
    # JAX can't raise for a value
    assert jnp.isnan(case.value_and_gradients(arrays, normalizer=jnp.asarray(-1.0))[0])


@pytest.mark.parametrize("case", REDUCED, ids=lambda c: c.name)
@pytest.mark.parametrize(
    "reduction",
    [lambda values, mask: (values * mask).sum(), jnp.mean, "token-mean", token_mean(jnp.ones(2), jnp.ones(2, bool))],
    ids=["lambda", "mean", "str", "array"],
)
def test_an_unknown_reduction_is_the_same_error_everywhere(case, reduction):
    with pytest.raises(TypeError, match=r"^reduction: expected token_mean, .* or a linear_reduction"):
        case.call(arrays_of(), reduction=reduction)


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


@pytest.mark.parametrize("case", [c for c in CASES if set(RECORDED) <= set(c.arrays)], ids=lambda c: c.name)
def test_an_id_that_comes_twice_counts_once(case):
    arrays = arrays_of()
    twice = arrays | {name: jnp.concatenate((arrays[name], arrays[name][..., :2]), axis=-1) for name in RECORDED}
    # the first time: another log-prob beside the second is not looked at
    twice["top_k_behavior_log_prob"] = twice["top_k_behavior_log_prob"].at[..., K:].set(-0.1)
    found, expected = case.compiled()(twice), case.compiled()(arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), found, expected)


# debugging switches and masked tokens


@pytest.mark.parametrize("case", [c for c in CASES if "mask" in c.arrays], ids=lambda c: c.name + type(c).__name__)
@pytest.mark.parametrize(("switch", "jitted"), [("nans", False), ("nans", True), ("infs", True)])
def test_debugging_does_not_raise_on_masked_tokens(case, switch, jitted):
    """Not for infinities operation by operation, where every maximum begins with −∞."""
    arrays = arrays_of(np.float32)
    mask = arrays["mask"]
    for name in [n for n in case.arrays if n != "mask" and arrays[n].shape[:2] == SHAPE]:
        where = mask.reshape(*SHAPE, *(1,) * (arrays[name].ndim - 2))
        arrays[name] = jnp.where(where, arrays[name], jnp.nan if is_float(arrays[name]) else -100)
    evaluate = jax.jit(case.value_and_gradients) if jitted else case.value_and_gradients
    expected = evaluate(arrays)
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


@each_case
def test_jit_and_an_enclosing_vmap_change_nothing(case):
    arrays = arrays_of()
    expected = case.value_and_gradients(arrays)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
    jax.tree.map(close, case.compiled()(arrays), expected)
    stacked = jax.tree.map(lambda a: jnp.stack((a, a)), arrays)
    found = jax.vmap(case.compiled())(stacked)
    for i in range(2):
        jax.tree.map(close, jax.tree.map(lambda a, i=i: a[i], found), expected)


SHAPES = [(), (1,), (0,), (3,), (2, 0), (2, 2, 2)]


@each_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_of_tokens(case, shape):
    arrays = arrays_of()
    size = int(np.prod(shape, dtype=int))
    cut = {
        n: a.reshape(-1, *a.shape[2:])[:size].reshape(*shape, *a.shape[2:]) if a.shape[:2] == SHAPE else a
        for n, a in arrays.items()
    }
    value, gradients = case.compiled(**plain(case))(cut)
    assert value.shape == ()
    assert jnp.isfinite(value)
    for name, gradient in gradients.items():
        assert gradient.shape == cut[name].shape


@pytest.mark.parametrize("case", REDUCED, ids=lambda c: c.name)
def test_diagnostics_that_are_not_asked_for_are_none(case):
    arrays = arrays_of()
    with_them, without = case.call(arrays), case.call(arrays, diagnostics=False)
    assert without[1] is None
    assert float(with_them[0]) == float(without[0])
    jax.tree.map(np.testing.assert_array_equal, tuple(without[2:]), tuple(with_them[2:]))
