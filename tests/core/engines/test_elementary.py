"""The compiled exp, expm1, log and log1p against mpmath, at special values, and as vector code."""

import itertools
import re

import mpmath
import numba
import numpy as np
import pytest

from drpo_core.engines.elementary import functions

DTYPES = [np.float32, np.float64]
ULP = {"exp": 1.0, "expm1": 2.0, "log": 1.0, "log1p": 1.5}


def compiled(name, dtype):
    function = getattr(functions(np.dtype(dtype)), name)

    @numba.njit
    def loop(x, result):
        for i in range(x.shape[0]):
            result[i] = function(x[i])

    def call(x):
        result = np.empty_like(x)
        loop(x, result)
        return result

    call.loop = loop
    return call


def arguments(name, dtype):
    rng = np.random.default_rng(0)
    largest = float(np.log(np.finfo(dtype).max))
    tiny = rng.normal(size=500) * 10.0 ** rng.uniform(-30.0, 0.0, 500)
    if name.startswith("exp"):
        # to the subnormal results, which are 0, and to half of the largest number, which is inf
        inner = rng.uniform(float(np.log(np.finfo(dtype).tiny)), largest - 0.7, 1000)
        return np.concatenate([inner, rng.uniform(-1.0, 1.0, 1000), tiny]).astype(dtype)
    x = np.concatenate([np.exp(rng.uniform(-1.1, 0.99, 1000) * largest), rng.uniform(0.5, 2.0, 1000), 1.0 + 0.1 * tiny])
    return (np.concatenate([x - 1.0, 0.1 * tiny]) if name == "log1p" else x).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ULP)
def test_error_in_units_of_the_last_place(name, dtype):
    x = arguments(name, dtype)
    if name.startswith("log"):
        x = x[x > (-1.0 if name == "log1p" else 0.0)]
    exact = {"log1p": lambda v: mpmath.log(1 + v)}.get(name, getattr(mpmath, name, None))
    with mpmath.workprec(300):
        for argument, result in zip(x.tolist(), compiled(name, dtype)(x).tolist(), strict=True):
            value = exact(mpmath.mpf(argument))
            last_place = mpmath.mpf(float(np.spacing(np.abs(dtype(float(value))))))
            assert abs(mpmath.mpf(result) - value) <= ULP[name] * last_place, argument


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ULP)
def test_special_values(name, dtype):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, -2.0, 1e30, -1e30, np.finfo(dtype).smallest_subnormal], dtype)
    with np.errstate(all="ignore"):
        expected = getattr(np, name)(x)
    np.testing.assert_allclose(compiled(name, dtype)(x), expected, rtol=4.0 * np.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponentials_beyond_their_range(dtype):
    tiny, most = (float(np.log(x)) for x in (np.finfo(dtype).tiny, np.finfo(dtype).max))
    x = np.array([tiny - 0.36, tiny - 50.0, most - 0.69, most + 50.0], dtype)
    assert compiled("exp", dtype)(x).tolist() == [0.0, 0.0, np.inf, np.inf]
    assert compiled("expm1", dtype)(x).tolist() == [-1.0, -1.0, np.inf, np.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_decay_is_exp_of_what_is_not_positive(dtype):
    x = -np.abs(np.append(arguments("exp", dtype), [0.0, np.inf, np.nan, 1e30]).astype(dtype))
    np.testing.assert_array_equal(compiled("decay", dtype)(x), compiled("exp", dtype)(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ordered_integers_are_in_the_order_of_floats(dtype):
    ordered, unordered = functions(np.dtype(dtype)).ordered, functions(np.dtype(dtype)).unordered
    tiny, most = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    negative_nan = np.copysign(dtype(np.nan), dtype(-1.0))
    x = np.array([-np.inf, -most, -1.0, -tiny, 0.0, tiny, 1.0, most, np.inf, np.nan, negative_nan], dtype)
    *integers, nan, other_nan = (ordered(value) for value in x)
    assert all(low < high for low, high in itertools.pairwise([*integers, nan]))
    assert nan == other_nan
    back = numba.njit(lambda value: unordered(ordered(value)))
    np.testing.assert_array_equal(np.array([back(value) for value in x], dtype), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ULP)
def test_loops_are_vectorised(name, dtype):
    loop = compiled(name, dtype)
    loop(np.ones(4, dtype))
    (assembly,) = loop.loop.inspect_asm().values()
    suffix = "s" if dtype is np.float32 else "d"
    if not re.search(rf"\tv?mulp{suffix}|\tv?muls{suffix}|\tv?fn?m\w+[ps]{suffix}", assembly):
        pytest.skip("not an x86 processor")
    assert re.search(rf"\tv?mulp{suffix}\t|\tv?fn?madd\d+p{suffix}\t", assembly)
