"""Batches of tokens as torch tensors, and short ways to a loss and its gradient."""

import functools

import pytest
import torch
from drpo_torch import policy_loss

from drpo_core import sequence_mean_token_mean, sequence_mean_token_sum, token_mean

REDUCTIONS = {
    "token-mean": token_mean,
    "seq-mean-token-mean": sequence_mean_token_mean,
    "seq-mean-token-sum": functools.partial(sequence_mean_token_sum, horizon=7.0),
}
ENGINES = ("arrays", "compiled")

each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)
each_engine = pytest.mark.parametrize("engine", ENGINES)


def batch(shape=(4, 6), seed=0, dtype=torch.float64):
    """Tokens with ratios on both sides of every threshold; log π requires a gradient."""
    generator = torch.Generator().manual_seed(seed)
    behavior = -3.0 * torch.rand(shape, generator=generator, dtype=dtype) - 0.01
    log_prob = (behavior + 0.8 * torch.randn(shape, generator=generator, dtype=dtype)).clamp(max=-0.001)
    return {
        "log_prob": log_prob.requires_grad_(),
        "behavior_log_prob": behavior,
        "advantages": torch.randn(shape, generator=generator, dtype=dtype),
        "mask": torch.rand(shape, generator=generator) < 0.7,
        "divergence": 0.3 * torch.rand(shape, generator=generator, dtype=dtype),
    }


def packed(data):
    """The same tokens, one sequence after another, and whose they are."""
    flat = {name: tensor.detach().reshape(-1) for name, tensor in data.items()}
    rows = torch.arange(data["mask"].numel(), device=data["mask"].device) // data["mask"].shape[-1]
    return flat | {"log_prob": flat["log_prob"].requires_grad_(), "segment_ids": rows}


def in_log_prob(objective, data, function=policy_loss, **options):
    """The loss as a function of `log_prob` alone."""

    def loss(log_prob):
        result = function(objective, **data | {"log_prob": log_prob}, **options)
        return result[0] if isinstance(result, tuple) else result

    return loss


def gradient_of(objective, data, **options):
    """Gradient of the policy loss in `log_prob`."""
    log_prob = data["log_prob"].detach().clone().requires_grad_()
    policy_loss(objective, **data | {"log_prob": log_prob}, **options)[0].backward()
    return log_prob.grad
