"""Runs: the same bytes whenever they are computed, whatever was interrupted; every method and setting trains."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from study import results, runner, train
from study.cells import DEFAULT, FURTHER, METHODS, SETTINGS, SIX, Cell, comparison_cells, thresholds, tuning_cells
from study.model import SHAPES, copied, initial
from study.precision import ENGINES, TRAINERS
from study.rollout import sample, uniforms
from study.task import Task

ROOT = Path(__file__).parents[2]
TINY = replace(DEFAULT, rollouts=6, prompts=4, samples=4, steps=2)


def stored(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


@pytest.fixture
def starts(tmp_path, start):
    """The pre-fit of the tests as those of seeds 0 to 2."""
    folder = tmp_path / "starts"
    folder.mkdir()
    for seed in range(3):
        torch.save(start, runner.start_path("dense", seed, folder))
    return folder


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from study import runner
from study.cells import DEFAULT, Cell
how = replace(DEFAULT, rollouts=int(sys.argv[3]), prompts=4, samples=4, steps=2)
for seed in range(3):
    runner.run_cell(Path(sys.argv[1]), Cell("dense-bf16", "drpo", 0.15, seed, how), Path(sys.argv[2]))
"""


def test_killed_and_resumed_gives_the_files_of_one_go(tmp_path, starts):
    """A process is killed by SIGKILL in the middle of its second run; what it finished is not computed again."""
    rollouts = 12
    cells = [Cell("dense-bf16", "drpo", 0.15, seed, replace(TINY, rollouts=rollouts)) for seed in range(3)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for cell in cells:
        runner.run_cell(whole, cell, starts)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, broken, starts, str(rollouts)], env=environment)  # noqa: S603 -- ours
    first = results.path_of(broken, cells[0])
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    left = runner.missing(broken, cells)
    assert 0 < len(left) < len(cells)
    made = first.stat().st_mtime_ns
    for cell in left:
        runner.run_cell(broken, cell, starts)
    assert stored(broken) == stored(whole)
    assert first.stat().st_mtime_ns == made
    assert runner.missing(broken, cells) == []


@pytest.mark.parametrize(("setting", "tolerance"), [("dense-fp8-rollout", 1e-5), ("moe-fp8-e2e", 2e-2)])
def test_the_compiled_trainer_has_the_gradients_of_the_plain_one(setting, tolerance):
    """Sums differ in their last bit on some processors, and FP8 rounds them to one of its numbers or to the next."""
    chosen, task = SETTINGS[setting], Task()
    shape, precision = SHAPES[chosen.architecture], TRAINERS[chosen.trainer]
    start = initial(shape, 0)
    generator = torch.Generator().manual_seed(0)
    prompts = task.prompts(4, generator).repeat(8)
    rollout = sample(start, shape, prompts, ENGINES["float32"], uniforms(prompts, generator))
    found = {}
    for stance in ("force_eager", "default"):
        parameters = {name: p.requires_grad_() for name, p in copied(start).items()}
        with torch.compiler.set_stance(stance):
            train.log_probs(parameters, shape, rollout, precision).sum().backward()
        found[stance] = parameters
    for name, p in found["default"].items():
        plain = found["force_eager"][name].grad
        assert float((p.grad - plain).norm()) <= tolerance * float(plain.norm()), name


def test_the_pool_runs_what_is_missing_and_nothing_else(tmp_path, starts, monkeypatch):
    folder = tmp_path / "results"
    cells = [Cell("dense-bf16", "grpo", 0.28, seed, TINY) for seed in range(2)]
    runner.run_cell(folder, cells[0], starts)
    made = results.path_of(folder, cells[0]).stat().st_mtime_ns
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    runner.run_missing(folder, [*cells, cells[1]], processes=1, starts=starts)
    assert set(stored(folder)) == {f"{cell.name}.jsonl" for cell in cells}
    assert results.path_of(folder, cells[0]).stat().st_mtime_ns == made
    assert len((folder / "seconds.txt").read_text().splitlines()) == 2
    assert [path.suffix for path in folder.iterdir() if ".part" in path.name] == []


