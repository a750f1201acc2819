"""What drpo_torch and drpo_jax promise alike, stated once in NumPy terms.

``python tests/test_adapters.py`` prints the largest difference between every way of getting the gradient.
"""

import functools
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import drpo_jax
import drpo_torch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backends import Backend
from variants import ALL, RATIO_FORMS, each_kind, each_objective, each_ratio_form

from drpo_core import (
    DPPO,
    DRPO,
    SPO,
    PolicyGradient,
    Tokens,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    summarize,
    token_diagnostics,
    token_loss_and_gradient,
    token_mean,
)
from drpo_core.objectives import label

SCORE_FORMS = [objective for objective in ALL if objective not in RATIO_FORMS]
REDUCTIONS = [token_mean, sequence_mean_token_mean, functools.partial(sequence_mean_token_sum, horizon=7.0)]
CONSTANTS = ("behavior_log_prob", "advantages", "divergence")
POISON = [math.nan, math.inf, -math.inf, 1e4, -1e4]

each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS, ids=["token-mean", "seq-mean-token-mean", "token-sum"])


class TorchAdapter:
    """drpo_torch on NumPy arrays."""

    module, array, float16, bfloat16 = drpo_torch, staticmethod(torch.tensor), torch.float16, torch.bfloat16
    float32, wrong_type = torch.float32, np.zeros((3, 5))

    @staticmethod
    def value_and_gradient(function, log_prob, cotangent=None):
        """Value of a function of `log_prob`, and the cotangent (default: 1) times its Jacobian."""
        x = torch.tensor(log_prob).requires_grad_()
        value = function(x)
        value.backward(None if cotangent is None else torch.tensor(cotangent))
        return value.detach().numpy(), x.grad.numpy()

    @staticmethod
    def gradients(function, arrays):
        """Of a scalar function in each of its keyword arguments; 0 where it does not depend on one."""
        leaves = {name: torch.tensor(array).requires_grad_() for name, array in arrays.items()}
        found = torch.autograd.grad(function(**leaves), list(leaves.values()), materialize_grads=True, allow_unused=True)
        return {name: g.numpy() for name, g in zip(leaves, found, strict=True)}

    @staticmethod
    def cast(array, dtype):
        """To one of this framework's dtypes."""
        return torch.tensor(array).to(dtype)

    @staticmethod
    def to_numpy(statistics):
        """Diagnostics."""
        return {name: tuple(np.asarray(part) for part in statistic) for name, statistic in statistics.items()}


class JaxAdapter:
    """drpo_jax on NumPy arrays."""

    module, array, float16, bfloat16 = drpo_jax, staticmethod(jnp.asarray), jnp.float16, jnp.bfloat16
    float32, wrong_type = jnp.float32, np.zeros((3, 5))

    @staticmethod
    def value_and_gradient(function, log_prob, cotangent=None):
        """Value of a function of `log_prob`, and the cotangent (default: 1) times its Jacobian."""
        value, vjp = jax.vjp(function, jnp.asarray(log_prob))
        (gradient,) = vjp(jnp.ones_like(value) if cotangent is None else jnp.asarray(cotangent))
        return np.asarray(value), np.asarray(gradient)

    @staticmethod
    def gradients(function, arrays):
        """Of a scalar function in each of its keyword arguments."""
        found = jax.grad(lambda leaves: function(**leaves))({name: jnp.asarray(a) for name, a in arrays.items()})
        return {name: np.asarray(g) for name, g in found.items()}

    @staticmethod
    def cast(array, dtype):
        """To one of this framework's dtypes."""
        return jnp.asarray(array).astype(dtype)

    @staticmethod
    def to_numpy(statistics):
        """Diagnostics."""
        return {name: tuple(np.asarray(part) for part in statistic) for name, statistic in statistics.items()}


ADAPTERS = {"torch": TorchAdapter(), "jax": JaxAdapter()}


@pytest.fixture(params=list(ADAPTERS))
def adapter(request):
    """drpo_torch, then drpo_jax."""
    return ADAPTERS[request.param]


