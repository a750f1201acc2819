"""The compiled loops: that they are the plain formulas, whatever the objective, the number of threads and the values."""

import itertools
import re
import subprocess
import sys
from dataclasses import dataclass

import llvmlite.binding
import numpy as np
import pytest

from drpo_core import DPPO, DRPO, diagnostics, policy_loss_and_gradient, summarize, token_loss_and_gradient
from drpo_core import jit as compiler
from drpo_core.engines.numba_loop import fused
from drpo_core.engines.trace import UntraceableError

DELTA = DRPO(delta_low=0.3, delta_high=0.1)
KULLBACK_LEIBLER = DPPO(delta_low=0.02, delta_high=0.2, divergence="binary_kl", max_ratio=3.0)


def tokens(n, dtype, *, seed=0):
    rng = np.random.default_rng(seed)
    behavior = -rng.exponential(1.5, n)
    log_prob = np.minimum(behavior + rng.normal(0.0, 0.5, n), 0.0)
    mask = rng.random(n) > 0.2
    log_prob[~mask] = np.nan
    return (*(array.astype(dtype) for array in (log_prob, behavior, rng.normal(size=n))), mask)


def run(objective, arrays, *, coefficients=1.0, **options):
    gradient = np.full_like(arrays[0], np.nan)
    kernel = fused(objective, dtype=gradient.dtype)
    loss, statistics = kernel(*arrays, np.asarray(coefficients, gradient.dtype), gradient=gradient, **options)
    return loss, gradient, statistics


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("objective", [DELTA, KULLBACK_LEIBLER], ids=["DRPO", "DPPO"])
def test_more_than_one_block(objective, dtype):
    arrays = tokens(3 * compiler.BLOCK + 17, dtype)
    loss, gradient, statistics = run(objective, arrays)
    wide = [array if array.dtype == bool else array.astype(np.float64) for array in arrays]
    parts = token_loss_and_gradient(objective, *wide[:3], mask=wide[3])
    # 1e-6 relative in float32, except for what cancels: then of its terms
    tolerance = 8.0 * np.finfo(dtype).eps
    np.testing.assert_allclose(loss, parts.loss.sum(), rtol=tolerance)
    scale = np.abs(arrays[2]) * np.exp(np.where(arrays[3], wide[0] - wide[1], 0.0)) * (1.0 + np.abs(parts.weight))
    agree = np.abs(gradient - parts.gradient) <= tolerance * np.where(arrays[3], scale, 0.0)
    # a float32 token on the other side of a mask's edge
    assert agree.mean() > 1.0 - 1e-4
    figures, wanted = summarize(statistics), summarize(diagnostics(objective, *wide[:3], mask=wide[3]))
    for name, figure in figures.items():
        np.testing.assert_allclose(figure, wanted[name], rtol=1e-4 if dtype is np.float32 else 1e-12, err_msg=name)


def test_result_does_not_depend_on_the_number_of_threads():
    arrays = tokens(5 * compiler.TOKENS_PER_THREAD + 3, np.float32)
    results = [run(DELTA, arrays, threads=threads) for threads in (1, 2, 3, 5, None)]
    for (loss, gradient, statistics), (other, other_gradient, other_statistics) in itertools.pairwise(results):
        assert loss == other
        assert np.array_equal(gradient, other_gradient)
        assert statistics == other_statistics


def test_sizes_that_do_not_fit():
    log_prob, behavior, advantages, mask = tokens(6, np.float64)
    with pytest.raises(ValueError, match=r"expected arrays of one size, .* got \[6, 6, 6, 5, 6, 6\] and 1"):
        run(DELTA, (log_prob, behavior, advantages[:5], mask))
    with pytest.raises(ValueError, match=r"a multiple of that of coefficients, got .* and 4"):
        run(DELTA, (log_prob, behavior, advantages, mask), coefficients=np.ones(4))


def test_no_threads():
    with pytest.raises(ValueError, match="threads: expected 1 or more, got 0"):
        run(DELTA, tokens(5, np.float64), threads=0)