def test_names_tell_runs_apart():
    cells = [*tuning_cells(), *comparison_cells({name: 0.05 for name, m in METHODS.items() if m.grid})]
    distinct = set(cells)
    assert len({cell.name for cell in distinct}) == len(distinct)
    assert Cell("dense-bf16", "drpo", 0.5, 0).name != Cell("dense-bf16", "drpo", 0.5, 0, TINY).name


def test_every_method_is_in_each_of_the_six_settings_at_its_published_and_tuned_thresholds():
    tuned = {name: method.grid[-1] for name, method in METHODS.items() if method.grid}
    cells = comparison_cells(tuned, (0, 1))
    assert len(set(cells)) == len(cells)
    base = [(c.setting, c.method, c.threshold, c.seed) for c in cells if c.training == DEFAULT and c.setting in SIX]
    assert set(base) == {(s, n, t, seed) for s in SIX for n in METHODS for t in thresholds(n, tuned) for seed in (0, 1)}
    assert thresholds("drpo", {"drpo": 12.5}) == [12.5, 2.5]
    assert {c.setting for c in cells} == set(SETTINGS) == set(SIX) | set(FURTHER)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, start):
    """Weights of every kind go through the library into the parameters, and the histogram has every active token."""
    cell = Cell(
        "dense-fp8-rollout", method, METHODS[method].grid[0] if METHODS[method].grid else 0.0, 0, replace(TINY, rollouts=2)
    )
    found = train.run(cell, start[0], Task())
    assert np.isfinite(found["curves"]["norm"]).all()
    assert max(found["curves"]["norm"]) > 0.0
    assert sum(found["weights"]) > 0
    assert {len(curve) for curve in found["curves"].values()} == {2}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_trains_and_shows_its_mismatch(setting, start):
    architecture = SETTINGS[setting].architecture
    parameters = start[0] if architecture == "dense" else initial(SHAPES["moe"], 0)
    found = train.run(Cell(setting, "drpo", 0.15, 0, replace(TINY, rollouts=2)), parameters, Task())
    assert all(tv > 0.0 for tv in found["curves"]["tv"])
    assert np.isfinite(found["curves"]["tv_last"]).all()


def test_lag_makes_the_first_step_of_a_batch_stale(start):
    how = replace(DEFAULT, rollouts=5, prompts=8)
    settings = ("dense-fp8-rollout", "dense-fp8-lag")
    now, late = (train.run(Cell(setting, "pg-is", 0.0, 0, how), start[0], Task())["curves"] for setting in settings)
    assert now["tv"][0] == late["tv"][0]
    assert np.mean(late["tv"][2:]) > 1.5 * np.mean(now["tv"][2:])


def test_training_raises_the_reward(start):
    how = replace(DEFAULT, rollouts=14)
    rewards = train.run(Cell("dense-bf16", "drpo", 12.5, 0, how), start[0], Task())["curves"]["reward"]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.05


def test_histogram_bins_hold_their_lower_edge():
    weights = torch.tensor([-5.0, 0.0, -1e-9, 1.0, 0.92, 1.08, 2.99, 7.0])
    counts = train.histogram(weights)
    assert counts.tolist() == np.histogram(weights.numpy(), np.array(train.WEIGHT_EDGES, np.float32))[0].tolist()
    assert int(counts.sum()) == len(weights)


def test_tuning_takes_the_best_threshold_and_of_equals_the_largest(tmp_path):
    for cell in tuning_cells():
        reward = {0.05: 0.3, 0.5: 0.7, 2.5: 0.7}.get(cell.threshold, 0.2)
        results.write(tmp_path, results.Result(cell, {}, {"reward": [reward] * 5}, []))
    tuned = runner.tuned_thresholds(results.read_all(tmp_path))
    assert "pg-is" not in tuned
    assert tuned["drpo"] == 2.5
    assert tuned["dppo-kl"] == 0.5
    assert "0 of" in runner.status(tmp_path).splitlines()[1]
    next(tmp_path.glob("*.drpo.*")).unlink()
    assert runner.tuned_thresholds(results.read_all(tmp_path)) == {}
    assert "comparison" in runner.status(tmp_path)
