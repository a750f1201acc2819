"""Batches of tokens as torch tensors, and short ways to a loss and its gradient."""

import functools

import numpy as np
import pytest
import torch
from drpo_torch import policy_loss

from drpo_core import (
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_diagnostics,
    token_loss_and_gradient,
    token_mean,
)
from drpo_core.reduction import reduction_coefficients

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


TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


def awkward(shape=(4, 6), dtype=torch.float64):
    """A batch with zero advantages, extreme log-probs at valid tokens and garbage at masked ones."""
    data = batch(shape, dtype=dtype)
    values = {name: tensor.detach().reshape(-1) for name, tensor in data.items()}
    values["log_prob"][:3] = torch.tensor([-float("inf"), -0.0, -0.5])
    values["behavior_log_prob"][:3] = torch.tensor([-float("inf"), -25.0, -0.5])
    values["advantages"][3] = 0.0
    values["mask"][:4] = True
    for name, garbage in {"log_prob": float("nan"), "behavior_log_prob": float("inf"), "advantages": float("nan")}.items():
        values[name][~values["mask"]] = garbage
    return {name: tensor.reshape(shape) for name, tensor in values.items()}


def evaluated(objective, data, engine, **options):
    """Loss, gradient and diagnostics."""
    data = data | {"log_prob": data["log_prob"].detach().requires_grad_()}
    loss, statistics = policy_loss(objective, **data, engine=engine, **options)
    loss.backward()
    figures = None if statistics is None else {name: tuple(statistic) for name, statistic in statistics.items()}
    return loss.detach(), data["log_prob"].grad, figures


def of_the_core(objective, data, reduction=token_mean, **options):
    """The same from the core's functions per token on NumPy in float64, and the reduction's coefficients."""
    arrays = {name: tensor.detach().double().numpy() for name, tensor in data.items() if tensor.is_floating_point()}
    mask = data["mask"].numpy()
    tokens = {name: arrays[name] for name in ("log_prob", "behavior_log_prob", "advantages")}
    divergence = arrays.get("divergence")
    given = {
        name: value.double().numpy() if name == "token_weights" else getattr(value, "numpy", lambda value=value: value)()
        for name, value in options.items()
    }
    coefficients = np.where(mask, reduction_coefficients(reduction, mask, dtype=np.float64, **given), 0.0)
    per_token = token_loss_and_gradient(objective, **tokens, mask=mask, divergence=divergence)
    statistics = token_diagnostics(objective, **tokens, mask=mask, divergence=divergence)
    return (
        torch.tensor((coefficients * per_token.loss).sum()),
        torch.tensor(coefficients * per_token.gradient),
        {name: tuple(torch.as_tensor(field) for field in statistic) for name, statistic in statistics.items()},
    )


def assert_same(got, expected, dtype=torch.float64):
    """Loss, gradients as a whole, and each figure to the rounding of the arithmetic."""
    tolerance = TOLERANCE[dtype]
    (loss, gradient, statistics), (expected_loss, expected_gradient, expected_statistics) = got, expected
    assert (loss.dtype, loss.shape, gradient.dtype) == (dtype, (), dtype)
    torch.testing.assert_close(loss.double(), expected_loss.double(), rtol=tolerance, atol=tolerance)
    # where w ≈ 0 a gradient is a difference that cancels: relative to −A r, of size 1 here, not to itself
    size = float(expected_gradient.abs().max()) if expected_gradient.numel() else 0.0
    torch.testing.assert_close(gradient.double(), expected_gradient.double(), rtol=tolerance, atol=tolerance * size)
    if expected_statistics is None or statistics is None:
        return
    assert statistics.keys() == expected_statistics.keys()
    for name, figures in expected_statistics.items():
        for found, figure in zip(statistics[name], figures, strict=True):
            assert found.dtype == dtype, name
            options = {"rtol": 2 * tolerance, "atol": tolerance, "equal_nan": True, "msg": name}
            torch.testing.assert_close(found.double(), figure.double(), **options)