def batch(shape=(6, 11), seed=0):
    """Log-probs in [−4, 0] with ratios on both sides of every threshold; the third sequence is fully masked."""
    rng = np.random.default_rng(seed)
    behavior = -3.0 * rng.random(shape) - 0.01
    mask = rng.random(shape) < 0.7
    if len(shape) == 2:
        mask[2] = False
    return {
        "log_prob": np.minimum(behavior + 0.8 * rng.normal(size=shape), -0.001),
        "behavior_log_prob": behavior,
        "advantages": rng.normal(size=shape),
        "mask": mask,
        "divergence": 0.3 * rng.random(shape),
    }


def core(objective, data):
    arrays = [data[name] for name in ("log_prob", "behavior_log_prob", "advantages")]
    return token_loss_and_gradient(objective, *arrays, mask=data["mask"], divergence=data["divergence"])


def constants(adapter, data):
    return {name: adapter.array(array) for name, array in data.items() if name != "log_prob"}


def policy_loss(adapter, objective, data, **options):
    """Loss and gradient of the adapter's policy_loss, as NumPy."""
    fixed = constants(adapter, data)

    def loss(log_prob):
        return adapter.module.policy_loss(objective, log_prob=log_prob, **fixed, **options)[0]

    return adapter.value_and_gradient(loss, data["log_prob"])


def token_loss(adapter, objective, data, cotangent=None):
    fixed = constants(adapter, data)
    weights = np.ones_like(data["log_prob"]) if cotangent is None else cotangent
    return adapter.value_and_gradient(
        lambda x: adapter.module.token_loss(objective, log_prob=x, **fixed), data["log_prob"], weights
    )


def autodiff_of_value(adapter, objective, data):
    """What the framework's own differentiation of the core's loss value gives."""
    xp = Backend.TORCH if isinstance(adapter, TorchAdapter) else Backend.JAX
    fixed = {name: xp.asarray(array) for name, array in data.items() if name != "log_prob"}

    def total(log_prob):
        return objective.loss(Tokens.checked(log_prob, **fixed)).sum()

    return adapter.value_and_gradient(total, data["log_prob"])[1]


def factors(reduction, mask):
    """What each reduction multiplies a token by, from its definition."""
    sequences = mask.any(axis=-1).sum()
    if reduction is token_mean:
        return mask / mask.sum()
    if reduction is sequence_mean_token_mean:
        return mask / np.maximum(mask.sum(axis=-1, keepdims=True), 1) / sequences
    return mask / 7.0 / sequences


@each_objective
def test_token_loss_is_the_cores(adapter, objective):
    data = batch()
    expected = core(objective, data)
    loss, gradient = token_loss(adapter, objective, data)
    np.testing.assert_allclose(loss, expected.loss, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradient, expected.gradient, rtol=1e-12, atol=1e-12)
    assert (expected.gradient[data["mask"]] != 0.0).any()


@each_ratio_form
def test_analytic_gradient_is_the_derivative_of_the_value(adapter, objective):
    data = batch()
    np.testing.assert_allclose(
        core(objective, data).gradient, autodiff_of_value(adapter, objective, data), rtol=1e-11, atol=1e-11
    )


def test_score_form_is_not_the_derivative_of_its_value(adapter):
    # the stop-gradient of CISPO and GPPO lives in the weight only: an adapter that differentiated the value would be wrong
    data = batch()
    for objective in SCORE_FORMS:
        difference = core(objective, data).gradient - autodiff_of_value(adapter, objective, data)
        assert np.abs(difference).max() > 0.1


@each_kind
def test_cotangents_multiply_the_gradient(adapter, objective):
    data = batch()
    cotangent = np.random.default_rng(1).normal(size=data["log_prob"].shape)
    _, gradient = token_loss(adapter, objective, data, cotangent)
    np.testing.assert_allclose(gradient, cotangent * core(objective, data).gradient, rtol=1e-12, atol=1e-12)


