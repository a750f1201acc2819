"""The same training in one process and in two that share each batch (gloo), sampling and training on half of it each."""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from drpo_torch.distributed import global_normalizer

from drpo_core import token_mean
from study import model, train
from study.cells import DEFAULT, EXACT, SETTINGS, TUNED_IN, Setting, objective
from study.precision import ENGINES, TRAINERS
from study.results import in_words
from study.rollout import Rollout, sample, uniforms
from study.runner import start_of
from study.task import Prompts, Task

if TYPE_CHECKING:
    from study.model import Parameters

METHOD, THRESHOLD, SEED = "drpo", 0.15, 200
RANKS, ROLLOUTS = 2, 30


@dataclass(frozen=True, slots=True)
class Curves:
    """Reward of each batch, loss of each step, and the final parameters."""

    rewards: np.ndarray
    losses: np.ndarray
    parameters: Parameters
    rollouts: list[Rollout]
    """The batches of the training; empty for two processes."""


def shares(sequences: int, steps: int, rank: int, ranks: int) -> torch.Tensor:
    """Indices of a rank's sequences: an equal share of every step's part, so that all ranks together train on that part."""
    return torch.arange(sequences).view(steps, ranks, -1)[:, rank].flatten()


def follow(
    start: Parameters, setting: Setting, rollouts: int, given: list[Rollout] | None = None, rank: int = 0, ranks: int = 1
) -> Curves:
    """Train alone or as one of `ranks` processes, on the policy's own samples or on `given` batches.

    The reward is always that of the policy's own samples.
    """
    how, task = DEFAULT, Task()
    shape, engine, precision = model.SHAPES[setting.architecture], ENGINES[setting.engine], TRAINERS[setting.trainer]
    chosen = objective(METHOD, THRESHOLD)
    parameters = {name: p.requires_grad_() for name, p in model.copied(start).items()}
    optimiser = torch.optim.Adam(parameters.values(), lr=how.learning_rate)
    generator = torch.Generator().manual_seed(SEED)
    mine = shares(how.prompts * how.samples, how.steps, rank, ranks)
    rewards, losses, used = [], [], []
    for i in range(rollouts):
        prompts = task.prompts(how.prompts, generator).repeat(how.samples)
        u = uniforms(prompts, generator)
        rollout = sample(model.prepared(parameters, engine), shape, Prompts(prompts.tokens[mine]), engine, u[mine])
        rewards.append(_sum(task.reward(rollout.prompts, rollout.responses).double().sum()) / (how.prompts * how.samples))
        used.append(rollout if given is None else given[i].rows(mine))
        _, batch = train.rewarded(used[-1], task, how.samples, chosen)
        for part in batch.parts(how.steps):
            normalizer = global_normalizer(token_mean, part.rollout.mask) if ranks > 1 else None
            optimiser.zero_grad()
            loss, *_ = train.backward(parameters, shape, precision, chosen, part, normalizer)
            for p in parameters.values():
                if ranks > 1:
                    dist.all_reduce(p.grad)
            train.advance(parameters, optimiser, how.clip_norm)
            losses.append(_sum(torch.tensor(loss, dtype=torch.float64)))
    return Curves(np.array(rewards), np.array(losses), model.copied(parameters), used)


def together(start: Parameters, setting: Setting, rollouts: int, given: list[Rollout] | None = None) -> Curves:
    """Train in RANKS processes."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(_work, (port, folder, start, setting, rollouts, given), nprocs=RANKS)
        stored = torch.load(Path(folder) / "curves.pt")
    return Curves(stored["rewards"].numpy(), stored["losses"].numpy(), stored["parameters"], [])


def differences(one: Curves, other: Curves) -> dict[str, float]:
    """Largest differences of rewards, losses and parameters."""
    return {
        "reward": float(np.abs(one.rewards - other.rewards).max()),
        "loss": float(np.abs(one.losses - other.losses).max()),
        "parameter": max(float((p - other.parameters[name]).abs().max()) for name, p in one.parameters.items()),
    }


def report(rollouts: int = ROLLOUTS) -> str:
    """Compare, and say the result in words."""
    start, _ = start_of("dense", SEED)
    torch.set_num_threads(1)
    lines = [f"DRPO {THRESHOLD:g}, {rollouts} batches × {DEFAULT.steps} steps"]
    for name, setting in (("float32 engine", EXACT), (TUNED_IN, SETTINGS[TUNED_IN])):
        alone = follow(start, setting, rollouts)
        for given, batches in ((alone.rollouts, "the same batches"), (None, "its own samples")):
            shared = together(start, setting, rollouts, given)
            first, ones, twos = alone.rewards[0], alone.rewards[-5:].mean(), shared.rewards[-5:].mean()
            lines.append(f"{name}, {batches}: reward {first:.3f} → {ones:.3f} alone, {twos:.3f} in {RANKS} (last 5 batches)")
            lines.append("  " + in_words(differences(alone, shared)))
    return "\n".join(lines)


def _sum(value: torch.Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(value)
    return float(value)


def _work(
    rank: int, port: int, folder: str, start: Parameters, setting: Setting, rollouts: int, given: list[Rollout] | None
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    found = follow(start, setting, rollouts, given, rank, RANKS)
    if rank == 0:
        curves = {"rewards": torch.from_numpy(found.rewards), "losses": torch.from_numpy(found.losses)}
        torch.save({**curves, "parameters": found.parameters}, Path(folder) / "curves.pt")
    dist.barrier()
    dist.destroy_process_group()
