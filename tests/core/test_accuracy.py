"""Error of the formulas against mpmath at 50 digits.

`python tests/core/test_accuracy.py` prints the maximum relative error of each function and dtype, in machine epsilons too.

Errors are of the functions, not of their inputs: the exact value is that of the given, already rounded, log-probs. Two
kinds of bound. Well-conditioned results (π − μ and the divergences) are bounded relatively. r, r − 1 and k3 inherit the
rounding of ℓ = log π − log μ, half an ulp of ℓ, so their relative error is bounded by a multiple of max(1, |ℓ|): the
condition number of e^ℓ.
"""

import itertools
import math
import warnings

import mpmath
import numpy as np
import pytest

from drpo_core import (
    binary_kl,
    binary_tv,
    full_kl,
    full_tv,
    importance_ratio,
    k1,
    k2,
    k3,
    log_ratio,
    probability_shift,
)
from drpo_core.tokens import Tokens

mpf = mpmath.mpf
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}
SAMPLES = 1500
RATIO_CAP = 20.0


def ratio_minus_one(log_prob, behavior):
    return Tokens.checked(log_prob, behavior, log_prob).ratio_minus_one


def exact_binary_kl(x, b):
    pi, mu = mpmath.exp(x), mpmath.exp(b)
    return mu * (b - x) + (1 - mu) * (mpmath.log1p(-mu) - mpmath.log1p(-pi))


# function: exact value of (log π, log μ), whether the error scales with max(1, |ℓ|), its bound in float32, and in float64
# in epsilons
FUNCTIONS = {
    "probability_shift": (probability_shift, lambda x, b: mpmath.exp(x) - mpmath.exp(b), False, 5e-7, 4),
    "importance_ratio": (importance_ratio, lambda x, b: mpmath.exp(x - b), True, 5e-7, 4),
    "ratio_minus_one": (ratio_minus_one, lambda x, b: mpmath.expm1(x - b), True, 5e-7, 4),
    "k3": (k3, lambda x, b: mpmath.expm1(x - b) - (x - b), True, 5e-7, 4),
    "binary_kl": (binary_kl, exact_binary_kl, False, 1e-6, 10),
}


def token_pairs(dtype):
    """|ℓ| from 1e-7 to 50, both signs, the larger log-prob from −1e-9 to −30 (float32 underflows at −87) or −100."""
    rng = np.random.default_rng(20260209)
    lowest = 30.0 if dtype == "float32" else 100.0
    larger = -(10.0 ** rng.uniform(-9, math.log10(lowest), SAMPLES))
    smaller = larger - 10.0 ** rng.uniform(-7, math.log10(50), SAMPLES)
    up = rng.random(SAMPLES) < 0.5
    log_prob, behavior = np.where(up, larger, smaller).astype(dtype), np.where(up, smaller, larger).astype(dtype)
    differ = log_prob != behavior  # rounding to float32 can make them equal
    return log_prob[differ], behavior[differ]


