"""The compiled loops: that they are the plain formulas, whatever the objective, the number of threads and the values."""

import itertools
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import NamedTuple

import array_api_compat.numpy
import llvmlite.binding
import numpy as np
import pytest

from drpo_core import (
    DPPO,
    DRPO,
    PPOClip,
    UntraceableError,
    policy_loss_and_gradient,
    summarize,
    token_diagnostics,
    token_loss_and_gradient,
)
from drpo_core.engines import numba_loop, recording
from drpo_core.loss import policy_pass
from drpo_core.objectives import OBJECTIVES, VacuousTrustRegionWarning
from drpo_core.tokens import Tokens

ENGINES = ["arrays", "auto", "compiled"]
each_engine = pytest.mark.parametrize("engine", ENGINES)

DELTA = DRPO(delta_low=0.3, delta_high=0.1)
KULLBACK_LEIBLER = DPPO(delta_low=0.02, delta_high=0.2, divergence="binary_kl", max_ratio=3.0)


def tokens(n, dtype, *, seed=0):
    rng = np.random.default_rng(seed)
    behavior = -rng.exponential(1.5, n)
    # not 0, which as a rounded number means more in float32 than in float64
    log_prob = np.minimum(behavior + rng.normal(0.0, 0.5, n), -1e-6)
    mask = rng.random(n) > 0.2
    log_prob[~mask] = np.nan
    return (*(array.astype(dtype) for array in (log_prob, behavior, rng.normal(size=n))), mask)


def run(objective, arrays, *, coefficients=1.0, divergence=None, diagnostics=True, **options):
    gradient = np.full_like(arrays[0], np.nan)
    given = (*arrays, np.asarray(coefficients, gradient.dtype).reshape(-1), divergence)
    loss, statistics = numba_loop.run(policy_pass, objective, given, gradient, diagnostics=diagnostics, **options)
    return loss, gradient, statistics


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("objective", [DELTA, KULLBACK_LEIBLER], ids=["DRPO", "DPPO"])
def test_more_than_one_block(objective, dtype):
    arrays = tokens(3 * numba_loop.BLOCK + 17, dtype)
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
    figures, wanted = summarize(statistics), summarize(token_diagnostics(objective, *wide[:3], mask=wide[3]))
    for name, figure in figures.items():
        np.testing.assert_allclose(figure, wanted[name], rtol=1e-4 if dtype is np.float32 else 1e-12, err_msg=name)


def test_result_does_not_depend_on_the_number_of_threads():
    arrays = tokens(5 * numba_loop.TOKENS_PER_THREAD + 3, np.float32)
    results = [run(DELTA, arrays, threads=threads) for threads in (1, 2, 3, 5, None)]
    for (loss, gradient, statistics), (other, other_gradient, other_statistics) in itertools.pairwise(results):
        assert loss == other
        assert np.array_equal(gradient, other_gradient)
        assert statistics == other_statistics


def test_sizes_that_do_not_fit():
    """Nothing is read beyond an array, whoever calls the loop."""
    log_prob, behavior, advantages, mask = tokens(6, np.float64)
    with pytest.raises(ValueError, match=r"^expected arrays of 6 tokens .*, got \{.*'advantages': 5, .*\} and 1$"):
        run(DELTA, (log_prob, behavior, advantages[:5], mask))
    with pytest.raises(ValueError, match=r"got \{.*'divergence': 7\} and 1$"):
        run(DELTA, (log_prob, behavior, advantages, mask), divergence=np.ones(7))
    for size in (0, 4, 5, 7, 12):
        with pytest.raises(ValueError, match=rf"coefficients of a divisor of that, got .* and {size}$"):
            run(DELTA, (log_prob, behavior, advantages, mask), coefficients=np.ones(size))


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
        wanted = token_diagnostics(DELTA, *arrays[:3])
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
    wanted = summarize(token_diagnostics(Damped(0.5), *arrays[:3], mask=arrays[3]))
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
    with pytest.raises(UntraceableError, match=f"{operation}.* can't be compiled; engine='arrays' runs any objective"):
        run(of_weight(weight), arrays)