@each_reduction
@each_kind
def test_policy_loss_and_gradient(adapter, objective, reduction):
    data = batch()
    token_weights = np.random.default_rng(1).uniform(0.1, 2.0, size=data["log_prob"].shape)
    expected = core(objective, data)
    per_token = factors(reduction, data["mask"])
    for weights, options in (
        (1.0, {}),
        (token_weights, {"token_weights": adapter.array(token_weights)}),
    ):
        loss, gradient = policy_loss(adapter, objective, data, reduction=reduction, **options)
        np.testing.assert_allclose(loss, (expected.loss * per_token * weights).sum(), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(gradient, expected.gradient * per_token * weights, rtol=1e-12, atol=1e-12)


def test_cotangent_of_the_scalar(adapter):
    data = batch()
    fixed = constants(adapter, data)

    def scaled(log_prob, factor):
        return factor * adapter.module.policy_loss(DRPO(delta=0.15), log_prob=log_prob, **fixed)[0]

    _, once = adapter.value_and_gradient(functools.partial(scaled, factor=1.0), data["log_prob"])
    _, thrice = adapter.value_and_gradient(functools.partial(scaled, factor=3.0), data["log_prob"])
    np.testing.assert_allclose(thrice, 3.0 * once, rtol=1e-15)


@each_kind
def test_masked_positions_may_hold_anything(adapter, objective):
    data = batch()
    weights = np.ones_like(data["log_prob"])
    clean_loss, clean_gradient = policy_loss(adapter, objective, data, token_weights=adapter.array(weights))
    rng = np.random.default_rng(1)

    def poisoned(array):
        return np.where(data["mask"], array, rng.choice(POISON, size=array.shape))

    bad = {name: array if name == "mask" else poisoned(array) for name, array in data.items()}
    bad_weights = adapter.array(poisoned(weights))
    loss, gradient = policy_loss(adapter, objective, bad, token_weights=bad_weights)
    assert loss == clean_loss
    np.testing.assert_array_equal(gradient, clean_gradient)
    assert (gradient[~data["mask"]] == 0.0).all()
    _, per_token = token_loss(adapter, objective, bad)
    assert (per_token[~data["mask"]] == 0.0).all()


@each_reduction
@each_kind
def test_fully_masked(adapter, objective, reduction):
    data = {name: np.full_like(array, math.nan) if name != "mask" else array & False for name, array in batch().items()}
    loss, gradient = policy_loss(adapter, objective, data, reduction=reduction)
    assert loss == 0.0
    assert (gradient == 0.0).all()


@each_reduction
@pytest.mark.parametrize("as_array", [False, True], ids=["number", "array"])
def test_micro_batches_with_the_global_normalizer_sum_to_the_batch(adapter, reduction, as_array):
    data = batch()
    objective = DRPO(delta=0.15)
    whole_loss, whole_gradient = policy_loss(adapter, objective, data, reduction=reduction)
    mask = data["mask"]
    count = mask.sum() if reduction is token_mean else mask.any(axis=-1).sum()
    normalizer = adapter.array(float(count)) if as_array else int(count)
    parts = [
        policy_loss(
            adapter,
            objective,
            {name: array[rows] for name, array in data.items()},
            reduction=reduction,
            normalizer=normalizer,
        )
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    np.testing.assert_allclose(sum(loss for loss, _ in parts), whole_loss, rtol=1e-13)
    np.testing.assert_allclose(np.concatenate([g for _, g in parts]), whole_gradient, rtol=1e-13)


@each_reduction
def test_packed_is_padded(adapter, reduction):
    data = batch()
    objective = DRPO(delta=0.15)
    padded_loss, padded_gradient = policy_loss(adapter, objective, data, reduction=reduction)
    rows, columns = data["mask"].shape
    ids = np.repeat(np.arange(rows) * 10 - 5, columns)
    keep = data["mask"].ravel() | (np.arange(rows * columns) % 3 == 0)  # some padding stays
    order = np.random.default_rng(2).permutation(np.flatnonzero(keep))
    packed = {name: array.ravel()[order] for name, array in data.items()}
    loss, gradient = policy_loss(adapter, objective, packed, reduction=reduction, segment_ids=adapter.array(ids[order]))
    np.testing.assert_allclose(loss, padded_loss, rtol=1e-13)
    np.testing.assert_allclose(gradient, padded_gradient.ravel()[order], rtol=1e-13)


@each_kind
def test_only_log_prob_is_differentiated(adapter, objective):
    data = batch()
    names = ("log_prob", *CONSTANTS)
    leaves = {name: data[name] for name in names} | {"token_weights": np.full_like(data["log_prob"], 0.5)}

    def loss(**arrays):
        return adapter.module.policy_loss(objective, mask=adapter.array(data["mask"]), **arrays)[0]

    gradients = adapter.gradients(loss, leaves)
    assert np.abs(gradients.pop("log_prob")).max() > 0.0
    for name, gradient in gradients.items():
        assert (gradient == 0.0).all(), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@each_kind
def test_low_precision_log_probs(adapter, objective, dtype):
    data = batch()
    low = getattr(adapter, dtype)
    rounded = {name: adapter.cast(a, low) for name, a in data.items() if name != "mask"}
    mask = adapter.array(data["mask"])

    def loss(log_prob):
        arrays = {name: a for name, a in rounded.items() if name != "log_prob"}
        return adapter.module.policy_loss(objective, log_prob=log_prob, mask=mask, **arrays)[0]

    if isinstance(adapter, TorchAdapter):
        x = rounded["log_prob"].clone().requires_grad_()
        value = loss(x)
        value.backward()
        gradient = x.grad
    else:
        value, gradient = jax.value_and_grad(loss)(rounded["log_prob"])
    assert value.dtype == adapter.float32
    assert gradient.dtype == low
    exact = {name: np.asarray(adapter.cast(a, adapter.float32), dtype=np.float64) for name, a in _widened(rounded).items()}
    expected = core(objective, exact | {"mask": data["mask"]}).gradient / data["mask"].sum()
    unit = 2.0**-11 if dtype == "float16" else 2.0**-8
    # the gradient is rounded twice to the input's precision; float16 is subnormal below 6e-5
    np.testing.assert_allclose(np.asarray(_widened({"g": gradient})["g"]), expected, rtol=3 * unit, atol=1e-7)


def _widened(arrays):
    return {
        name: np.asarray(a.float() if isinstance(a, torch.Tensor) else a.astype(jnp.float32)) for name, a in arrays.items()
    }


def test_float32_stays_float32(adapter):
    data = {name: array.astype(np.float32) if name != "mask" else array for name, array in batch().items()}
    loss, gradient = policy_loss(adapter, DRPO(delta=0.15), data)
    assert loss.dtype == gradient.dtype == np.float32
    assert loss.shape == ()


@each_kind
def test_diagnostics_are_the_cores(adapter, objective):
    data = batch()
    _, statistics = adapter.module.policy_loss(objective, log_prob=adapter.array(data["log_prob"]), **constants(adapter, data))
    arrays = {name: array for name, array in data.items() if name != "mask"}
    expected = token_diagnostics(objective, **arrays, mask=data["mask"])
    assert list(statistics) == list(expected)
    for name, parts in adapter.to_numpy(statistics).items():
        np.testing.assert_allclose(parts, expected[name], rtol=1e-12, err_msg=name)
    assert summarize(statistics) == pytest.approx(summarize(expected), rel=1e-12, nan_ok=True)


class Damped:
    """An objective of a user, without a trust region."""

    def loss(self, tokens):
        """−A log(1 + r)."""
        return -tokens.advantages * tokens.xp.log1p(tokens.ratio)

    def weight(self, tokens):
        """1/(1 + r)."""
        return 1.0 / (1.0 + tokens.ratio)


class Region(Damped):
    """With one."""

    def inside(self, tokens):
        """Where r < 2."""
        return tokens.ratio < 2.0


@pytest.mark.parametrize("objective", [Damped(), Region(), DRPO(delta=0.15)], ids=label)
def test_a_linear_reduction_and_an_objective_of_the_user(adapter, objective):
    data = batch()
    mask = data["mask"]
    rows = np.maximum(mask.sum(axis=-1, keepdims=True), 1)
    expected = core(objective, data)
    token_weights = np.random.default_rng(1).uniform(0.1, 2.0, size=mask.shape)

    def half_of_the_row_means(values, mask):
        return 0.5 * ((values * mask) / adapter.array(rows)).sum()

    for weights, options in ((1.0, {}), (token_weights, {"token_weights": adapter.array(token_weights)})):
        linear = adapter.module.linear_reduction(half_of_the_row_means)
        loss, gradient = policy_loss(adapter, objective, data, reduction=linear, **options)
        np.testing.assert_allclose(loss, (0.5 * weights * expected.loss * mask / rows).sum(), rtol=1e-12)
        np.testing.assert_allclose(gradient, 0.5 * weights * expected.gradient * mask / rows, rtol=1e-12)


def _squares(values, mask):
    return ((values * mask) ** 2).sum()


@pytest.mark.parametrize(
    "function",
    [
        _squares,
        lambda values, _: abs(values).sum(),
        lambda values, mask: ((values - 1.0) * mask).sum(),
        lambda values, mask: values * mask,
        lambda _, mask: 0.0 * mask.sum(),
        lambda *_: 0.0,
    ],
    ids=["squares", "abs", "affine", "per token", "constant", "number"],
)
def test_what_is_not_a_linear_reduction(adapter, function, request):
    """Of a value that is not linear in the losses, the coefficients are not those of its gradient."""
    if adapter.module.__name__ == "drpo_jax" and "constant" in request.node.name:
        pytest.skip("JAX transposes the function 0, which is linear; torch sees no graph, as of a detached one")
    with pytest.raises((TypeError, ValueError), match="reduction: expected a"):
        policy_loss(adapter, DRPO(delta=0.15), batch(), reduction=adapter.module.linear_reduction(function))


@pytest.mark.parametrize(
    "reduction",
    [_squares, np.mean, "token_mean", 3, functools.partial(_squares), object()],
    ids=lambda reduction: getattr(reduction, "__name__", type(reduction).__name__),
)
def test_an_unknown_reduction(adapter, reduction):
    with pytest.raises(TypeError, match=r"^reduction: expected token_mean, .* or a linear_reduction"):
        policy_loss(adapter, DRPO(delta=0.15), batch(), reduction=reduction)


@pytest.mark.parametrize("name", ["normalizer", "segment_ids"])
def test_a_linear_reduction_does_its_own_normalising(adapter, name):
    data = {key: array.ravel() for key, array in batch().items()}
    given = {"normalizer": 3.0, "segment_ids": adapter.array(np.zeros(data["mask"].shape, dtype=np.int32))}[name]
    linear = adapter.module.linear_reduction(lambda values, mask: (values * mask).sum())
    with pytest.raises(ValueError, match=f"^{name}: expected None"):
        policy_loss(adapter, DRPO(delta=0.15), data, reduction=linear, **{name: given})


@pytest.mark.parametrize("diagnostics", [False, True])
def test_diagnostics_that_were_not_asked_for_are_none(adapter, diagnostics):
    data = batch()
    given = {"log_prob": adapter.array(data["log_prob"]), **constants(adapter, data)}
    assert (adapter.module.policy_loss(DRPO(delta=0.15), **given, diagnostics=diagnostics)[1] is None) is not diagnostics


@pytest.mark.parametrize("objective", [DRPO, 3, None, object(), "DRPO"], ids=lambda wrong: type(wrong).__name__)
def test_what_is_no_objective(adapter, objective):
    with pytest.raises(TypeError, match=r"^objective: expected"):
        policy_loss(adapter, objective, batch())


def test_without_a_mask_every_token_counts(adapter):
    data = batch()
    data["mask"] = np.ones_like(data["mask"])
    fixed = {name: array for name, array in constants(adapter, data).items() if name != "mask"}
    value, gradient = adapter.value_and_gradient(
        lambda x: adapter.module.token_loss(SPO(eps=0.2), log_prob=x, **fixed).sum(), data["log_prob"]
    )
    expected = core(SPO(eps=0.2), data)
    np.testing.assert_allclose(value, expected.loss.sum(), rtol=1e-12)
    np.testing.assert_allclose(gradient, expected.gradient, rtol=1e-12)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 4)])
