"""The same training in torch and in JAX, from the same start, prompts and uniform numbers: how far apart they end up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import torch

from study import model, train, twin
from study.cells import DEFAULT, EXACT, SETTINGS, TUNED_IN, objective
from study.precision import ENGINES, TRAINERS
from study.results import in_words
from study.rollout import sample, uniforms
from study.runner import start_of
from study.task import Task

if TYPE_CHECKING:
    from study.cells import Setting, Training
    from study.model import Parameters
    from study.train import Batch

METHOD, THRESHOLD, SEED = "drpo", 0.15, 200
ROLLOUTS = 30


@dataclass(frozen=True, slots=True)
class Parity:
    """Rewards of each rollout batch, losses and norms of each step, and the largest difference of a final parameter.

    The first axis of each array is torch, then JAX.
    """

    rewards: np.ndarray
    losses: np.ndarray
    norms: np.ndarray
    parameters: float

    @property
    def differences(self) -> dict[str, float]:
        """The largest difference of each curve and of a parameter."""
        curves = {"reward": self.rewards, "loss": self.losses, "gradient norm": self.norms}
        return {name: float(np.abs(y[0] - y[1]).max()) for name, y in curves.items()} | {"parameter": self.parameters}


def compare(
    start: Parameters, task: Task, setting: Setting, *, rollouts: int, same_batches: bool, how: Training = DEFAULT
) -> Parity:
    """Train both. With `same_batches`, JAX learns from the samples of torch's policy; otherwise each learns from its own.

    Both policies always sample through the same engine with the same uniform numbers; the rewards are those of these samples.
    """
    shape, engine, precision = model.SHAPES[setting.architecture], ENGINES[setting.engine], TRAINERS[setting.trainer]
    chosen = objective(METHOD, THRESHOLD)
    ours = {name: p.requires_grad_() for name, p in model.copied(start).items()}
    optimiser = torch.optim.Adam(ours.values(), lr=how.learning_rate)
    theirs = {name: jnp.asarray(p.numpy()) for name, p in model.copied(start).items()}
    moments = ({n: jnp.zeros_like(p) for n, p in theirs.items()}, {n: jnp.zeros_like(p) for n, p in theirs.items()})
    generator = torch.Generator().manual_seed(SEED)
    rewards, losses, norms, count = [], [], [], 0
    for _ in range(rollouts):
        prompts = task.prompts(how.prompts, generator).repeat(how.samples)
        u = uniforms(prompts, generator)
        sampled = [
            train.rewarded(sample(model.prepared(p, engine), shape, prompts, engine, u), task, how.samples, chosen)
            for p in (ours, _to_torch(theirs))
        ]
        rewards.append([float(reward.mean()) for reward, _ in sampled])
        (_, mine), (_, its) = sampled
        for part, other in zip(mine.parts(how.steps), (mine if same_batches else its).parts(how.steps), strict=True):
            count += 1
            optimiser.zero_grad()
            loss, *_ = train.backward(ours, shape, precision, chosen, part)
            norm = train.advance(ours, optimiser, how.clip_norm)
            theirs, moments, its_loss, its_norm = twin.step(
                theirs,
                moments,
                jnp.asarray(count, jnp.float32),
                _to_jax(other),
                objective=chosen,
                shape=shape,
                learning_rate=how.learning_rate,
                clip_norm=how.clip_norm,
            )
            losses.append([loss, float(its_loss)])
            norms.append([norm, float(its_norm)])
    apart = max(float((ours[name].detach() - p).abs().max()) for name, p in _to_torch(theirs).items())
    return Parity(np.array(rewards).T, np.array(losses).T, np.array(norms).T, apart)


def report(rollouts: int = ROLLOUTS) -> str:
    """Make both comparisons, and say the results in words."""
    start, _ = start_of("dense", SEED)
    lines = [
        f"DRPO {THRESHOLD:g}, {rollouts} batches × {DEFAULT.steps} steps, torch {torch.__version__}, JAX {jax.__version__}"
    ]
    for same, batches in ((True, "the same batches"), (False, "each its own samples")):
        for name, setting in (("float32 engine", EXACT), (TUNED_IN, SETTINGS[TUNED_IN])):
            found = compare(start, Task(), setting, rollouts=rollouts, same_batches=same)
            first, (ours, theirs) = found.rewards[0, 0], found.rewards[:, -5:].mean(1)
            lines.append(f"{name}, {batches}: reward {first:.3f} → torch {ours:.3f}, JAX {theirs:.3f} (last 5 batches)")
            lines.append("  " + in_words(found.differences))
    return "\n".join(lines)


def _to_torch(parameters: twin.Parameters) -> Parameters:
    return {name: torch.from_numpy(np.array(p)) for name, p in parameters.items()}


def _to_jax(batch: Batch) -> dict[str, jax.Array]:
    rollout = batch.rollout
    arrays = {
        "inputs": rollout.inputs.int(),
        "responses": rollout.responses.int(),
        "behavior_log_prob": rollout.behavior_log_prob,
        "advantages": batch.advantages,
        "mask": rollout.mask,
    }
    return {name: jnp.asarray(array.numpy()) for name, array in arrays.items()}