def assert_current(objective, *, seed=0, engine="compiled", rtol=1e-12):
    """What the engine gives is what the objective's methods give now; returns the gradient."""
    log_prob, behavior, advantages, mask = tokens(7, np.float64, seed=seed)
    wanted = token_loss_and_gradient(objective, log_prob, behavior, advantages, mask=mask)
    result = policy_loss_and_gradient(objective, log_prob, behavior, advantages, mask=mask, engine=engine)
    count = mask.sum()
    np.testing.assert_allclose(result.loss, wanted.loss.sum() / count, rtol=rtol, atol=1e-15)
    np.testing.assert_allclose(result.gradient, wanted.gradient / count, rtol=rtol, atol=1e-15)
    figures = summarize(token_diagnostics(objective, log_prob, behavior, advantages, mask=mask))
    for name, figure in summarize(result.diagnostics).items():
        np.testing.assert_allclose(figure, figures[name], rtol=1e-11, atol=1e-14, err_msg=name)
    return result.gradient


def compiled_during(function):
    before = numba_loop.compilations()
    function()
    return numba_loop.compilations() - before


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VacuousTrustRegionWarning)
        return make()


def test_a_schedule_of_a_thousand_thresholds_compiles_once():
    schedule = [0.101 + 0.0037 * step for step in range(1000)]
    arrays = tokens(5, np.float64)
    assert compiled_during(lambda: [quietly(lambda d=d: run(DRPO(delta=d), arrays)) for d in schedule]) <= 1
    for delta in schedule[::250]:
        quietly(lambda delta=delta: assert_current(DRPO(delta=delta)))
    # an own loop for two thresholds, which again has any two
    pairs = zip(schedule, reversed(schedule), strict=True)
    objectives = [quietly(lambda low=low, high=high: DRPO(delta_low=low, delta_high=high)) for low, high in pairs]
    assert compiled_during(lambda: [run(objective, arrays) for objective in objectives]) <= 1
    assert_current(objectives[3])


def numeric_fields(kind):
    return [field.name for field in fields(kind) if "float" in str(field.type)]


def schedules():
    """For every numeric field of every family, objectives that differ in its value alone."""
    for family in OBJECTIVES:
        for name in numeric_fields(family.objective):
            base = dict(family.fixed)
            if family.threshold is not None and not name.startswith(family.threshold):
                base[family.threshold] = 2.0 if family.threshold == "max_ratio" else 0.3
            low, high = f"{family.threshold}_low", f"{family.threshold}_high"
            if name in {low, high}:
                base |= {low: 0.3, high: 0.4}
            values = [1.1 + 0.2 * step if name in {"dual_clip", "max_ratio"} else 0.05 + 0.11 * step for step in range(4)]
            yield pytest.param([(family.objective, base | {name: value}) for value in values], id=f"{family.name}-{name}")


@pytest.mark.usefixtures("interpreted_loops")
@pytest.mark.parametrize("schedule", list(schedules()))
def test_every_number_of_every_objective_is_an_argument_of_its_loop(schedule):
    made = [quietly(lambda kind=kind, given=given: kind(**given)) for kind, given in schedule]
    assert compiled_during(lambda: [assert_current(objective) for objective in made]) <= 1


def test_what_is_no_threshold_is_not_an_argument():
    """Another divergence, or a number where there was none, is another formula."""
    for objective in (
        DPPO(delta=0.1),
        DPPO(delta=0.1, divergence="binary_kl"),
        DPPO(delta=0.1, max_ratio=1.5),
        PPOClip(eps=0.2),
        PPOClip(eps=0.2, dual_clip=1.2),
        PPOClip(eps_low=0.2, eps_high=0.2),
        PPOClip(eps_low=0.1, eps_high=0.5),
    ):
        assert_current(objective)


class Plain:
    """An ordinary class: its numbers and everything else may be set anew at any time."""

    def __init__(self, **attributes):
        """Of any names."""
        vars(self).update(attributes)

    def factor(self, tokens):  # noqa: ARG002
        """What loss and weight are multiplied with."""
        return self.rate

    def loss(self, tokens):
        """−A r f."""
        return -tokens.advantages * tokens.ratio * self.factor(tokens)

    def weight(self, tokens):
        """The factor f."""
        return tokens.xp.ones_like(tokens.ratio) * self.factor(tokens)


class TupleA(NamedTuple):
    """Equal to a TupleB of the same number, as tuples are."""

    rate: float = 0.1

    def loss(self, t):
        """−A r f."""
        return -t.advantages * t.ratio * self.rate

    def weight(self, t):
        """The factor f."""
        return t.xp.ones_like(t.ratio) * self.rate


class TupleB(TupleA):
    """100 times the other."""

    def loss(self, t):
        """−100 A r f."""
        return 100.0 * TupleA.loss(self, t)

    def weight(self, t):
        """100 f."""
        return 100.0 * TupleA.weight(self, t)


