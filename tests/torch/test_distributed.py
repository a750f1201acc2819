"""The same batch over 1, 2 and 4 gloo processes and uneven micro-batches: the same loss, gradient and diagnostics.

The processes are started once and do everything (sharding.py); the tests judge what they measured, in units of the
dtype's precision relative to the loss or to the largest element of the gradient.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drpo_torch import linear_reduction
from drpo_torch.distributed import global_normalizer

from drpo_core import token_mean

REDUCTIONS = ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"]
WITHIN = {"float64": 1e-12 / 2**-52, "float32": 8.0}  # relative 1e-12, and 8 units in the last place


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharding") / "results.json"
    script = Path(__file__).with_name("sharding.py")
    run = subprocess.run(  # noqa: S603 -- this interpreter, a file of ours
        [sys.executable, "-W", "ignore", script, path], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(path.read_text())


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