def test_threads_survive_a_fork():
    code = (
        "import os, signal, time, numpy as np\n"
        "from drpo_core.engines.threads import in_threads\n"
        "done = np.zeros(8)\n"
        "def run(first, last):\n"
        "    time.sleep(0.05)\n"  # or one thread of the pool would do for all, and a pool with room for another starts it
        "    done[first:last] += 1\n"
        "in_threads(run, 8, 3)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    signal.alarm(20)\n"
        "    in_threads(run, 8, 3)\n"
        "    os._exit(0 if (done == 2).all() else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)  # noqa: S603


@pytest.mark.parametrize("rows", [1, 3, 9, 9 * 1024])
def test_coefficients(rows):
    arrays = tokens(9 * 1024, np.float64)
    coefficients = np.random.default_rng(1).random(rows)
    loss, gradient, _ = run(DELTA, arrays, coefficients=coefficients)
    parts = token_loss_and_gradient(DELTA, *arrays[:3], mask=arrays[3])
    each = np.repeat(coefficients, 9 * 1024 // rows)
    np.testing.assert_allclose(loss, (each * parts.loss).sum(), rtol=1e-12)
    np.testing.assert_allclose(gradient, each * parts.gradient, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(dtype):
    # in float32 there is no e^−90: subnormal numbers are 0
    values = [-np.inf, -1e30, -200.0, -85.0, -20.5, -1.0, -1e-3, -1e-30, 0.0, np.inf, np.nan]
    grid = np.array(list(itertools.product(values, values, [-2.0, 0.0, 1.0, np.inf, np.nan])), dtype)
    arrays = (*np.ascontiguousarray(grid.T), np.ones(len(grid), dtype=bool))
    _, gradient, statistics = run(DELTA, arrays)
    with np.errstate(all="ignore"):
        parts = token_loss_and_gradient(DELTA, *arrays[:3])
        wanted = diagnostics(DELTA, *arrays[:3])
    np.testing.assert_allclose(gradient, parts.gradient, rtol=8.0 * np.finfo(dtype).eps, atol=0.0)
    for name, statistic in statistics.items():
        np.testing.assert_allclose(
            np.array(statistic), np.array(wanted[name]), rtol=1e-5 if dtype is np.float32 else 1e-12, err_msg=name
        )


def test_a_nan_weight_shows_in_the_extrema():
    objective = of_weight(lambda _, t: t.ratio_minus_one / t.ratio_minus_one)
    x, b = np.log(np.array([0.5, 0.2, 0.1])), np.log(np.array([0.5, 0.1, 0.1]))
    for mask in ([True, True, False], [False, True, False]):
        _, gradient, statistics = run(objective, (x, b, np.ones(3), np.array(mask)))
        assert np.isnan(gradient[0]) == mask[0]
        for name in ("weight_min", "weight_max", "weight_mean"):
            assert np.isnan(statistics[name][0]) == mask[0], name


@pytest.mark.parametrize("extremum", ["minimum", "maximum"])
def test_an_extremum_with_a_constant_passes_on_a_nan(extremum):
    # 0/0 on-policy, which is a NaN, and ±1 beside it
    objective = of_weight(lambda _, t: getattr(t.xp, extremum)(t.ratio_minus_one / t.xp.abs(t.ratio_minus_one), 0.5))
    x, b = np.log(np.array([0.5, 0.2, 0.1])), np.log(np.array([0.5, 0.1, 0.2]))
    _, gradient, _ = run(objective, (x, b, np.ones(3), np.ones(3, dtype=bool)))
    extreme = getattr(np, extremum)(np.array([np.nan, 1.0, -1.0]), 0.5)
    np.testing.assert_allclose(gradient, -np.exp(x - b) * extreme)


@dataclass(frozen=True)
class Damped:
    """A user's own: logarithms, powers, NumPy's functions, clip, minimum, extrema of two."""

    rate: float

    def loss(self, tokens):  # noqa: D102
        xp = tokens.xp
        return -tokens.advantages * (xp.log1p(tokens.ratio) + self.rate * xp.sqrt(xp.square(tokens.shift) + 1.0) ** 3)

    def weight(self, tokens):  # noqa: D102
        xp = tokens.xp
        bounded = xp.clip(tokens.log_ratio, -1.0, 1.0) - xp.minimum(tokens.ratio, np.float64(2.0)) / 3
        return 1 / (1 + tokens.ratio) + xp.tanh(bounded) * xp.sign(tokens.advantages) - np.exp(-xp.abs(bounded))

    def inside(self, tokens):  # noqa: D102
        return ~(tokens.xp.isnan(tokens.ratio) | (tokens.ratio > 2.0))


def test_an_objective_of_ones_own():
    arrays = tokens(500, np.float64)
    loss, gradient, statistics = run(Damped(0.5), arrays)
    parts = token_loss_and_gradient(Damped(0.5), *arrays[:3], mask=arrays[3])
    np.testing.assert_allclose(loss, parts.loss.sum(), rtol=1e-12)
    np.testing.assert_allclose(gradient, parts.gradient, rtol=1e-9, atol=1e-14)
    wanted = summarize(diagnostics(Damped(0.5), *arrays[:3], mask=arrays[3]))
    for name, figure in summarize(statistics).items():
        np.testing.assert_allclose(figure, wanted[name], rtol=1e-12, err_msg=name)


def of_weight(weight):
    return type("Own", (), {"loss": lambda _, t: t.ratio, "weight": weight, "inside": lambda _, t: t.ratio > 0.0})()


@pytest.mark.parametrize(
    ("weight", "operation"),
    [
        (lambda _, t: t.xp.cumulative_sum(t.ratio), "xp.cumulative_sum"),
        (lambda _, t: t.ratio if t.ratio > 1.0 else -t.ratio, "a Python condition"),
        (lambda _, t: t.ratio.mean(), "the array attribute mean"),
        (lambda _, t: t.ratio**0.5, "the power 0.5"),
        (lambda _, t: t.ratio * np.ones(3), "a ndarray among the operands"),
        (lambda _, t: np.arctan(t.ratio), "xp.arctan"),
        (lambda _, t: np.add.reduce(t.ratio), "numpy.add"),
    ],
)
def test_what_cannot_be_compiled_is_named(weight, operation):
    arrays = tokens(5, np.float64)
    with pytest.raises(UntraceableError, match=f"{operation}.* can't be compiled; engine='plain' runs any objective"):
        run(of_weight(weight), arrays)


def test_equal_objectives_share_a_kernel():
    arrays = tokens(5, np.float64)
    run(DRPO(delta_low=0.3, delta_high=0.1), arrays)
    misses = compiler._compiled.cache_info().misses  # noqa: SLF001
    run(DRPO(delta_low=0.3, delta_high=0.1), arrays)
    assert compiler._compiled.cache_info().misses == misses  # noqa: SLF001


def test_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "drpo_core.engines.numba_loop", None)
    log_prob, behavior, advantages, mask = tokens(5, np.float64)
    with pytest.raises(ImportError, match=r"engine: 'jit' needs numba: pip install 'drpo-core\[jit\]'"):
        policy_loss_and_gradient(DELTA, log_prob, behavior, advantages, mask=mask, engine="jit")


def test_numba_is_not_imported_before_it_is_needed():
    code = "import sys, drpo_core; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)  # noqa: S603


def test_vectors_are_as_wide_as_the_processor_has_them(monkeypatch):
    if not llvmlite.binding.get_host_cpu_features().get("avx512f"):
        pytest.skip("a processor without AVX-512")
    loops = []
    compile_loop = compiler._compile_loop  # noqa: SLF001 -- to look at the code that it makes
    monkeypatch.setattr(compiler, "_compile_loop", lambda *arguments: loops.append(compile_loop(*arguments)) or loops[0])
    objective = DRPO(delta=0.123)  # compiled by no other test
    run(objective, tokens(64, np.float32))
    (assembly,) = loops[0].inspect_asm().values()
    assert re.search(r"vdivps\t.*%zmm", assembly)