class AllEqual(Plain):
    """Equal to anything, with one hash for all."""

    def __eq__(self, other):
        """Always."""
        return True

    def __hash__(self):
        """One."""
        return 1


class Doubled(AllEqual):
    """Twice the factor."""

    def factor(self, tokens):
        """2 f."""
        return 2.0 * AllEqual.factor(self, tokens)


class Slots:
    """Without a dict, and no dataclass."""

    __slots__ = ("rate",)
    loss, weight, factor = Plain.loss, Plain.weight, Plain.factor

    def __init__(self, rate):
        """Of one number."""
        self.rate = rate


@dataclass
class Mutable:
    """A dataclass that can be set."""

    rate: float
    power: int = 1
    kind: str = "times"
    steps: tuple = ()
    loss, weight = Plain.loss, Plain.weight

    def factor(self, tokens):
        """Of all that it keeps."""
        base = self.rate * tokens.ratio**self.power
        for step in self.steps:
            base = base + step
        return base if self.kind == "times" else 1.0 / base


@dataclass(frozen=True)
class Frozen:
    """A frozen one, whose class can still be changed."""

    rate: float = 1.0
    loss, weight, factor = Plain.loss, Plain.weight, Plain.factor


class OfDRPO(DRPO):
    """A subclass of one of the library's, with another weight."""

    __slots__ = ()

    def weight(self, tokens):
        """Half."""
        return 0.5 * DRPO.weight(self, tokens)


@pytest.mark.usefixtures("interpreted_loops")
@each_engine
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TupleA(), TupleB()),
        (TupleA(0.1), TupleA(0.2)),
        (AllEqual(rate=1.0), AllEqual(rate=3.0)),
        (AllEqual(rate=1.0), Doubled(rate=1.0)),
        (DRPO(delta=0.2), OfDRPO(delta=0.2)),
        (Slots(1.0), Slots(3.0)),
        (Frozen(1.0), Frozen(2.0)),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_equal_objectives_that_are_not_the_same(one, other, engine):
    """A program was found by equality, and run for another objective (fault 01)."""
    gradients = [assert_current(objective, engine=engine) for objective in (one, other, one)]
    assert not np.array_equal(gradients[0], gradients[1])
    np.testing.assert_array_equal(gradients[0], gradients[2])


FACTOR = 1.0
TABLE = {"rate": 1.0}


@dataclass
class WithDefault:
    """A dataclass with an attribute of the class that is no field, which an instance may set."""

    rate: float = 1.0
    scale = 1.0
    loss, weight = Plain.loss, Plain.weight

    def factor(self, tokens):
        """Of both."""
        return self.rate * self.scale * tokens.ratio


class TupleWithDict(TupleA):
    """A named tuple with a dict, and an attribute that the class has too."""

    scale = 1.0

    def loss(self, t):
        """Scaled."""
        return self.scale * TupleA.loss(self, t)

    def weight(self, t):
        """Scaled."""
        return self.scale * TupleA.weight(self, t)


class OneSlot:
    """Whose slots are one text."""

    __slots__ = "rate"  # noqa: PLC0205 -- that is the point
    loss, weight, factor, __init__ = Plain.loss, Plain.weight, Plain.factor, Slots.__init__


class SlotsAndDict:
    """With both; a copy that shared the dict would change the original."""

    __slots__ = ("__dict__", "rate")
    loss, weight = Plain.loss, Plain.weight

    def __init__(self, rate):
        """Of one number, and another in the dict."""
        self.rate, self.scale = rate, 1.0

    def factor(self, tokens):
        """Of both."""
        return self.rate * self.scale * tokens.ratio


class Base:
    """With a slot of its own."""

    __slots__ = ("scale",)


class Derived(Base):
    """And one more."""

    __slots__ = ("rate",)
    loss, weight, factor = Plain.loss, Plain.weight, SlotsAndDict.factor

    def __init__(self):
        """Of two numbers."""
        self.rate = self.scale = 1.0


def a_closure():
    cell = [1.0]
    objective = SimpleNamespace(
        loss=lambda t: -t.advantages * t.ratio * cell[0], weight=lambda t: t.xp.ones_like(t.ratio) * cell[0]
    )
    return objective, lambda value: cell.__setitem__(0, value)


def of_global(objective):
    objective.factor = lambda tokens: FACTOR * tokens.ratio
    return objective, lambda value: globals().__setitem__("FACTOR", value)


def of_table(objective):
    objective.factor = lambda tokens: TABLE["rate"] * tokens.ratio
    return objective, lambda value: TABLE.__setitem__("rate", value)


