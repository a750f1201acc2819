"""One run: sample a batch with the engine, take several optimiser steps on it, measure; with the library as users use it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from drpo_torch import policy_loss, token_log_prob

from drpo_core import expand_advantages, group_advantages, summarize, token_loss_and_gradient, token_mean
from study import model
from study.cells import SETTINGS, Cell, objective
from study.objectives import SMALL, nonzero
from study.precision import ENGINES, TRAINERS
from study.rollout import Rollout, sample, uniforms
from study.task import PROMPT, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from drpo_core import Objective
    from drpo_core.diagnostics import Diagnostics
    from study.model import Parameters, Shape
    from study.precision import Float32

RARE = math.log(0.01)
WEIGHT_EDGES = (-math.inf, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 0.9, 0.92, 0.94, 0.96, 0.98, 0.99, 0.995, 0.999, 1.0,
                1.001, 1.005, 1.01, 1.02, 1.04, 1.06, 1.08, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, math.inf)  # fmt: skip
"""Edges of the histogram of weights: bin i holds edge i ≤ w < edge i+1. The bins are narrowest around 1."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of some sequences, with their advantages."""

    rollout: Rollout
    advantages: torch.Tensor
    """Per token, (sequences, RESPONSE)."""

    def parts(self, number: int) -> Iterator[Batch]:
        """Split into consecutive equal parts of whole groups."""
        for rows in torch.arange(self.advantages.shape[0]).chunk(number):
            yield Batch(self.rollout.rows(rows), self.advantages[rows])


# compiled, as users compile their models: saves a third of a step. Shapes differ between settings, not between batches
_hidden_states = torch.compile(model.hidden_states, dynamic=False)


def log_probs(parameters: Parameters, shape: Shape, rollout: Rollout, precision: Float32) -> torch.Tensor:
    """The trained policy's log-probs of the response tokens, packed: (tokens,)."""
    states, _ = _hidden_states(parameters, shape, rollout.inputs, precision)
    packed = states[:, PROMPT - 1 :][rollout.mask]
    found = token_log_prob(
        logits=model.logits(parameters, packed), tokens=rollout.responses[rollout.mask], overwrite_logits=True
    )
    return found.log_prob


def rewarded(rollout: Rollout, task: Task, samples: int, chosen: Objective) -> tuple[torch.Tensor, Batch]:
    """Rewards (sequences,), and the batch with group advantages."""
    rewards = task.reward(rollout.prompts, rollout.responses)
    advantages = group_advantages(rewards.view(-1, samples)).flatten()
    return rewards, Batch(rollout, expand_advantages(nonzero(chosen, advantages), rollout.mask))


def packed(batch: Batch) -> dict[str, torch.Tensor]:
    """The arguments of `policy_loss` besides `log_prob`, packed."""
    mask = batch.rollout.mask
    return {
        "behavior_log_prob": batch.rollout.behavior_log_prob[mask],
        "advantages": batch.advantages[mask],
        "mask": torch.ones(int(mask.sum()), dtype=torch.bool),
    }


def backward(
    parameters: Parameters,
    shape: Shape,
    precision: Float32,
    chosen: Objective,
    batch: Batch,
    normalizer: torch.Tensor | None = None,
) -> tuple[float, torch.Tensor, Diagnostics]:
    """Add the gradient to the parameters; returns the loss, log π of the packed tokens, and the library's diagnostics."""
    log_prob = log_probs(parameters, shape, batch.rollout, precision)
    loss, diagnostics = policy_loss(chosen, log_prob=log_prob, **packed(batch), reduction=token_mean, normalizer=normalizer)
    loss.backward()
    return float(loss.detach()), log_prob.detach(), diagnostics


def advance(parameters: Parameters, optimiser: torch.optim.Optimizer, clip_norm: float) -> float:
    """Take an optimiser step if the gradient is finite; returns the gradient's norm before clipping."""
    norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), clip_norm))
    if math.isfinite(norm):
        optimiser.step()
    return norm


def histogram(weights: torch.Tensor) -> torch.Tensor:
    """The number of weights in each bin of WEIGHT_EDGES."""
    edges = torch.tensor(WEIGHT_EDGES, dtype=weights.dtype)
    bins = len(WEIGHT_EDGES) - 1
    return torch.bincount(torch.bucketize(weights, edges, right=True).clamp(1, bins) - 1, minlength=bins)


