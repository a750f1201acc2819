"""What is compiled for one objective is never run for another, and costs one compilation whatever the thresholds."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from contract import names
from contract.arrays import exact, flatten
from contract.axes import Engine, Given, Library, Masked
from contract.calls import call_of
from contract.places import base_cell
from contract.reasons import refusals
from contract.subjects import SUBJECTS, axes_of, function_of, parameters_of

import drpo_core

SLOPE = 1.0


class Steep(NamedTuple):
    """An immutable, hashable objective, as one writes it; equal to any other tuple of the same numbers."""

    k: float = 2.0

    def loss(self, tokens):
        return -self.k * tokens.advantages * tokens.ratio

    def weight(self, tokens):
        return self.k * tokens.xp.ones_like(tokens.ratio)

    def inside(self, tokens):
        return tokens.ratio == tokens.ratio


class Steeper(Steep):
    """Equal to `Steep` of the same number, and another objective."""

    def loss(self, tokens):
        return -100 * self.k * tokens.advantages * tokens.ratio

    def weight(self, tokens):
        return 100 * self.k * tokens.xp.ones_like(tokens.ratio)


class Annealed:
    """An ordinary class whose threshold changes in training."""

    def __init__(self, k):
        self.k = k

    def loss(self, tokens):
        return -self.k * tokens.advantages * tokens.ratio

    def weight(self, tokens):
        return self.k * tokens.xp.ones_like(tokens.ratio)

    def inside(self, tokens):
        return tokens.ratio == tokens.ratio


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What the docs call hashable, and is edited all the same."""

    k: float = 1.0

    def loss(self, tokens):
        return -self.k * tokens.advantages * tokens.ratio

    def weight(self, tokens):
        return self.k * tokens.xp.ones_like(tokens.ratio)

    def inside(self, tokens):
        return tokens.ratio == tokens.ratio


class Global:
    """Reads a global of its module."""

    def loss(self, tokens):
        return -SLOPE * tokens.advantages * tokens.ratio

    def weight(self, tokens):
        return SLOPE * tokens.xp.ones_like(tokens.ratio)

    def inside(self, tokens):
        return tokens.ratio == tokens.ratio


class Relative:
    """Not elementwise: a weight relative to the batch."""

    def loss(self, tokens):
        return -tokens.advantages * tokens.ratio

    def weight(self, tokens):
        return tokens.ratio / tokens.xp.sum(tokens.ratio)

    def inside(self, tokens):
        return tokens.ratio == tokens.ratio


class Branching:
    """Looks at values, which no trace can."""

    def loss(self, tokens):
        return -tokens.advantages * tokens.ratio

    def weight(self, tokens):
        big = tokens.ratio > 1.0
        return tokens.xp.where(big, 0.5, 1.0) if bool(tokens.xp.any(big)) else tokens.xp.ones_like(tokens.ratio)

    def inside(self, tokens):
        return tokens.ratio == tokens.ratio


class Returns:
    """A weight that is no floating array of the tokens."""

    def __init__(self, weight):
        self._weight = weight

    def loss(self, tokens):
        return -tokens.advantages * tokens.ratio

    def weight(self, tokens):
        return self._weight(tokens)

    def inside(self, tokens):
        return tokens.ratio == tokens.ratio


# --- every function that takes an objective, in every engine ---------------------------------------------------------------

RUNS = [
    (subject, engine)
    for subject in SUBJECTS
    # a weight that is the same for all outcomes needs no centring, whose term is 0 then
    if "objective" in parameters_of(subject) and SUBJECTS[subject].call is None and "score_centering" not in subject
    for engine in axes_of(subject).get("engine", (Engine.AUTO,))
]
IDS = [f"{subject} {engine.value}" for subject, engine in RUNS]


def run_of(subject, engine, spoilt=False):
    """A function of objectives: the loss and the gradient it gives, or the error."""
    cell = base_cell(subject, masked=Masked.SOME)
    if "engine" in cell:
        cell["engine"] = engine
    if cell["mask"] is Given.ABSENT:
        cell["mask"] = axes_of(subject)["mask"][-1]
    call = call_of(subject, cell, spoilt=spoilt)
    options = {"engine": engine.value} if "engine" in cell else {}
    assert not refusals(subject, cell)

    def run(objective):
        arrays = dict(call.arrays)
        wanted = [name for name in SUBJECTS[subject].differentiated if name in arrays]
        if cell["library"] is Library.TORCH:
            arrays |= {name: arrays[name].clone().requires_grad_() for name in wanted}
        result = function_of(subject)(objective, **arrays, **options)
        outputs = flatten(result, SUBJECTS[subject].results)
        found = {path: exact(a) for path, a in outputs.items()}
        if cell["library"] is Library.TORCH and wanted:
            loss = sum(o.sum() for o in outputs.values() if o.requires_grad)
            found |= {
                f"gradient of {n}": exact(g) for n, g in zip(wanted, torch.autograd.grad(loss, [arrays[n] for n in wanted]))
            }
        return found

    return run