def test_any_shape(adapter, shape):
    data = batch((2, 3, 4))
    data = {name: np.resize(array.ravel(), shape) for name, array in data.items()}
    data["mask"] = np.ones_like(data["mask"])
    loss, gradient = policy_loss(adapter, DRPO(delta=0.15), data)
    assert gradient.shape == shape
    expected = core(DRPO(delta=0.15), data)
    np.testing.assert_allclose(loss, expected.loss.sum() / max(expected.loss.size, 1), rtol=1e-12)


def _integers(adapter):
    return adapter.array(np.ones((3, 5), dtype=np.int32))


@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [
        (
            "log_prob",
            lambda a: a.wrong_type,
            TypeError,
            r"log_prob: expected a (torch.Tensor|jax.Array), got (numpy.)?ndarray",
        ),
        (
            "advantages",
            lambda a: a.wrong_type,
            TypeError,
            r"advantages: expected a (torch.Tensor|jax.Array), got (numpy.)?ndarray",
        ),
        ("mask", lambda a: a.wrong_type, TypeError, r"mask: expected a (torch.Tensor|jax.Array), got (numpy.)?ndarray"),
        (
            "divergence",
            lambda a: a.wrong_type,
            TypeError,
            r"divergence: expected a (torch.Tensor|jax.Array), got (numpy.)?ndarray",
        ),
        (
            "token_weights",
            lambda a: a.wrong_type,
            TypeError,
            r"token_weights: expected a (torch.Tensor|jax.Array), got (numpy.)?nd",
        ),
        ("segment_ids", lambda _: [0, 1], TypeError, r"segment_ids: expected a (torch.Tensor|jax.Array), got list"),
        ("log_prob", lambda _: None, TypeError, r"log_prob: expected an array of real floating dtype, got NoneType"),
        ("log_prob", lambda _: -1.0, TypeError, r"log_prob: expected a (torch.Tensor|jax.Array), got float"),
        ("mask", lambda _: None, TypeError, r"mask: expected an array of bool dtype, got NoneType"),
        ("mask", _integers, TypeError, r"mask: expected a bool dtype, got (torch\.)?int32; pass `mask != 0`"),
        ("advantages", _integers, TypeError, r"advantages: expected a real floating dtype, got (torch\.)?int32"),
        (
            "advantages",
            lambda a: a.array(np.zeros(3)),
            ValueError,
            r"advantages: expected the shape of log_prob, \(3, 5\), got \(3,\); .* expand_advantages",
        ),
        (
            "behavior_log_prob",
            lambda a: a.array(np.zeros((3, 1))),
            ValueError,
            r"behavior_log_prob: expected the shape of log_prob, \(3, 5\), got \(3, 1\)",
        ),
        (
            "mask",
            lambda a: a.array(np.ones((3, 1), dtype=bool)),
            ValueError,
            r"mask: expected the shape of log_prob, \(3, 5\), got \(3, 1\)",
        ),
        (
            "token_weights",
            lambda a: a.array(np.ones(5)),
            ValueError,
            r"token_weights: expected the shape of \w+, \(3, 5\), got \(5,\)",
        ),
        (
            "segment_ids",
            _integers,
            ValueError,
            r"segment_ids: expected packed 1-D tokens, got shape \(3, 5\); padded rows need none",
        ),
        ("normalizer", lambda _: -1.0, ValueError, r"normalizer: expected a finite number, 0 or more, got -1.0"),
        ("normalizer", lambda a: a.array(np.ones(2)), ValueError, r"normalizer: expected a number or a 0-d array, got .*2"),
    ],
)
def test_errors_name_the_argument(adapter, name, wrong, error, message):
    arguments = {key: adapter.array(array) for key, array in batch((3, 5)).items()} | {name: wrong(adapter)}
    with pytest.raises(error, match=f"^{message}"):
        adapter.module.policy_loss(DRPO(delta=0.15), **arguments)