def relative_errors(name, dtype):
    """(relative error of each token, in the unit that is bounded; the tokens)."""
    function, exact, conditioned, *_ = FUNCTIONS[name]
    log_prob, behavior = token_pairs(dtype)
    if conditioned:  # saturation at e^20 is a definition, not an error
        usable = log_prob.astype(float) - behavior < RATIO_CAP
        log_prob, behavior = log_prob[usable], behavior[usable]
    errors = []
    with mpmath.workdps(50):
        for got, x, b in zip(function(log_prob, behavior), log_prob, behavior, strict=True):
            value = exact(mpf(float(x)), mpf(float(b)))
            assert got.dtype == dtype
            condition = max(1.0, abs(float(x) - float(b))) if conditioned else 1.0
            # below the normal range there are fewer digits to be right about
            absolute = float(np.finfo(dtype).smallest_normal) * EPS[dtype]
            errors.append(float(max(abs(mpf(float(got)) - value) - absolute, 0) / abs(value)) / condition)
    return np.array(errors), log_prob, behavior


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_within_its_bound(name, dtype):
    *_, single, epsilons = FUNCTIONS[name]
    errors, log_prob, behavior = relative_errors(name, dtype)
    worst = errors.argmax()
    bound = single if dtype == "float32" else epsilons * EPS["float64"]
    assert errors[worst] <= bound, (log_prob[worst], behavior[worst])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_binary_kl_beside_certainty(dtype):
    """Both policies nearly certain: 1 − π and 1 − μ are tiny, their logarithms large, the difference of those small.

    log(1 − π) − log(1 − μ) was wrong by 5e-6 in float32 here; log((1 − π)/(1 − μ)) is not.
    """
    rng = np.random.default_rng(7)
    log_prob = -(10.0 ** rng.uniform(-7, -2, SAMPLES))
    behavior = log_prob * 10.0 ** rng.uniform(-1, 1, SAMPLES)
    log_prob, behavior = log_prob.astype(dtype), behavior.astype(dtype)
    bound = 1e-6 if dtype == "float32" else 10 * EPS["float64"]
    with mpmath.workdps(50):
        for got, x, b in zip(binary_kl(log_prob, behavior), log_prob, behavior, strict=True):
            exact = exact_binary_kl(mpf(float(x)), mpf(float(b)))
            assert abs(mpf(float(got)) - exact) <= bound * exact, (x, b)


def test_binary_kl_at_every_distance_from_certainty():
    """Many pairs, where one formula of the rest's share hands over to the other: the figure that the documentation gives."""
    rng = np.random.default_rng(2)
    log_prob = -(10.0 ** rng.uniform(-7, 1, 20_000))
    behavior = (log_prob * 10.0 ** rng.uniform(-1, 1, 20_000)).astype("float32")
    log_prob = log_prob.astype("float32")
    with mpmath.workdps(40):
        for got, x, b in zip(binary_kl(log_prob, behavior), log_prob, behavior, strict=True):
            exact = exact_binary_kl(mpf(float(x)), mpf(float(b)))
            assert abs(mpf(float(got)) - exact) <= 1.2e-6 * exact, (x, b)


def test_the_plain_formulas_would_fail():
    """What this file can see: the textbook expressions miss the same bounds by orders of magnitude."""
    log_prob, behavior = token_pairs("float32")
    near = np.abs(log_prob - behavior) < 1e-3
    plain = {
        "shift": (np.exp(log_prob) - np.exp(behavior), probability_shift),
        "r − 1": (np.exp(log_prob - behavior) - 1, ratio_minus_one),
        "k3": (np.exp(log_prob - behavior) - 1 - (log_prob - behavior), k3),
    }
    for textbook, function in plain.values():
        ours = function(log_prob.astype(float), behavior.astype(float))
        assert (np.abs(textbook - ours) / np.abs(ours))[near].max() > 1e-3


def distributions(vocabulary, spread):
    """(log π, log μ, exact KL(μ‖π), exact TV) of two softmaxes whose logits differ by `spread`, at 50 digits."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, vocabulary)
    other = logits + rng.normal(0, spread, vocabulary)
    with mpmath.workdps(50):
        x, b = (log_softmax([mpf(float(z)) for z in row]) for row in (other, logits))
        return x, b, *exact_full(x, b)


def log_softmax(logits):
    normalizer = mpmath.log(mpmath.fsum(map(mpmath.exp, logits)))
    return [z - normalizer for z in logits]


def exact_full(x, b):
    """KL as Σ μ (e^ℓ − 1 − ℓ), which rounding the log-probs does not unbalance as it does Σ μ (−ℓ); and TV."""
    kl = mpmath.fsum(mpmath.exp(q) * (mpmath.expm1(p - q) - (p - q)) for p, q in zip(x, b, strict=True))
    tv = mpmath.fsum(abs(mpmath.exp(p) - mpmath.exp(q)) for p, q in zip(x, b, strict=True)) / 2
    return kl, tv


def full_errors(vocabulary, spread, dtype):
    """KL, then relative errors: (KL, TV) of the function, and (KL, TV) including the rounding of the log-probs."""
    x, b, true_kl, true_tv = distributions(vocabulary, spread)
    log_prob, behavior = (np.array([float(v) for v in row]).astype(dtype) for row in (x, b))
    with mpmath.workdps(50):
        given = exact_full([mpf(float(v)) for v in log_prob], [mpf(float(v)) for v in behavior])
        ours = [mpf(float(f(log_prob, behavior))) for f in (full_kl, full_tv)]
        of_function = [float(abs(o / e - 1)) for o, e in zip(ours, given, strict=True)]
        in_total = [float(abs(o / e - 1)) for o, e in zip(ours, (true_kl, true_tv), strict=True)]
    return float(true_kl), of_function, in_total


@pytest.mark.parametrize("spread", [5e-4, 1e-2, 1.0])
def test_full_divergences(spread):
    """Down to KL = 1e-7: 1e-4 in float32 with the log-probs' own rounding, 1e-6 without it."""
    kl, of_function, in_total = full_errors(2048, spread, "float32")
    assert kl > 1e-7
    assert max(of_function) <= 1e-6
    assert max(in_total) <= 1e-4
    _, of_function, in_total = full_errors(2048, spread, "float64")
    assert max(of_function) <= 16 * EPS["float64"]
    assert max(in_total) <= 1e-12