def run(cell: Cell, start: Parameters, task: Task, progress: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Train; returns the curves by name, with a number for each rollout batch, and the histogram of weights.

    ======================  ==============================================================================================
    `reward`                mean reward of the engine's samples, before the batch is trained on
    `rare`                  share of the sampled tokens with μ ≤ 0.01
    `entropy`               −mean log μ, nats
    `tv`, `k3`, `ratio`     mean |π − μ|, k3 and r (estimating E_μ[r]) at the batch's first step: the mismatch of number
                            formats, and of lag
    `tv_last`, …            the same at the batch's last step: with the staleness of the steps before
    `ratio_max`, `tv_max`   largest r and |π − μ| of all the batch's steps
    `norm`                  largest gradient norm of the batch's steps, before clipping
    `skipped`               steps not taken because the norm was not finite
    `kept`                  gradient mass kept relative to PG-IS, mean over the steps
    `dropped`, `corrected`  share of the active tokens with w = 0 and w < 0, mean over the steps
    `weights`               histogram over `WEIGHT_EDGES` of w at active tokens, all steps of the run
    ======================  ==============================================================================================
    """
    setting, how = SETTINGS[cell.setting], cell.training
    shape, trainer, engine = model.SHAPES[setting.architecture], TRAINERS[setting.trainer], ENGINES[setting.engine]
    chosen = objective(cell.method, cell.threshold)
    parameters = {name: p.requires_grad_() for name, p in model.copied(start).items()}
    optimiser = torch.optim.Adam(parameters.values(), lr=how.learning_rate, fused=True)
    history = [model.prepared(parameters, engine)] * (setting.lag + 1)
    generator = torch.Generator().manual_seed(1_000_003 * (cell.seed + 1))
    curves: dict[str, list[float]] = {}
    weights = torch.zeros(len(WEIGHT_EDGES) - 1, dtype=torch.int64)
    started = time.perf_counter()
    for i in range(how.rollouts):
        prompts = task.prompts(how.prompts, generator).repeat(how.samples)
        rollout = sample(history[0], shape, prompts, engine, uniforms(prompts, generator))
        rewards, batch = rewarded(rollout, task, how.samples, chosen)
        measured = []
        for part in batch.parts(how.steps):
            optimiser.zero_grad()
            _, log_prob, diagnostics = backward(parameters, shape, trainer, chosen, part)
            norm = advance(parameters, optimiser, how.clip_norm)
            measured.append({**summarize(diagnostics), "norm": norm})
            tokens = packed(part)
            found = token_loss_and_gradient(chosen, log_prob, tokens["behavior_log_prob"], tokens["advantages"])
            weights += histogram(found.weight[abs(tokens["advantages"]) > 2.0 * SMALL])
        history = [*history[1:], model.prepared(parameters, engine)]
        for name, value in _summary(rewards, rollout, measured).items():
            curves.setdefault(name, []).append(value)
        progress(i + 1)
    return {"curves": curves, "weights": weights.tolist(), "seconds": time.perf_counter() - started}


def _summary(rewards: torch.Tensor, rollout: Rollout, measured: list[dict[str, float]]) -> dict[str, float]:
    sampled = rollout.behavior_log_prob[rollout.mask]
    first, last = measured[0], measured[-1]

    def mean(name: str) -> float:
        # NaN at a step without active tokens: leave it out
        values = [m[name] for m in measured if not math.isnan(m[name])]
        return sum(values) / len(values) if values else math.nan

    return {
        "reward": float(rewards.mean()),
        "rare": float((sampled <= RARE).float().mean()),
        "entropy": float(-sampled.mean()),
        "tv": first["binary_tv_mean"],
        "k3": first["k3_mean"],
        "ratio": first["ratio_mean"],
        "tv_last": last["binary_tv_mean"],
        "k3_last": last["k3_mean"],
        "ratio_last": last["ratio_mean"],
        "ratio_max": max(m["ratio_max"] for m in measured),
        "tv_max": max(m["binary_tv_max"] for m in measured),
        "norm": max((m["norm"] for m in measured if math.isfinite(m["norm"])), default=math.nan),
        "skipped": float(sum(not math.isfinite(m["norm"]) for m in measured)),
        "kept": mean("gradient_mass_kept"),
        "dropped": mean("dropped_fraction"),
        "corrected": mean("corrective_fraction"),
    }
