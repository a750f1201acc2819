"""`policy_loss_and_gradient` against its parts: token losses, reductions and diagnostics, each computed on its own."""

import tracemalloc
from functools import partial

import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    PolicyGradient,
    PPOClip,
    diagnostics,
    numpy_operations,
    policy_loss_and_gradient,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    summarize,
    token_loss_and_gradient,
    token_mean,
)
from drpo_core.reduction import reduction_coefficients
from drpo_core.testing import from_function, parametrize_with_checks

DELTA = DRPO(delta_low=0.3, delta_high=0.1)
OBJECTIVES = [
    PolicyGradient(max_ratio=2.0),
    PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
    CISPO(max_ratio=5.0),
    SPO(eps=0.2),
    DPPO(delta_low=0.02, delta_high=0.2, divergence="binary_kl", max_ratio=3.0),
    DELTA,
    MaskDRPO(delta_low=0.1, delta_high=0.3),
]
ENGINES = ["plain", "jit"]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """So that few tokens make many pieces, some of several rows and some of a part of one."""
    monkeypatch.setattr(numpy_operations, "PIECE", 5)


def tokens(shape, *, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    behavior = -rng.exponential(1.5, shape)
    log_prob = np.minimum(behavior + rng.normal(0.0, 0.5, shape), 0.0)
    mask = rng.random(shape) > 0.2
    log_prob[~mask] = np.nan
    return {
        "log_prob": log_prob.astype(dtype),
        "behavior_log_prob": behavior.astype(dtype),
        "advantages": (rng.normal(size=shape) * (rng.random(shape) > 0.1)).astype(dtype),
        "mask": mask,
    }


def expected(objective, batch, *, reduction=token_mean, divergence=None, **options):
    parts = token_loss_and_gradient(objective, **batch, divergence=divergence)
    coefficients = reduction_coefficients(reduction, batch["mask"], dtype=parts.loss.dtype, **options)
    gradient = np.where(batch["mask"], coefficients * parts.gradient, 0.0)
    return reduction(parts.loss, batch["mask"], **options), gradient, diagnostics(objective, **batch, divergence=divergence)


def assert_same(result, reference, *, rtol=1e-12):
    loss, gradient, statistics = reference
    np.testing.assert_allclose(result.loss, loss, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(result.gradient, gradient, rtol=rtol, atol=0.0)
    got, wanted = summarize(result.diagnostics), summarize(statistics)
    assert list(got) == list(wanted)
    for name, statistic in result.diagnostics.items():
        assert type(statistic) is type(statistics[name])
        np.testing.assert_allclose(got[name], wanted[name], rtol=rtol, atol=1e-15, err_msg=name)
        np.testing.assert_allclose(statistic.count, statistics[name].count, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_objectives(objective, engine):
    batch = tokens((4, 9))
    assert_same(policy_loss_and_gradient(objective, **batch, engine=engine), expected(objective, batch))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(3, 4), (2, 13), (1, 6), (6, 1), (2, 3, 4), (7,)])
@pytest.mark.parametrize(
    "reduction",
    [token_mean, sequence_mean_token_mean, partial(sequence_mean_token_sum, horizon=3.0)],
    ids=["token_mean", "mean_of_means", "mean_of_sums"],
)
@pytest.mark.parametrize("option", ["none", "normalizer", "token_weights"])
def test_reductions(option, reduction, shape, engine):
    batch = tokens(shape)
    options = {"normalizer": 7.0} if option == "normalizer" else {}
    if option == "token_weights":
        options["token_weights"] = np.where(batch["mask"], np.random.default_rng(1).random(shape), np.nan)
    result = policy_loss_and_gradient(DELTA, **batch, reduction=reduction, **options, engine=engine)
    assert_same(result, expected(DELTA, batch, reduction=reduction, **options))


@pytest.mark.parametrize("engine", ENGINES)
def test_packed(engine):
    batch, ids = tokens((17,)), np.array([3, 3, 3, 1, 1, 1, 1, 1, 9, 9, 9, 9, 9, 9, 9, 0, 0])
    options = {"reduction": sequence_mean_token_mean, "segment_ids": ids}
    result = policy_loss_and_gradient(DELTA, **batch, **options, engine=engine)
    assert_same(result, expected(DELTA, batch, **options))


@pytest.mark.parametrize("engine", ENGINES)
def test_measured_divergence(engine):
    objective, batch = DPPO(delta=0.1, divergence="per_token"), tokens((4, 9))
    batch_divergence = np.random.default_rng(1).random((4, 9)) * 0.2
    result = policy_loss_and_gradient(objective, **batch, divergence=batch_divergence, engine=engine)
    assert_same(result, expected(objective, batch, divergence=batch_divergence))
    with pytest.raises(TypeError, match="divergence: expected an array"):
        policy_loss_and_gradient(objective, **batch, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
@pytest.mark.parametrize("reduction", [token_mean, sequence_mean_token_mean])
def test_no_tokens(reduction, shape, engine):
    result = policy_loss_and_gradient(DELTA, **tokens(shape), reduction=reduction, engine=engine)
    assert result.loss == 0.0
    assert result.gradient.shape == shape
    assert result.diagnostics["ratio_max"].value == -np.inf
    assert all(statistic.count == 0.0 for statistic in result.diagnostics.values())


@pytest.mark.parametrize("engine", ENGINES)
def test_fully_masked(engine):
    batch = tokens((2, 9))
    batch["mask"][:] = False
    result = policy_loss_and_gradient(DELTA, **batch, engine=engine)
    assert result.loss == 0.0
    assert (result.gradient == 0.0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_strided_and_read_only_arrays(engine):
    batch = tokens((9, 4))
    turned = {name: np.asfortranarray(array) for name, array in batch.items()}
    for array in turned.values():
        array.flags.writeable = False
    assert_same(policy_loss_and_gradient(DELTA, **turned, engine=engine), expected(DELTA, batch))
    every_other = {name: np.repeat(array, 2, axis=-1)[:, ::2] for name, array in batch.items()}
    assert_same(policy_loss_and_gradient(DELTA, **every_other, engine=engine), expected(DELTA, batch))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_gradient_has_the_dtype_of_log_prob(dtype, engine):
    batch = tokens((4, 9), dtype=dtype)
    result = policy_loss_and_gradient(DELTA, **batch, engine=engine)
    assert result.loss.dtype == np.float32
    assert result.gradient.dtype == dtype
    widened = {name: array if name == "mask" else array.astype(np.float64) for name, array in batch.items()}
    _, gradient, _ = expected(DELTA, widened)
    np.testing.assert_allclose(result.gradient, gradient, rtol=2.0 * np.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_mixed_dtypes(engine):
    batch = tokens((4, 9), dtype=np.float32)
    batch["advantages"] = batch["advantages"].astype(np.float64)
    result = policy_loss_and_gradient(DELTA, **batch, engine=engine)
    assert (result.loss.dtype, result.gradient.dtype) == (np.float64, np.float32)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_diagnostics(engine):
    batch = tokens((4, 9))
    result = policy_loss_and_gradient(DELTA, **batch, diagnostics=False, engine=engine)
    assert result.diagnostics is None
    loss, gradient, _ = expected(DELTA, batch)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-12)
    np.testing.assert_allclose(result.gradient, gradient, rtol=1e-12)


@pytest.mark.parametrize("asarray", [array_api_strict.asarray, torch.from_numpy, jnp.asarray])
def test_other_namespaces(asarray):
    batch = tokens((4, 9), dtype=np.float32)
    result = policy_loss_and_gradient(DELTA, **{name: asarray(array) for name, array in batch.items()})
    loss, gradient, _ = expected(DELTA, batch)
    np.testing.assert_allclose(float(result.loss), loss, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(result.gradient), gradient, rtol=1e-5, atol=1e-8)
    assert summarize(result.diagnostics)["dropped_fraction"] == 0.0


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_is_the_gradient_and_a_piece(monkeypatch, engine):
    monkeypatch.setattr(numpy_operations, "PIECE", 1 << 12)
    batch = tokens((64, 1 << 12), dtype=np.float32)
    policy_loss_and_gradient(DELTA, **batch, engine=engine)
    tracemalloc.start()
    try:
        result = policy_loss_and_gradient(DELTA, **batch, engine=engine)
        peak = tracemalloc.get_traced_memory()[1] - result.gradient.nbytes
    finally:
        tracemalloc.stop()
    # a piece's registers of 16 KiB, some 25 with diagnostics; an array of all tokens has 1 MiB
    assert peak < (1 << 19 if engine == "plain" else 1 << 17)


def test_unknown_reduction():
    batch = tokens((2, 3))
    with pytest.raises(TypeError, match=r"reduction: expected token_mean, .* got <function .*lambda"):
        policy_loss_and_gradient(DELTA, **batch, reduction=lambda values, mask, **_: (values * mask).sum())


def test_unknown_engine():
    with pytest.raises(ValueError, match="engine: expected 'plain' or 'jit', got 'numba'"):
        policy_loss_and_gradient(DELTA, **tokens((2, 3)), engine="numba")


def test_jit_of_other_arrays():
    batch = {name: torch.from_numpy(array) for name, array in tokens((2, 3)).items()}
    with pytest.raises(ValueError, match=r"engine: 'jit' compiles for NumPy arrays, got torch\.Tensor"):
        policy_loss_and_gradient(DELTA, **batch, engine="jit")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": np.ones((2, 3))}, TypeError, "mask: expected a bool dtype"),
        ({"advantages": np.ones(2)}, ValueError, "advantages: expected the shape of log_prob"),
        ({"log_prob": np.ones((2, 3), dtype=int)}, TypeError, "log_prob: expected a real floating dtype"),
        ({"normalizer": -1.0}, ValueError, "normalizer: expected a finite number"),
    ],
)
def test_invalid_arguments(change, error, message, engine):
    with pytest.raises(error, match=message):
        policy_loss_and_gradient(DELTA, **tokens((2, 3)) | change, engine=engine)


def under_test(objective, engine, reduction="token_mean", **claims):
    reductions = {"token_mean": token_mean, "sequence_mean_token_mean": sequence_mean_token_mean}

    def loss_and_gradient(log_prob, behavior_log_prob, advantages, mask, segment_ids=None, normalizer=None):
        # with diagnostics, so that the other tests' kernels serve here
        return policy_loss_and_gradient(
            objective,
            log_prob,
            behavior_log_prob,
            advantages,
            mask=mask,
            segment_ids=segment_ids,
            normalizer=normalizer,
            reduction=reductions[reduction],
            engine=engine,
        )[:2]

    return from_function(
        loss_and_gradient,
        returns_gradient=True,
        objective=objective,
        form="score" if isinstance(objective, CISPO) else "ratio",
        reduction=reduction,
        name=f"{engine}-{type(objective).__name__}-{reduction}",
        **claims,
    )


# every dtype is compiled anew: both for one objective
IMPLEMENTATIONS = [
    *(under_test(objective, "jit", dtypes=("float64",)) for objective in OBJECTIVES if objective is not DELTA),
    under_test(DELTA, "jit"),
    under_test(DELTA, "jit", "sequence_mean_token_mean", dtypes=("float64",)),
    under_test(DELTA, "plain", "sequence_mean_token_mean"),
]


@parametrize_with_checks(IMPLEMENTATIONS, settings="ci")
def test_kit(check):
    check()
