"""The same batch over 1, 2 and 4 gloo processes and uneven micro-batches: the same loss, gradient and diagnostics.

The processes are started once and do everything (sharding_torch.py); the tests judge what they measured, in units of the
dtype's precision relative to the loss or to the largest element of the gradient.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drpo_torch.distributed import global_normalizer

REDUCTIONS = ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"]
WITHIN = {"float64": 1e-12 / 2**-52, "float32": 8.0}  # relative 1e-12, and 8 units in the last place


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharding") / "results.json"
    script = Path(__file__).with_name("sharding_torch.py")
    run = subprocess.run(  # noqa: S603 -- this interpreter, a file of ours
        [sys.executable, "-W", "ignore", script, path], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_spread_batch_is_the_whole_batch(measured, wrapper, reduction, dtype):
    chosen = {"wrapper": wrapper, "reduction": reduction, "dtype": dtype}
    cases = [c for c in measured if chosen.items() <= c.items() and "local means" not in c["layout"]]
    assert {(c["layout"], c["ranks"]) for c in cases} == {
        *((f"{layout}, {cut}", n) for layout in ("padded", "packed") for cut in ("sequences", "tokens") for n in (1, 2, 4)),
        *((f"{layout}, sequences × tokens", 4) for layout in ("padded", "packed")),
    }
    assert not [c for c in cases if not max(c["loss"], c["gradient"], c["diagnostics"]) <= WITHIN[dtype]]


def test_local_means_are_not_the_whole_batch(measured):
    """The cases tell a right denominator from a wrong one: with every rank's own, gradients are off by per cents."""
    cases = [c for c in measured if "local means" in c["layout"] and c["dtype"] == "float64"]
    assert {c["reduction"] for c in cases} == set(REDUCTIONS)
    assert min(c["gradient"] for c in cases) * 2**-52 > 0.01


def test_unknown_reduction_is_refused():
    with pytest.raises(TypeError, match="reduction: expected one of drpo_core"):
        global_normalizer(lambda values, mask: (values * mask).sum(), torch.ones(3, dtype=torch.bool))
