"""Sampling responses with an inference copy of the policy: what it sampled, and the log-probs it says they had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from study import model
from study.task import END, RESPONSE, Prompts, response_mask

if TYPE_CHECKING:
    from study.model import Parameters, Shape
    from study.precision import Float32


@dataclass(frozen=True, slots=True)
class Rollout:
    """Responses (sequences, RESPONSE) with log μ in nats, and the mask of their tokens."""

    prompts: Prompts
    responses: torch.Tensor
    behavior_log_prob: torch.Tensor
    mask: torch.Tensor

    @property
    def inputs(self) -> torch.Tensor:
        """What the policy reads: prompt and response without its last token."""
        return torch.cat([self.prompts.tokens, self.responses[:, :-1]], 1)

    def rows(self, which: torch.Tensor | slice) -> Rollout:
        """Some of the sequences."""
        return Rollout(
            Prompts(self.prompts.tokens[which]), self.responses[which], self.behavior_log_prob[which], self.mask[which]
        )


def uniforms(prompts: Prompts, generator: torch.Generator) -> torch.Tensor:
    """The numbers in [0, 1) that decide what is sampled, one a token: (prompts, RESPONSE)."""
    return torch.rand(prompts.tokens.shape[0], RESPONSE, generator=generator, dtype=torch.float64)


@torch.no_grad()
def sample(engine: Parameters, shape: Shape, prompts: Prompts, precision: Float32, u: torch.Tensor) -> Rollout:
    """One response a prompt at temperature 1, by inversion: the same numbers give near policies near samples."""
    number = prompts.tokens.shape[0]
    cache = model.Cache.empty(shape, number, precision.dtype)
    tokens = prompts.tokens
    chosen, log_probs = [], []
    for t in range(RESPONSE):
        states, _ = model.hidden_states(engine, shape, tokens, precision, cache)
        log_prob = model.logits(engine, states[:, -1]).log_softmax(-1)
        cumulative = log_prob.double().exp().cumsum(-1)
        tokens = torch.searchsorted(cumulative, u[:, t : t + 1] * cumulative[:, -1:], right=True)
        tokens = tokens.clamp(max=log_prob.shape[-1] - 1)
        chosen.append(tokens)
        log_probs.append(log_prob.gather(1, tokens))
    responses = torch.cat(chosen, 1)
    mask = response_mask(responses)
    return Rollout(prompts, torch.where(mask, responses, END), torch.cat(log_probs, 1), mask)
