"""Three optimiser steps of verl's TrainingWorker and FSDP2 engine: with our losses, with verl's, and what is logged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="runs in the environment of `nox -s integration-verl`")

import torch

PAIRS = [
    ("vanilla", "drpo_core_ppo_clip"),
    ("gspo", "drpo_core_gspo"),
    ("dppo_tv", "drpo_core_dppo_tv"),
    ("dppo_kl", "drpo_core_dppo_kl"),
]
OTHERS = ["drpo", "drpo_core_mask_drpo", "drpo_core_spo", "drpo_core_cispo", "drpo_core_pg_is"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("worker") / "results.json"
    command = [sys.executable, Path(__file__).with_name("worker.py"), path, *sum(PAIRS, ()), *OTHERS]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)  # noqa: S603 -- a file of ours
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_the_same_parameters_after_three_steps(trained, theirs, ours):
    expected, found = (torch.tensor(trained[mode]["parameters"]) for mode in (theirs, ours))
    # a norm's weight is near 1, where one unit in the last place is 1.2e-7
    torch.testing.assert_close(found, expected, rtol=2.5e-7, atol=1e-7)
    assert trained[ours]["metrics"]["grad_norm"] == pytest.approx(trained[theirs]["metrics"]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("mode", [ours for _, ours in PAIRS] + OTHERS)
def test_objectives_differ_and_are_logged(trained, mode):
    metrics = trained[mode]["metrics"]
    assert {"actor/pg_loss", "actor/ppo_kl", "actor/pg_clipfrac", "actor/gradient_mass_kept", "grad_norm"} <= metrics.keys()
    assert {len(values) for values in metrics.values()} == {3}
    assert all(x == x for values in metrics.values() for x in values)
    for other in {ours for _, ours in PAIRS} | set(OTHERS):
        if other != mode:
            assert trained[other]["metrics"]["grad_norm"] != metrics["grad_norm"]