def of_attribute(objective, name, convert=float):
    return objective, lambda value: setattr(objective, name, convert(value))


def of_class(kind, *arguments, **attributes):
    """A class made for one test, whose method is set."""
    own = type("Own", (kind,), {})
    change = lambda value: setattr(own, "factor", lambda _, tokens: value * tokens.ratio)
    change(1.0)
    return own(*arguments, **attributes), change


def of_method(objective):
    change = lambda value: setattr(objective, "factor", lambda tokens: value * tokens.ratio)
    change(1.0)
    return objective, change


def of_nested():
    inner = SimpleNamespace(rate=1.0)
    objective = Plain(inner=inner)
    objective.factor = lambda tokens: inner.rate * tokens.ratio
    return objective, lambda value: setattr(inner, "rate", value)


CHANGES = {
    "a float of an object": lambda: of_attribute(Plain(rate=1.0), "rate"),
    "NumPy's float of an object": lambda: of_attribute(Plain(rate=np.float64(1.0)), "rate", np.float32),
    "an int of an object": lambda: of_attribute(Plain(rate=1), "rate", int),
    "a float that becomes an int": lambda: of_attribute(Plain(rate=1.0), "rate", int),
    "a bool of an object": lambda: of_attribute(Plain(rate=True), "rate", lambda value: value == 1),
    "a float of a dataclass": lambda: of_attribute(Mutable(1.0), "rate"),
    "an int of a dataclass": lambda: of_attribute(Mutable(1.0, power=1), "power", int),
    "a text of a dataclass": lambda: of_attribute(Mutable(2.0), "kind", lambda value: "times" if value == 1 else "over"),
    "a tuple of a dataclass": lambda: of_attribute(Mutable(1.0), "steps", lambda value: (0.5,) * int(value)),
    "a float in slots": lambda: of_attribute(Slots(1.0), "rate"),
    "a float of what it keeps": of_nested,
    "an attribute that the class of a dataclass has too": lambda: of_attribute(WithDefault(), "scale"),
    "an attribute of a named tuple": lambda: of_attribute(TupleWithDict(), "scale"),
    "the only slot": lambda: of_attribute(OneSlot(1.0), "rate"),
    "a slot beside a dict": lambda: of_attribute(SlotsAndDict(1.0), "rate"),
    "an attribute beside a slot": lambda: of_attribute(SlotsAndDict(1.0), "scale"),
    "a slot of a base": lambda: of_attribute(Derived(), "scale"),
    "a global": lambda: of_global(Plain()),
    "a value of a global dict": lambda: of_table(Plain()),
    "a closure": a_closure,
    "a method of the object": lambda: of_method(Plain()),
    "a method of the class": lambda: of_class(Plain),
    "a method of a frozen dataclass's class": lambda: of_class(Frozen, 1.0),
}


@pytest.mark.usefixtures("interpreted_loops")
@each_engine
@pytest.mark.parametrize("change", CHANGES)
def test_an_objective_is_what_it_is_now(change, engine):
    """An attribute that was annealed, a method that was edited: the compiled loop kept the first (faults 02 and 03)."""
    objective, set_to = CHANGES[change]()
    if change == "a bool of an object":
        objective.factor = lambda tokens: tokens.xp.where(tokens.ratio > 1.0, 2.0 if objective.rate else 3.0, tokens.ratio)
    gradients = []
    for value in (1, 3, 2, 1):
        set_to(value)
        before = dict(getattr(objective, "__dict__", {}))
        gradients.append(assert_current(objective, engine=engine))
        assert before == getattr(objective, "__dict__", {})
    np.testing.assert_array_equal(gradients[0], gradients[3])
    assert not np.array_equal(gradients[0], gradients[1])


def test_a_method_of_the_library_that_is_replaced(monkeypatch):
    before = assert_current(DELTA)
    original = DRPO.weight
    monkeypatch.setattr(DRPO, "weight", lambda self, tokens: 2.0 * original(self, tokens))
    np.testing.assert_allclose(assert_current(DELTA), 2.0 * before, rtol=1e-12)
    monkeypatch.undo()
    np.testing.assert_array_equal(assert_current(DELTA), before)


def test_a_schedule_of_ones_own_objective_compiles_once():
    schedule = [Mutable(0.1 + 0.01 * step, power=3) for step in range(50)]
    assert compiled_during(lambda: [assert_current(objective) for objective in schedule]) <= 1
    one = Mutable(0.1, power=3)

    def anneal():
        for step in range(50):
            one.rate = 1.0 / (step + 1)
            assert_current(one)

    assert compiled_during(anneal) == 0


