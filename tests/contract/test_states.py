"""What surrounds a call and outlives it: checkpoints, diagnostics that nobody asked for, memory, ranks without work."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import tracemalloc
from collections import Counter

import drpo_torch
import drpo_torch.distributed
import numpy as np
import pytest
import torch
from contract import names
from contract.arrays import bits, exact, flatten, make, memory
from contract.axes import DType, Library, Shape
from contract.calls import call_of
from contract.places import base_cell
from contract.subjects import ARRAYS, SUBJECTS, axes_of, parameters_of

import drpo_core


def results(library=Library.TORCH):
    """The result of every function on arrays of a library, at the base of its axes."""
    for subject in SUBJECTS:
        if library in axes_of(subject)["library"]:
            call = call_of(subject, base_cell(subject, library=library))
            yield subject, call.function(**call.arrays)


# --- checkpoints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [*names.objectives(), *names.modes()])
def test_an_objective_survives_the_safe_load_and_copies(label, ledger):
    objective = names.of_label(label)
    file = io.BytesIO()
    torch.save({"step": 3, "objective": objective}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["objective"] == objective
    for again in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective)):  # noqa: S301 -- our own bytes
        assert again == objective
        assert type(again) is type(objective)
    ledger(Counter(held=3))


def test_diagnostics_survive_the_safe_load(ledger):
    ran = Counter()
    for subject, result in results():
        for path, diagnostics in _diagnostics(result, SUBJECTS[subject].results):
            file = io.BytesIO()
            torch.save({"step": 3, "diagnostics": diagnostics}, file)
            file.seek(0)
            again = torch.load(file, weights_only=True)["diagnostics"]
            assert {k: type(v) for k, v in again.items()} == {k: type(v) for k, v in diagnostics.items()}, (subject, path)
            mine, theirs = ({k: bits(v) for k, v in flatten(every).items()} for every in (diagnostics, again))
            assert mine == theirs, (subject, path)
            ran["held"] += 1
    assert ran
    ledger(ran)


# --- diagnostics -----------------------------------------------------------------------------------------------------------

WITH_DIAGNOSTICS = [
    (subject, library)
    for subject in SUBJECTS
    if "diagnostics" in parameters_of(subject)
    for library in axes_of(subject)["library"]
]


@pytest.mark.parametrize(("subject", "library"), WITH_DIAGNOSTICS, ids=lambda v: getattr(v, "value", v))
def test_diagnostics_that_were_not_asked_for_are_none(subject, library, ledger):
    for engine in axes_of(subject).get("engine", ("auto",))[: 2 if library not in {Library.NUMPY} else 3]:
        cell = base_cell(subject, library=library, diagnostics=False)
        call = call_of(subject, cell | ({"engine": engine} if "engine" in cell else {}))
        result = call.function(**call.arrays)
        diagnostics = result.diagnostics if hasattr(result, "diagnostics") else result[1]
        assert diagnostics is None
        ledger(Counter(held=1))


def test_reducing_every_field_in_place_adds_up(ledger):
    """What dist.all_reduce(field) does on two equal ranks: means stay, counts double."""
    ran = Counter()
    for subject, result in results():
        for path, statistics in _diagnostics(result, SUBJECTS[subject].results):
            before = drpo_core.summarize(copy.deepcopy(statistics))
            for statistic in statistics.values():
                for name, field in statistic._asdict().items():
                    if name != "value":
                        field.mul_(2)
            after = drpo_core.summarize(statistics)
            assert after == pytest.approx(before, nan_ok=True), (subject, path)
            ran["held"] += 1
    ledger(ran)


def _diagnostics(result, names_):
    if isinstance(result, dict) and "ratio_mean" in result and not isinstance(result["ratio_mean"], torch.Tensor):
        yield "", result
    elif isinstance(result, tuple):
        for name, item in zip(getattr(result, "_fields", names_), result, strict=False):
            if isinstance(item, dict):
                yield name, item


def test_merging_gives_its_own_memory(ledger):
    """A merged statistic is reduced in place without its parts."""
    call = call_of("drpo_core.token_diagnostics", base_cell("drpo_core.token_diagnostics", library=Library.TORCH))
    part, other = call.function(**call.arrays), call.function(**call.arrays)
    for merged in (drpo_core.merge_diagnostics(part), drpo_core.merge_diagnostics(part, other)):
        mine = [memory(a) for a in flatten(merged).values()]
        theirs = [memory(a) for a in [*flatten(part).values(), *flatten(other).values()]]
        assert not any(np.may_share_memory(a, b) for a, b in itertools.product(mine, theirs))
        assert not any(np.may_share_memory(a, b) for a, b in itertools.combinations(mine, 2))
    ledger(Counter(held=2))


def test_merging_is_by_name_and_of_diagnostics(ledger):
    call = call_of("drpo_core.token_diagnostics", base_cell("drpo_core.token_diagnostics"))
    part = call.function(**call.arrays)
    backwards = dict(reversed(part.items()))
    merged = drpo_core.merge_diagnostics(part, backwards)
    assert drpo_core.summarize(merged) == pytest.approx(drpo_core.summarize(part), nan_ok=True)
    for wrong in ([part, part], None, {}, {"ratio_mean": 1.0}, {k: v for k, v in part.items() if k != "k1_mean"}):
        with pytest.raises((TypeError, ValueError), match="diagnostics"):
            drpo_core.merge_diagnostics(part, wrong)
    with pytest.raises((TypeError, ValueError), match="diagnostics"):
        drpo_core.merge_diagnostics([part, part])
    ledger(Counter(held=1, refused=6))


# --- gradients of the core -------------------------------------------------------------------------------------------------

CORE_OBJECTIVES = ["token_loss_and_gradient", "policy_loss_and_gradient", "token_diagnostics"]


@pytest.mark.parametrize("label", names.objectives())
@pytest.mark.parametrize("name", CORE_OBJECTIVES)
def test_what_the_core_gives_of_tensors_that_require_grad_is_constant_or_right(name, label, ledger):
    """A loss that autograd differentiates to something else than the gradient beside it is a trap."""
    subject = f"drpo_core.{name}"
    choices = {"divergence": axes_of(subject)["divergence"][1]} if names.is_per_token(label) else {}
    call = call_of(subject, base_cell(subject, library=Library.TORCH, objective=label, **choices))
    arrays = {n: a.requires_grad_() if n == "log_prob" else a for n, a in call.arrays.items()}
    result = call.function(**arrays)
    for path, output in flatten(result).items():
        if output.requires_grad:
            assert path == "loss", f"{path} requires grad"
            (found,) = torch.autograd.grad(output.sum(), arrays["log_prob"])
            np.testing.assert_allclose(exact(found), exact(result.gradient), rtol=1e-5, atol=1e-8)
    ledger(Counter(held=1))


# --- cost ------------------------------------------------------------------------------------------------------------------

MANY = 4000
PACKED_ARRAYS = [
    (subject, name)
    for subject in SUBJECTS
    if Library.NUMPY in axes_of(subject)["library"]
    for name in ("segment_ids", "group_ids", "log_prob", "values", "mask")
    if name in parameters_of(subject) and SUBJECTS[subject].call is None
]


@pytest.mark.parametrize(("subject", "name"), PACKED_ARRAYS, ids=lambda v: v)
def test_memory_grows_with_the_tokens_not_with_their_square(subject, name, ledger):
    choices = {name: ARRAYS[name][0], "shape": Shape.PACKED}
    cell = base_cell(subject, **choices)
    if subject.endswith("expand_advantages"):
        cell["segment_ids"] = ARRAYS["segment_ids"][0]
    call = call_of(subject, cell)
    n = next(iter(call.arrays.values())).shape[0]
    arrays = {k: np.repeat(a, MANY // len(a), axis=0) if a.shape[:1] == (n,) else a for k, a in call.arrays.items()}
    if name in {"segment_ids", "group_ids"} and not subject.endswith("expand_advantages"):
        arrays[name] = np.arange(len(arrays[name])) // 2
    call.function(**arrays)
    tracemalloc.start()
    try:
        call.function(**arrays)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 600 * MANY, f"{peak / MANY:.0f} bytes a token"
    ledger(Counter(held=1))


# --- nothing to do ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [Library.NUMPY, Library.TORCH, Library.JAX], ids=lambda library: library.value)
def test_a_batch_without_sequences_has_no_advantages(library, ledger):
    """Padding alone: nothing is valid, so nothing is looked up."""
    advantages, mask, ids = (
        make(values, dtype, library)
        for values, dtype in ((np.zeros(0), DType.FLOAT32), (np.zeros(3), DType.BOOL), (np.zeros(3), DType.INT64))
    )
    assert exact(drpo_core.expand_advantages(advantages, mask, segment_ids=ids)).tolist() == [0.0, 0.0, 0.0]
    ledger(Counter(held=1))


# --- ranks without work ----------------------------------------------------------------------------------------------------


def test_a_rank_without_micro_batches_adds_nothing(ledger):
    mask = torch.tensor([[True, True], [True, False]])
    normalizer = drpo_torch.distributed.global_normalizer
    for reduction, whole in ((drpo_core.token_mean, 3.0), (drpo_core.sequence_mean_token_mean, 2.0)):
        assert float(normalizer(reduction, [])) == 0.0
        assert float(normalizer(reduction, [mask])) == float(normalizer(reduction, mask)) == whole
        assert float(normalizer(reduction, [mask, mask])) == 2.0 * whole
    ledger(Counter(held=8))


def test_diagnostics_that_nobody_asked_for_are_reduced_to_none(ledger):
    assert drpo_torch.distributed.all_reduce_diagnostics(None) is None
    ledger(Counter(held=1))


def test_diagnostics_are_merged_across_ranks_by_name(ledger):
    call = call_of("drpo_core.token_diagnostics", base_cell("drpo_core.token_diagnostics", library=Library.TORCH))
    part = call.function(**call.arrays)
    reduced = drpo_torch.distributed.all_reduce_diagnostics(dict(reversed(part.items())))
    assert drpo_core.summarize(reduced) == pytest.approx(drpo_core.summarize(part), nan_ok=True)
    ledger(Counter(held=1))
