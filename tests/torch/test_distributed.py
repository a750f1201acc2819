"""The same batch over 1, 2 and 4 gloo processes and uneven micro-batches: the same loss, gradient and diagnostics.

The processes are started once and do everything (sharding.py); the tests judge what they measured, in units of the
dtype's precision relative to the loss or to the largest element of the gradient.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drpo_torch import linear_reduction
from drpo_torch.distributed import global_normalizer
from made_once import made_once
from vocabulary_ranks import cases

from drpo_core import token_mean

REDUCTIONS = ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"]
WITHIN = {"float64": 1e-12 / 2**-52, "float32": 8.0}  # relative 1e-12, and 8 units in the last place


def measure(path):
    script = Path(__file__).with_name("sharding.py")
    run = subprocess.run(  # noqa: S603 -- this interpreter, a file of ours
        [sys.executable, "-W", "ignore", script, path],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return json.loads(made_once(tmp_path_factory, "torch_sharding.json", measure).read_text())


@pytest.fixture(scope="module")
def spread(measured):
    return [case for case in measured if "layout" in case]


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_spread_batch_is_the_whole_batch(spread, wrapper, reduction, dtype):
    chosen = {"wrapper": wrapper, "reduction": reduction, "dtype": dtype}
    cases = [c for c in spread if chosen.items() <= c.items() and "local means" not in c["layout"]]
    assert {(c["layout"], c["ranks"]) for c in cases} == {
        *((f"{layout}, {cut}", n) for layout in ("padded", "packed") for cut in ("sequences", "tokens") for n in (1, 2, 4)),
        *((f"{layout}, sequences × tokens", 4) for layout in ("padded", "packed")),
    }
    assert not [c for c in cases if not max(c["loss"], c["gradient"], c["diagnostics"]) <= WITHIN[dtype]]


def test_local_means_are_not_the_whole_batch(spread):
    """The cases tell a right denominator from a wrong one: with every rank's own, gradients are off by per cents."""
    cases = [c for c in spread if "local means" in c["layout"] and c["dtype"] == "float64"]
    assert {c["reduction"] for c in cases} == set(REDUCTIONS)
    assert min(c["gradient"] for c in cases) * 2**-52 > 0.01


def test_a_rank_without_micro_batches_adds_nothing(measured):
    cases = {c["idle"]: c for c in measured if "idle" in c}
    assert list(cases) == REDUCTIONS
    for case in cases.values():
        assert (case["normalizer"], case["dtype"]) == (case["expected"], "torch.float64")


def test_diagnostics_of_ranks_that_name_them_in_other_orders(measured):
    (case,) = (c for c in measured if "order" in c)
    assert case["order"]
    assert case["classes"]
    for found, expected in case["diagnostics"]:
        assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert case["none"] == [{}, None]


def test_sequences_divided_over_ranks_are_whole_to_a_mode(measured):
    (case,) = (c["mode"] for c in measured if "mode" in c)
    assert max(case.values()) <= 1e-12


@pytest.mark.parametrize("name", [name for name, _ in cases(torch.float64, "arrays")])
def test_a_vocabulary_divided_over_ranks_is_the_whole_one(measured, name):
    """To a few units in the last place, and to the bit the same on all ranks."""
    found = [case for case in measured if case.get("vocabulary") == name]
    assert {(c["dtype"], c["ranks"]) for c in found} == {*(("float64", n) for n in (1, 2, 4)), ("float32", 4)}
    assert not [c for c in found if not max(c["gaps"]) <= 16 or not c["same"]]


def test_distributed_tensors_and_tokens_by_vocabulary(measured):
    found = {case["tensors"]: case["gaps"] for case in measured if "tensors" in case}
    assert list(found) == ["linear_log_prob, most probable", "logits_policy_loss", "linear_policy_loss", "2 × 2"]
    assert max(max(gaps) for gaps in found.values()) <= 16


REFUSED = {
    "ids": r"ValueError: tokens: expected ids in \[0, 12\), got 12 at index \(1,\)",
    "group": "TypeError: vocabulary_group: expected a torch.distributed.ProcessGroup or None, got str",
    "tokens": r"ValueError: logits: expected the same tokens on each rank of vocabulary_group, got \[1, 2, 1, 2\] tokens",
    "own tokens": "ValueError: tokens: expected the same on each rank of the group that divides the vocabulary, got others",
    "columns": "ValueError: logits: expected a vocabulary of 1 or more over the ranks of vocabulary_group, got none",
    "placement": r"ValueError: logits: expected a DTensor on a mesh of one dimension with the placement Shard\(-1\)",
    "two groups": "ValueError: vocabulary_group: expected None or the mesh's own group with logits a DTensor",
    "stranger": "ValueError: vocabulary_group: expected a group that this process, rank [0-3], belongs to",
}


@pytest.mark.parametrize("name", REFUSED)
def test_all_ranks_refuse_alike(measured, name):
    (case,) = (case for case in measured if case.get("wrong") == name)
    assert len(set(case["errors"])) == 1 or name == "stranger"
    assert all(re.match(REFUSED[name], error) for error in case["errors"])


UNKNOWN = [
    lambda values, mask: (values * mask).sum(),
    linear_reduction(lambda values, mask: (values * mask).sum()),
    "token_mean",
    None,
]


@pytest.mark.parametrize("masks", [torch.ones(3, dtype=torch.bool), []], ids=["mask", "no mask"])
@pytest.mark.parametrize("reduction", UNKNOWN)
def test_unknown_reduction_is_refused(reduction, masks):
    """Before any collective, with or without micro-batches."""
    with pytest.raises(TypeError, match=r"^reduction: expected token_mean, "):
        global_normalizer(reduction, masks)


def test_as_many_segment_ids_as_masks():
    mask = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="segment_ids: expected one for each of 2 masks, got 1"):
        global_normalizer(token_mean, [mask, mask], segment_ids=[torch.zeros(3, dtype=torch.int64)])
