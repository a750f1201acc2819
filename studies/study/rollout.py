"""Sampling with an inference copy of the policy: responses, and their log-probs as that copy computed them."""

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
        """The policy's input: the prompt, then the response without its last token."""
        return torch.cat([self.prompts.tokens, self.responses[:, :-1]], 1)

    def rows(self, which: torch.Tensor | slice) -> Rollout:
        """The rollout of some of the sequences."""
        return Rollout(
            Prompts(self.prompts.tokens[which]), self.responses[which], self.behavior_log_prob[which], self.mask[which]
        )


def uniforms(prompts: Prompts, generator: torch.Generator) -> torch.Tensor:
    """A uniform number in [0, 1) for each token to sample, (prompts, RESPONSE)."""
    return torch.rand(prompts.tokens.shape[0], RESPONSE, generator=generator, dtype=torch.float64)


TOKENS_PER_BLOCK = 64


def inverted(logits: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token at which the cumulative probability passes u, and its log-prob, (rows, 1) each. Overwrites the logits.

    First it finds the token's block, then the place in the block: a cumulative sum over all tokens would cost more than
    the model.
    """
    rows = torch.arange(logits.shape[0])
    share = logits.sub_(logits.amax(-1, keepdim=True)).exp_().unflatten(-1, (-1, TOKENS_PER_BLOCK))
    sums = share.sum(-1).double()
    cumulative = sums.cumsum(-1)
    target = u * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True).clamp(max=sums.shape[-1] - 1)
    within = share[rows, block[:, 0]].double().cumsum(-1)
    before = cumulative.gather(1, block) - sums.gather(1, block)
    token = TOKENS_PER_BLOCK * block + torch.searchsorted(within, target - before, right=True).clamp(max=TOKENS_PER_BLOCK - 1)
    return token, (share.flatten(1).gather(1, token) / cumulative[:, -1:]).log().float()


@torch.no_grad()
def sample(engine: Parameters, shape: Shape, prompts: Prompts, precision: Float32, u: torch.Tensor) -> Rollout:
    """A response for each prompt at temperature 1, by inversion: with the same u, similar policies give similar samples."""
    # all samples of a prompt share its states
    distinct, of = prompts.tokens.unique_consecutive(dim=0, return_inverse=True)
    cache = model.Cache.empty(shape, distinct.shape[0], precision.dtype)
    states, _ = model.hidden_states(engine, shape, distinct, precision, cache)
    states, cache = states[of], cache.rows(of)
    chosen, log_probs = [], []
    for t in range(RESPONSE):
        if t > 0:
            states, _ = model.hidden_states(engine, shape, chosen[-1], precision, cache)
        token, log_prob = inverted(model.logits(engine, states[:, -1]), u[:, t : t + 1])
        chosen.append(token)
        log_probs.append(log_prob)
    responses = torch.cat(chosen, 1)
    mask = response_mask(responses)
    return Rollout(prompts, torch.where(mask, responses, END), torch.cat(log_probs, 1), mask)