def test_numbers_that_are_arguments_however_an_object_keeps_them():
    schedule = [0.05 + 0.1 * step for step in range(5)]
    for made in (
        [TupleA(value) for value in schedule],
        [Slots(value) for value in schedule],
        [Plain(rate=np.float64(value)) for value in schedule],
        [Plain(rate=np.float32(value)) for value in schedule],
        [Frozen(value) for value in schedule],
    ):
        assert compiled_during(lambda made=made: [assert_current(objective) for objective in made]) <= 1


def test_a_number_whose_value_a_method_needs_is_compiled_for_each():
    class Branches(Plain):
        """A different formula above a half."""

        def factor(self, tokens):
            """Python's own condition on the number."""
            return tokens.ratio if self.rate > 0.5 else 2.0 * tokens.ratio

    for rate in (0.4, 0.6, 0.45, 0.7):
        assert_current(Branches(rate=rate))


def test_an_object_that_cannot_be_copied_without_its_constructor():
    class Pair(tuple):  # noqa: SLOT001 -- it has a dict
        """A tuple with a dict."""

        loss, weight, factor = Plain.loss, Plain.weight, Plain.factor

    for rate in (1.0, 3.0):
        objective = Pair((1, 2))
        objective.rate = rate
        assert_current(objective)


def test_more_programs_than_are_kept(monkeypatch):
    monkeypatch.setattr(recording, "MOST_PROGRAMS", 2)
    recording._programs.clear()  # noqa: SLF001 -- those of other tests
    for objective in (DELTA, Plain(rate=1.0), Plain(rate=1), Mutable(1.0), DELTA, Plain(rate=2.0)):
        assert_current(objective)
        assert len(recording._programs) <= 2  # noqa: SLF001


def test_many_objectives_in_many_threads(monkeypatch):
    """With room for three programs only, so that threads drop each other's."""
    monkeypatch.setattr(recording, "MOST_PROGRAMS", 3)
    objectives = [quietly(lambda f=f: f.make(f.typical[0] if f.typical else None)) for f in OBJECTIVES[::3]] + [Mutable(0.5)]
    expected = [assert_current(objective) for objective in objectives]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(assert_current, objectives * 6))
    for gradient, wanted in zip(found, expected * 6, strict=True):
        np.testing.assert_array_equal(gradient, wanted)


@pytest.mark.parametrize("diagnostics", [False, True])
@pytest.mark.parametrize("measured", [False, True])
def test_a_divergence_and_diagnostics_are_of_their_own_loops(measured, diagnostics):
    arrays = tokens(40, np.float64)
    divergence = np.abs(arrays[2]) if measured else None
    objective = DPPO(delta=0.5, divergence="per_token") if measured else DPPO(delta=0.1)
    loss, gradient, statistics = run(objective, arrays, divergence=divergence, diagnostics=diagnostics)
    wanted = token_loss_and_gradient(objective, *arrays[:3], mask=arrays[3], divergence=divergence)
    np.testing.assert_allclose(loss, wanted.loss.sum(), rtol=1e-12)
    np.testing.assert_allclose(gradient, wanted.gradient, rtol=1e-12)
    assert (statistics is not None) == diagnostics