EXTREMES = (-math.inf, -1000.0, -100.0, -1.0, -1e-9, -1e-40, -5e-324, -0.0, 0.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_log_prob_up_to_0_gives_a_nan_an_overflow_or_a_warning(dtype):
    """Every pair of {impossible, finite, subnormal, certain}; NumPy's RuntimeWarnings are errors here."""
    log_prob, behavior = (
        np.array(column).astype(dtype) for column in zip(*itertools.product(EXTREMES, EXTREMES), strict=True)
    )
    with warnings.catch_warnings(), np.errstate(over="raise", divide="raise", invalid="raise"):
        warnings.simplefilter("error")
        finite = [importance_ratio, ratio_minus_one, probability_shift, binary_tv]
        for function in finite:
            assert np.isfinite(function(log_prob, behavior)).all(), function.__name__
        for function in (log_ratio, k1, k2, k3, binary_kl):  # infinite where π = 0 < μ
            assert not np.isnan(function(log_prob, behavior)).any(), function.__name__
        for function in (full_tv, full_kl):
            assert not np.isnan(function(log_prob[:, None], behavior[:, None])).any(), function.__name__
    assert (np.abs(probability_shift(log_prob, behavior)) <= 1.0).all()
    assert (binary_kl(log_prob, behavior) >= 0.0).all()
    impossible = (log_prob == -np.inf) & (behavior > -np.inf)
    seen = np.exp(behavior) > 0.0
    assert (binary_kl(log_prob, behavior)[impossible & seen] == np.inf).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_never_negative(dtype):
    """Bregman sums have no cancellation: not even rounding makes k3 or a KL negative."""
    log_prob, behavior = token_pairs(dtype)
    for function in (k3, binary_kl, full_kl, k2, binary_tv):
        assert (function(log_prob[:, None], behavior[:, None]) >= 0.0).all(), function.__name__


def table():
    """Rows of (function, dtype, maximum relative error, in epsilons)."""
    for name, dtype in itertools.product(FUNCTIONS, EPS):
        error = relative_errors(name, dtype)[0].max()
        yield name + (" / max(1, |ℓ|)" if FUNCTIONS[name][2] else ""), dtype, f"{error:.1e}", f"{error / EPS[dtype]:.1f}"
    for spread, dtype in itertools.product((5e-4, 1e-2, 1.0), EPS):
        kl, of_function, in_total = full_errors(2048, spread, dtype)
        for name, alone, total in zip(("full_kl", "full_tv"), of_function, in_total, strict=True):
            label = f"{name}, KL = {kl:.0e}"
            yield label, dtype, f"{alone:.1e}", f"{alone / EPS[dtype]:.1f}   ({total:.1e} with the log-probs' rounding)"


if __name__ == "__main__":
    for row in [("function", "dtype", "max rel. error", "epsilons"), *table()]:
        print("{:34s} {:8s} {:>14s}  {}".format(*row))  # noqa: T201 -- this is the table