def test_square_batches_do_not_hide_a_sequence_advantage(adapter):
    arguments = {key: adapter.array(array) for key, array in batch((5, 5)).items()}
    with pytest.raises(ValueError, match=r"^advantages: expected the shape of log_prob, \(5, 5\), got \(5,\)"):
        adapter.module.token_loss(DRPO(delta=0.15), **arguments | {"advantages": adapter.array(np.zeros(5))})


def test_per_token_divergence_must_be_given(adapter):
    arguments = {key: adapter.array(array) for key, array in batch((3, 5)).items() if key != "divergence"}
    with pytest.raises(TypeError, match=r"divergence: expected an array, .* got None"):
        adapter.module.policy_loss(DPPO(delta=0.1, divergence="per_token"), **arguments)


def test_per_token_divergence_decides(adapter):
    data = batch()
    objective = DPPO(delta=0.1, divergence="per_token")
    _, kept = policy_loss(adapter, objective, data | {"divergence": np.full_like(data["divergence"], 0.1)})
    _, dropped = policy_loss(adapter, objective, data | {"divergence": np.full_like(data["divergence"], 0.1001)})
    _, surrogate = policy_loss(adapter, PolicyGradient(), data)
    diverging = data["advantages"] * (data["log_prob"] - data["behavior_log_prob"]) > 0.0
    np.testing.assert_array_equal(kept, surrogate)
    np.testing.assert_array_equal(dropped, np.where(diverging, 0.0, surrogate))