SPECIAL = (0.0, -0.0, 1.0, -2.5, 1e-45, -1e-45, np.inf, -np.inf, np.nan)
EXPRESSIONS = {
    "select": lambda xp, x, tokens: xp.where(x > tokens.advantages, x, tokens.advantages),
    "select, or 0": lambda xp, x, tokens: xp.where(x == tokens.advantages, x, 0.0),
    "0, or select": lambda xp, x, tokens: xp.where(x == tokens.advantages, 0.0, x),
    "0, or select, not equal": lambda xp, x, tokens: xp.where(x != tokens.advantages, 0.0, x),
    "0, or select, less": lambda xp, x, tokens: xp.where(x < tokens.advantages, 0.0, x),
    "constant, or select": lambda xp, x, tokens: xp.where(x <= tokens.advantages, 0.25, x),
    "flip": lambda xp, x, tokens: xp.where(tokens.advantages >= 0.0, -x, x),
    "not equal": lambda xp, x, tokens: xp.where(~(x == tokens.advantages), 1.0, xp.full_like(x, 2.0)),
    "not unequal": lambda xp, x, tokens: xp.where(~(x != tokens.advantages), 1.0, xp.full_like(x, 2.0)),
    "not less": lambda xp, x, tokens: xp.where(~(x < tokens.advantages), 1.0, xp.full_like(x, 2.0)),
    "difference of cleared": lambda xp, x, tokens: (
        xp.where(tokens.advantages > 0.0, 0.0, x) - xp.where(tokens.advantages > 0.0, 0.0, tokens.advantages)
    ),
    "difference of what is cleared elsewhere": lambda xp, x, tokens: (
        xp.where(tokens.advantages > 0.0, 0.0, x) - xp.where(x > 0.0, 0.0, tokens.advantages)
    ),
    "used by two steps in a row": lambda _, x, tokens: (x + 1.0) * tokens.advantages - (x + 1.0),
    "at most": lambda xp, x, _: xp.where(x > 0.5, 0.5, x),
    "at least": lambda xp, x, _: xp.where(x < 0.5, 0.5, x),
    "minimum": lambda xp, x, tokens: xp.minimum(x, tokens.advantages),
    "maximum": lambda xp, x, tokens: xp.maximum(x, tokens.advantages),
    "minimum of a constant": lambda xp, x, _: xp.minimum(x, xp.full_like(x, -1.0)),
    "maximum of a constant": lambda xp, x, _: xp.maximum(x, xp.full_like(x, -1.0)),
    "and": lambda xp, x, tokens: xp.where((x > 0.0) & (tokens.advantages > 0.0), 1.0, xp.full_like(x, 2.0)),
    "or, not": lambda xp, x, tokens: xp.where((x > 0.0) | ~(tokens.advantages > 0.0), 1.0, xp.full_like(x, 2.0)),
    "classes": lambda xp, x, tokens: xp.where(
        xp.isnan(x), 1.0, xp.where(xp.isfinite(x), 2.0, xp.where(xp.isinf(tokens.advantages), 4.0, xp.full_like(x, 3.0)))
    ),
    "along": lambda xp, x, tokens: tokens.along_advantage(xp.where(xp.isfinite(x), x, 3.0)),
    "sign": lambda xp, x, _: xp.where(x == x, xp.sign(xp.where(x == x, x, 0.0)), x),
    "clip": lambda xp, x, _: xp.clip(x, -1.0, 0.5),
}


class Expression:
    """An objective whose loss is any function of log π, A and what is made of them."""

    def __init__(self, function):
        """Of the namespace, log π and the tokens."""
        self.function = function

    def loss(self, tokens):
        """The function."""
        return self.function(tokens.xp, tokens.log_prob, tokens)

    def weight(self, tokens):
        """1."""
        return tokens.xp.ones_like(tokens.ratio)


@pytest.mark.parametrize(("expression", "dtype"), list(zip(EXPRESSIONS, itertools.cycle(["float32", "float64"]))))
def test_every_pair_of_special_values(expression, dtype):
    """Each pair as a batch of one token, whose loss it is: as NumPy computes the expression, NaN for NaN."""
    objective, one = Expression(EXPRESSIONS[expression]), np.ones(1, bool)
    for x, a in itertools.product(np.array(SPECIAL, dtype), repeat=2):
        log_prob, behavior, advantages = (np.array([value], dtype) for value in (x, -1.0, a))
        with np.errstate(all="ignore"):
            checked = Tokens.of(log_prob, behavior, advantages, dtype=log_prob.dtype, xp=array_api_compat.numpy)
            expected = objective.loss(checked)
        found, _, _ = run(objective, (log_prob, behavior, advantages, one), diagnostics=False)
        np.testing.assert_array_equal(found, np.asarray(expected, dtype)[0], err_msg=f"x = {x}, A = {a}")


def test_numba_is_not_imported_before_it_is_needed():
    code = "import sys, drpo_core; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)  # noqa: S603


def test_vectors_are_as_wide_as_the_processor_has_them(monkeypatch):
    if not llvmlite.binding.get_host_cpu_features().get("avx512f"):
        pytest.skip("a processor without AVX-512")
    loops = []
    compile_loop = numba_loop._compile.__wrapped__  # noqa: SLF001 -- to look at the code that it makes
    monkeypatch.setattr(numba_loop, "_compile", lambda *arguments: loops.append(compile_loop(*arguments)) or loops[0])
    monkeypatch.setattr(recording, "_programs", {})
    run(DRPO(delta=0.123), tokens(64, np.float32))
    (assembly,) = loops[0].inspect_asm().values()
    assert re.search(r"vdivps\t.*%zmm", assembly)