def scaled(found, factor):
    """What a loss with `factor` times the weight gives: of what is linear in it."""
    return {
        path: array * factor
        for path, array in found.items()
        if path in {"", "loss", "gradient", "weight"} or "gradient of" in path
    }


def assert_same(found, want):
    for path, array in want.items():
        np.testing.assert_allclose(found[path], array, rtol=1e-4, atol=1e-9, err_msg=path)


@pytest.mark.parametrize(("subject", "engine"), RUNS, ids=IDS)
def test_equal_objectives_of_two_classes_are_two_objectives(subject, engine, ledger):
    run = run_of(subject, engine)
    assert Steep() == Steeper()
    assert hash(Steep()) == hash(Steeper())
    first = run(Steep())
    assert_same(run(Steeper()), scaled(first, 100.0))
    assert_same(run(Steep()), scaled(first, 1.0))
    ledger(Counter(held=2))


@pytest.mark.parametrize(("subject", "engine"), RUNS, ids=IDS)
def test_numbers_that_compare_equal_are_the_same_number(subject, engine, ledger):
    run = run_of(subject, engine)
    first = run(Steep(1.0))
    for number in (1, True, np.float32(1.0), np.float64(1.0)):
        assert_same(run(Steep(number)), scaled(first, 1.0))
    ledger(Counter(held=4))


@pytest.mark.parametrize(("subject", "engine"), RUNS, ids=IDS)
def test_an_attribute_that_changes_between_calls_is_seen(subject, engine, ledger):
    run, objective = run_of(subject, engine), Annealed(1.0)
    first = run(objective)
    objective.k = 10.0
    assert_same(run(objective), scaled(first, 10.0))
    objective.loss = lambda tokens: -3.0 * tokens.advantages * tokens.ratio
    objective.weight = lambda tokens: 3.0 * tokens.xp.ones_like(tokens.ratio)
    assert_same(run(objective), scaled(first, 3.0))
    ledger(Counter(held=2))


@pytest.mark.parametrize(("subject", "engine"), RUNS, ids=IDS)
def test_a_method_that_changes_between_calls_is_seen(subject, engine, monkeypatch, ledger):
    run = run_of(subject, engine)
    first = run(Frozen())
    monkeypatch.setattr(Frozen, "loss", lambda _, tokens: -100.0 * tokens.advantages * tokens.ratio)
    monkeypatch.setattr(Frozen, "weight", lambda _, tokens: 100.0 * tokens.xp.ones_like(tokens.ratio))
    assert_same(run(Frozen()), scaled(first, 100.0))
    ledger(Counter(held=1))


@pytest.mark.parametrize(("subject", "engine"), RUNS, ids=IDS)
def test_a_global_that_changes_between_calls_is_seen(subject, engine, monkeypatch, ledger):
    run = run_of(subject, engine)
    first = run(Global())
    monkeypatch.setitem(globals(), "SLOPE", 7.0)
    assert_same(run(Global()), scaled(first, 7.0))
    ledger(Counter(held=1))


def of_core(subject, objective):
    """What token_loss_and_gradient gives for the tokens of a token-scale function, reduced by token_mean."""
    call = call_of(subject, base_cell(subject, masked=Masked.SOME, mask=axes_of(subject)["mask"][-1]))
    arrays = {name: exact(array) for name, array in call.arrays.items()}
    result = drpo_core.token_loss_and_gradient(
        objective, arrays["log_prob"], arrays["behavior_log_prob"], arrays["advantages"], mask=arrays["mask"]
    )
    count = arrays["mask"].sum() if "reduction" in parameters_of(subject) else 1
    return {"loss": result.loss.sum() / count, "gradient": result.gradient / count}


TOKEN_RUNS = [run for run in RUNS if "log_prob" in parameters_of(run[0]) and run[0].rpartition(".")[2] != "token_diagnostics"]


