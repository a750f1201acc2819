"""e^x − 1 of array operations: within its stated error, at the ends of its range, and with a derivative everywhere."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch
from array_api_compat import array_namespace
from backends import Backend

from drpo_core import _series

BACKENDS = [b for b in Backend if b is not Backend.JAX]
EPSILONS = 2.5


def expm1(x):
    """For arrays of any namespace, with the terms of their dtype."""
    xp = array_namespace(x)
    return _series.expm1(x, double=x.dtype == xp.float64, xp=xp)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_within_its_bound(backend, dtype):
    """Across the hand-over at ±½, near 0 and far from it."""
    rng = np.random.default_rng(0)
    x = np.concatenate([
        rng.uniform(-1.0, 1.0, 800),
        rng.choice([-1.0, 1.0], 400) * 10.0 ** rng.uniform(-30.0, 0.0, 400),
        rng.uniform(-80.0, 80.0, 400),
        np.nextafter(0.5, [0.0, 1.0]),
        -np.nextafter(0.5, [0.0, 1.0]),
        [0.5, -0.5],
    ]).astype(dtype)  # fmt: skip
    found = backend.run(expm1, x)
    assert found.dtype == dtype
    with mpmath.workdps(50):
        exact = [mpmath.expm1(mpmath.mpf(float(value))) for value in x]
        errors = [abs(mpmath.mpf(float(got)) / value - 1) for got, value in zip(found, exact, strict=True)]
    assert float(max(errors)) <= EPSILONS * np.finfo(dtype).eps


def test_special_values(backend):
    x = np.array([0.0, -0.0, -math.inf, math.inf, math.nan, -800.0, 1e-320])
    with np.errstate(over="ignore"):
        found = backend.run(expm1, x)
    np.testing.assert_array_equal(found, [0.0, -0.0, -1.0, math.inf, math.nan, -1.0, found[6]])
    assert 0.0 <= found[6] <= 1e-320


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_it_has_a_derivative_everywhere(library):
    """The branch that is not taken must not send a NaN back, at −∞ for one."""
    x = [-math.inf, -100.0, -0.5, -0.25, -1e-12, 0.0, 1e-12, 0.25, 0.5, 30.0]
    if library == "torch":
        tensor = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        expm1(tensor).sum().backward()
        gradient = tensor.grad.numpy()
    else:
        gradient = jax.grad(lambda x: expm1(x).sum())(jnp.asarray(x))
    np.testing.assert_allclose(gradient, np.exp(x), rtol=1e-12)
