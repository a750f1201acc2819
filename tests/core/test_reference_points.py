"""Every backend and dtype against exact values stored in data/reference_points.npz; see tests/reference_points.py.

Bounds are in machine epsilons of a result's scale: its own size; where it is a sum of terms, theirs; and (1 + |ℓ|) of
either, because the rounding of ℓ = log π − log μ moves e^ℓ by that. A mask is compared where the token is further from
the mask's boundary than float32 can resolve, and in float64 everywhere.
"""

import numpy as np
import pytest
import reference_points
from backends import Backend
from reference_points import DISTRIBUTION_DIVERGENCES, DIVERGENCES, OBJECTIVES

import drpo_core

SUMS = {"SPO", "DRPO", "MaskDRPO"}
EPSILONS = 4
KL_EPSILONS = 10
XLA_KL_EPSILONS = 512  # its float64 log1p is off by 120 epsilons between −0.45 and −0.37
TOP_K_EPSILONS = 8
RESOLUTION = 16  # epsilons, relative to the threshold
TOKENS = ("log_prob", "behavior_log_prob", "advantages")

each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


@pytest.fixture(scope="module", name="stored")
def stored_fixture():
    with np.load(reference_points.PATH) as arrays:
        return dict(arrays)


def inputs(stored, names, dtype):
    """Stored inputs in a dtype, each exactly."""
    return [stored[name].astype(dtype) for name in names]


def assert_within(got, expected, scale, dtype, epsilons=EPSILONS):
    assert got.dtype == dtype
    error = np.abs(got.astype(float) - expected)
    excess = error / (np.finfo(dtype).eps * np.where(scale > 0.0, scale, 1.0))
    assert excess.max() <= epsilons, (excess.argmax(), excess.max())


@each_dtype
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(backend, stored, name, dtype):
    kind, parameters = OBJECTIVES[name]
    objective = getattr(drpo_core, kind)(**parameters)
    x, b, a = inputs(stored, TOKENS, float)
    loss, gradient, weight, margin = stored[name].T
    sure = margin > RESOLUTION * np.finfo(dtype).eps
    assert sure.mean() > (0.95 if dtype == "float32" else 1.0 - 1e-9)

    result = backend.run(drpo_core.token_loss_and_gradient, objective, *inputs(stored, TOKENS, dtype))
    surrogate = np.abs(a) * np.exp(np.minimum(x - b, 20.0))
    for got, expected, term in zip(result, (loss, gradient, weight), (surrogate, surrogate, 1.0), strict=True):
        scale = (1.0 + np.abs(x - b)) * (np.abs(expected) + (term if kind in SUMS else 0.0))
        assert_within(got[sure], expected[sure], scale[sure], dtype)


@each_dtype
@pytest.mark.parametrize("name", DIVERGENCES)
def test_of_sampled_tokens(backend, stored, name, dtype):
    x, b = inputs(stored, TOKENS[:2], float)
    expected = stored["divergences"][:, DIVERGENCES.index(name)]
    got = backend.run(getattr(drpo_core, name), *inputs(stored, TOKENS[:2], dtype))
    condition = 1.0 + np.abs(x - b) if name in {"importance_ratio", "k3"} else 1.0
    epsilons = EPSILONS
    if name == "binary_kl":
        epsilons = XLA_KL_EPSILONS if dtype == "float64" and backend in {Backend.JAX, Backend.JAX_JIT} else KL_EPSILONS
    assert_within(got, expected, np.abs(expected) * condition, dtype, epsilons)


@each_dtype
@pytest.mark.parametrize("name", DISTRIBUTION_DIVERGENCES)
def test_of_distributions(backend, stored, name, dtype):
    x, b = inputs(stored, ("full_log_prob", "full_behavior_log_prob"), dtype)
    expected = stored["distribution_divergences"][:, DISTRIBUTION_DIVERGENCES.index(name)]
    if name.startswith("full"):
        arrays, named = (x, b), {}
    else:
        ids, sampled = stored["top_k_ids"], stored["sampled"][:, None]
        arrays = [np.take_along_axis(p, sampled, axis=-1)[:, 0] for p in (x, b)]
        tops = [np.take_along_axis(p, ids, axis=-1) for p in (x, b)]
        named = dict(zip(("top_k_log_prob", "top_k_behavior_log_prob"), tops, strict=True))
        named["sampled_in_top_k"] = (ids == sampled).any(axis=-1)
    got = backend.run(getattr(drpo_core, name), *arrays, **named)
    assert_within(got, expected, expected, dtype, TOP_K_EPSILONS)


def test_the_points_cover_what_they_should(stored):
    x, b, a = inputs(stored, TOKENS, float)
    ell = x - b
    assert len(x) == 304
    assert {array.dtype for array in (stored[name] for name in TOKENS)} == {np.dtype("float32")}
    assert min(np.abs(ell[ell != 0])) < 1e-5
    assert max(ell) > 45
    assert min(ell) < -45
    assert min(x) < -45
    assert max(x) > -1e-5
    assert (a == 0).sum() > 20
    for name in OBJECTIVES:
        margin, weight = stored[name][:, 3], stored[name][:, 2]
        assert np.isinf(margin).all() or (margin.min() < 1e-6 and 0.1 < (weight <= 0).mean() < 0.9), name


def test_regenerating_gives_the_stored_numbers(stored):
    rng = np.random.default_rng()
    tokens, rows = rng.choice(len(stored["log_prob"]), 20, replace=False), rng.choice(len(stored["sampled"]), 4, replace=False)
    for name, exact in reference_points.exact(stored, tokens, rows).items():
        np.testing.assert_array_equal(stored[name][rows if name.startswith("distribution") else tokens], exact, err_msg=name)