@pytest.mark.parametrize("spoilt", [False, True], ids=["", "junk at masked positions"])
@pytest.mark.parametrize("objective", [Relative(), Branching()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize(("subject", "engine"), TOKEN_RUNS, ids=[f"{s} {e.value}" for s, e in TOKEN_RUNS])
def test_an_objective_that_looks_across_tokens_works_or_is_refused(subject, engine, objective, spoilt, ledger):
    if isinstance(objective, Branching) and "jax" in subject:
        pytest.skip("JAX traces: a value that decides is its own clear error")
    ledger(Counter(held=1))
    want = of_core(subject, objective)
    try:
        found = run_of(subject, engine, spoilt)(objective)
    except names.UntraceableError:
        assert engine is Engine.COMPILED
        return
    for path, key in (("gradient of log_prob", "gradient"), ("gradient", "gradient")):
        if path in found:
            np.testing.assert_allclose(found[path], want[key], rtol=1e-4, atol=1e-9)


WEIGHTS = {
    "a number": lambda tokens: 1.0,
    "a boolean array": lambda tokens: tokens.ratio < 1.5,
    "None": lambda tokens: None,
    "an array of another shape": lambda tokens: tokens.xp.sum(tokens.ratio),
}


@pytest.mark.parametrize("word", WEIGHTS)
@pytest.mark.parametrize(("subject", "engine"), RUNS, ids=IDS)
def test_a_weight_that_is_no_array_of_the_tokens_works_or_is_refused_by_name(subject, engine, word, ledger):
    """The same in every engine: what the arrays give, or an error that says what the objective returned."""
    ledger(Counter(held=1))
    objective = Returns(WEIGHTS[word])
    want = {
        "a number": lambda tokens: tokens.xp.ones_like(tokens.ratio),
        "a boolean array": lambda tokens: tokens.xp.where(tokens.ratio < 1.5, tokens.xp.ones_like(tokens.ratio), 0.0),
    }.get(word)
    run = run_of(subject, engine)
    try:
        found = run(objective)
    except names.UntraceableError:
        return  # says what it can't compile
    except (TypeError, ValueError) as error:
        assert "weight" in str(error), f"{type(error).__name__}: {error}"
        return
    assert want is not None, "a result"
    assert_same(found, scaled(run(Returns(want)), 1.0))


# --- compilations ----------------------------------------------------------------------------------------------------------


def schedule():
    """A thousand values of δ, some with two thresholds."""
    return [drpo_core.DRPO(delta=0.1 + 0.0005 * i) for i in range(990)] + [
        drpo_core.DRPO(delta_low=0.1 + 0.01 * i, delta_high=0.3) for i in range(10)
    ]


def test_a_schedule_of_thresholds_compiles_once(ledger):
    rng = np.random.default_rng(0)
    x = -rng.random(8).astype(np.float32)
    arrays, mask = (x, x - 0.1, x + 1.0), np.ones(8, dtype=bool)
    drpo_core.policy_loss_and_gradient(drpo_core.DRPO(delta=0.05), *arrays, mask=mask, engine="compiled")
    drpo_core.policy_loss_and_gradient(drpo_core.DRPO(delta_low=0.05, delta_high=0.1), *arrays, mask=mask, engine="compiled")
    before = names.compilations()
    losses = {float(drpo_core.policy_loss_and_gradient(o, *arrays, mask=mask, engine="compiled").loss) for o in schedule()}
    assert names.compilations() == before
    assert len(losses) > 900
    ledger(Counter(held=1000))


@pytest.mark.usefixtures("interpreted_loops")
@pytest.mark.filterwarnings("ignore::drpo_core.VacuousTrustRegionWarning")
def test_every_objective_at_two_thresholds_compiles_one_loop(ledger):
    """Whatever its numbers are, an objective is one loop."""
    rng = np.random.default_rng(1)
    x = -rng.random(6)
    arrays, mask = (x, x - 0.1, x + 1.0), np.ones(6, dtype=bool)
    ran = 0
    for objective in names.objectives().values():
        given = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
        numbers = {name: value for name, value in given.items() if isinstance(value, float)}
        changed = [dataclasses.replace(objective, **{n: v * (1.0 + s) for n, v in numbers.items()}) for s in (0.1, 0.2, 0.3)]
        options = {"mask": mask, "engine": "compiled", "divergence": np.abs(x)}
        drpo_core.policy_loss_and_gradient(changed[0], *arrays, **options)
        before = names.compilations()
        for other in changed[1:]:
            drpo_core.policy_loss_and_gradient(other, *arrays, **options)
            ran += 1
        assert names.compilations() == before, objective
    ledger(Counter(held=ran))


def test_threads_do_not_change_the_result(ledger):
    rng = np.random.default_rng(2)
    x = -rng.random(200_000).astype(np.float32)
    arrays, mask = (x, x - 0.1, x + 1.0), rng.random(200_000) < 0.9
    results = [
        drpo_core.policy_loss_and_gradient(drpo_core.DRPO(delta=0.1), *arrays, mask=mask, engine="compiled", threads=n)
        for n in (1, 2, 3)
    ]
    for a, b in itertools.pairwise(results):
        assert a.loss == b.loss
        assert np.array_equal(a.gradient, b.gradient)
    ledger(Counter(held=3))