def test_the_adapters_have_the_same_names():
    assert drpo_torch.__all__ == drpo_jax.__all__
    assert {"policy_loss", "token_loss"} <= set(drpo_torch.__all__)


EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "one_step.py"


def test_example_agrees():
    finished = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=120, check=False)  # noqa: S603 -- our own file
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "largest difference of an updated parameter" in finished.stdout


def test_example_fails_on_a_disagreement(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("one_step", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch_step = example.torch_step

    def disagreeing(weights, data):
        return torch_step(weights, data | {"advantages": 1.01 * data["advantages"]})

    monkeypatch.setattr(example, "torch_step", disagreeing)
    assert example.main() == 1
    assert "tolerance" in capsys.readouterr().out


def largest_differences():
    """Rows of (objective, column → largest |difference| / max(1, |reference|)), reference: the core on NumPy."""
    data = batch((64, 128))
    for objective in ALL:
        reference = core(objective, data).gradient

        def analytic(backend, objective=objective):
            return backend.run(token_loss_and_gradient, objective, **data).gradient

        ways = {
            "torch": analytic(Backend.TORCH),
            "jax": analytic(Backend.JAX),
            "strict": analytic(Backend.STRICT),
            "drpo_torch": token_loss(ADAPTERS["torch"], objective, data)[1],
            "drpo_jax": token_loss(ADAPTERS["jax"], objective, data)[1],
        }
        if objective in RATIO_FORMS:
            ways["torch autograd"] = autodiff_of_value(ADAPTERS["torch"], objective, data)
            ways["jax.grad"] = autodiff_of_value(ADAPTERS["jax"], objective, data)
        scale = np.maximum(1.0, np.abs(reference))
        yield objective, {name: float((np.abs(gradient - reference) / scale).max()) for name, gradient in ways.items()}


def test_largest_differences():
    for objective, row in largest_differences():
        assert max(row.values()) < 2e-14, (objective, row)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)  # noqa: FBT003 -- JAX's signature
    columns = ("torch", "jax", "strict", "drpo_torch", "drpo_jax", "torch autograd", "jax.grad")
    print("largest |difference| / max(1, |g|) from the core's analytic gradient on NumPy, float64, 8192 tokens")  # noqa: T201
    print(f"{'':48}" + "".join(f"{name:>16}" for name in columns))  # noqa: T201
    for objective, row in largest_differences():
        print(f"{label(objective)[:47]:48}" + "".join(f"{row[c]:16.1e}" if c in row else f"{'–':>16}" for c in columns))  # noqa: T201
