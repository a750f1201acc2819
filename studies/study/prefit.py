"""Supervised steps on demonstrations until the policy is sometimes right: the start of every run of a seed."""

from __future__ import annotations

import torch

from study import model
from study.precision import Float32
from study.rollout import sample, uniforms
from study.task import PROMPT, Task

BATCH, LEARNING_RATE, MOST_STEPS, EVERY = 128, 3e-3, 3000, 25
ENOUGH = 0.15
"""Stop at the first check with at least this reward. Starts are to lie between 0.1 and 0.4."""
BALANCE = 0.01


def prefit(architecture: str, seed: int, task: Task) -> tuple[model.Parameters, dict[str, float]]:
    """Pre-fitted parameters, with the number of steps and the reward of the last check."""
    shape, precision = model.SHAPES[architecture], Float32()
    parameters = {name: p.requires_grad_() for name, p in model.initial(shape, seed).items()}
    optimiser = torch.optim.Adam(parameters.values(), lr=LEARNING_RATE, fused=True)
    generator = torch.Generator().manual_seed(seed)
    reward, step = 0.0, 0
    while reward < ENOUGH and step < MOST_STEPS:
        step += 1
        prompts = task.prompts(BATCH, generator)
        responses, mask = task.demonstrations(prompts, generator)
        inputs = torch.cat([prompts.tokens, responses[:, :-1]], 1)
        states, imbalance = model.hidden_states(parameters, shape, inputs, precision)
        loss = torch.nn.functional.cross_entropy(model.logits(parameters, states[:, PROMPT - 1 :][mask]), responses[mask])
        optimiser.zero_grad()
        (loss + BALANCE * imbalance).backward()
        optimiser.step()
        if step % EVERY == 0:
            prompts = task.prompts(512, generator)
            rollout = sample(parameters, shape, prompts, precision, uniforms(prompts, generator))
            reward = float(task.reward(prompts, rollout.responses).mean())
    return model.copied(parameters), {"steps": step, "reward": reward}
