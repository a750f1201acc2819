"""Three optimiser steps of SkyRL's FSDP policy worker: with our losses, with SkyRL's, and what is logged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("skyrl", reason="runs in the environment of `nox -s integration-skyrl`")

import torch

PAIRS = [
    ("regular", "drpo_core_ppo_clip"),
    ("dual_clip", "drpo_core_dual_clip"),
    ("gspo", "drpo_core_gspo"),
    ("dppo:binary_tv", "drpo_core_dppo_tv:binary_tv"),
    ("dppo:binary_kl", "drpo_core_dppo_kl:binary_kl"),
    ("cispo", "drpo_core_cispo"),
    ("importance_sampling", "drpo_core_pg_is"),
]
OTHERS = ["drpo", "drpo_core_mask_drpo", "drpo_core_spo"]
OURS = [ours for _, ours in PAIRS] + OTHERS


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
    for of_ours, of_theirs in zip(trained[ours]["metrics"], trained[theirs]["metrics"], strict=True):
        for name in ("policy_loss", "grad_norm"):
            assert of_ours[name] == pytest.approx(of_theirs[name], rel=2e-6)
        assert of_theirs["grad_norm"] > 0.0
        if theirs not in ("cispo", "importance_sampling"):  # which counts both sides of A, and which has none
            clipped = of_theirs["loss_metrics/clip_ratio"]
            assert 0.0 < clipped < 1.0
            assert of_ours["loss_metrics/clip_ratio"] == pytest.approx(clipped, rel=1e-5)


@pytest.mark.parametrize("mode", OURS)
def test_objectives_differ_and_are_logged(trained, mode):
    for metrics in trained[mode]["metrics"]:
        assert {f"loss_metrics/{name}" for name in ("clip_ratio", "dropped_fraction", "gradient_mass_kept")} <= metrics.keys()
        assert metrics["loss_metrics/weight_min"] <= metrics["loss_metrics/weight_mean"] <= metrics["loss_metrics/weight_max"]
        assert all(abs(figure) < float("inf") for figure in metrics.values())
    for other in OURS:
        if other != mode:
            assert trained[other]["metrics"][0]["grad_norm"] != trained[mode]["metrics"][0]["grad_norm"]
