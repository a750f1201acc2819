"""Batches of tokens for the losses at vocabulary scale, the plain formulas they are compared with, and how to look on."""

import functools
import inspect

import pytest
import torch
from drpo_torch import logits_policy_loss, policy_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import drpo_core
from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    PolicyGradient,
    PPOClip,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
)
from drpo_core.testing import from_function

OBJECTIVES = [
    PolicyGradient(),
    PolicyGradient(max_ratio=2.0),
    PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
    CISPO(max_ratio=2.0),
    SPO(eps=0.2),
    DPPO(delta=0.05),
    DPPO(delta=0.05, divergence="binary_kl"),
    DRPO(delta_low=0.1, delta_high=0.2),
    MaskDRPO(delta=0.15),
]
REDUCTIONS = [token_mean, sequence_mean_token_mean, functools.partial(sequence_mean_token_sum, horizon=7.0)]
V = 37
NAN = float("nan")

each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
each_dtype = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
each_engine = pytest.mark.parametrize("engine", ["arrays", "compiled"])


def budget(monkeypatch, size):
    """Bytes of a step's buffers, in the modules that are under test: doctests import others of that name."""
    row_kernels = inspect.unwrap(logits_policy_loss).__globals__["row_kernels"]
    workspace = row_kernels.__globals__["ArrayRows"].__init__.__globals__["Workspace"]
    monkeypatch.setitem(workspace.__init__.__globals__, "_CPU_BYTES_PER_THREAD", size // torch.get_num_threads())


def small_steps(monkeypatch):
    """Several steps and chunks even for the few tokens of a test."""
    budget(monkeypatch, 3 * V * 8)
    batch_module = inspect.unwrap(logits_policy_loss).__globals__["TokenBatch"].__init__.__globals__
    monkeypatch.setitem(batch_module["BehaviorLogits"].chunks.__globals__, "_HEAD_BYTES", 7 * V * 8)


def batch(shape=(4, 6), seed=0, dtype=torch.float64, vocabulary=V):
    """Logits near the behaviour policy's, with NaN logits, wild ids and NaN figures at masked tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    behavior_logits = 2.0 * normal(*shape, vocabulary)
    logits = behavior_logits + 0.5 * normal(*shape, vocabulary)
    tokens = torch.randint(vocabulary, shape, generator=generator)
    behavior = behavior_logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    mask = torch.rand(shape, generator=generator) < 0.7
    data = {"logits": logits, "behavior_log_prob": behavior, "advantages": normal(*shape)}
    data = {
        name: tensor.masked_fill(~mask[..., None] if tensor.ndim > mask.ndim else ~mask, NAN) for name, tensor in data.items()
    }
    data = {name: tensor.to(dtype) for name, tensor in data.items()}
    return data | {"tokens": tokens.masked_fill(~mask, -100), "mask": mask}, behavior_logits.to(dtype)


def plain(objective, data, temperature=1.0, **options):
    """The same loss through log-softmax, gather and autograd, and ∂/∂logits, in float64."""
    options = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in options.items()}
    logits = data["logits"].detach().double().requires_grad_()
    safe = torch.where(data["mask"][..., None], logits, 0.0)
    tokens = data["tokens"].clamp(min=0)
    log_prob = (safe / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    tensors = {name: data[name].double() for name in ("behavior_log_prob", "advantages")}
    loss, statistics = policy_loss(objective, log_prob=log_prob, **tensors, mask=data["mask"], **options)
    loss.backward()
    return loss.detach(), logits.grad, statistics, log_prob.detach()


def fused(objective, data, **options):
    logits = data["logits"].detach().clone().requires_grad_()
    result = logits_policy_loss(objective, **data | {"logits": logits}, **options)
    result.loss.backward()
    return result, logits.grad


def assert_close(actual, expected, tolerance):
    scale = expected.abs().max().clamp(min=1e-30)
    assert float((actual.detach().double() - expected).abs().max() / scale) <= tolerance


class Largest(TorchDispatchMode):
    """Records the most elements that a tensor newly allocated by an operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and look at it."""
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = func(*args, **kwargs)
        for t in tree_leaves(result):
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, t.numel())
        return result


def two_token_logits(log_prob, mask):
    """Logits of a vocabulary of two whose first log-prob is `log_prob`: its log-probs log π and log(1 − π), in float64.

    A log-softmax rounds log π, which the kit takes as given: float64 keeps that below the float32 it asks for. A tiny
    shift stands for π = 1, where the logits' gradient would hold nothing of that in log π.
    """
    x = torch.where(mask, log_prob.double(), -1.0) - 1e-300
    return torch.stack((x, torch.log(-torch.expm1(x))), dim=-1)


def through_the_kit(name, loss_of_logits, objective, reduction):
    """A loss of (logits of two tokens, keywords) as an implementation that the kit can check."""

    def loss(log_prob, behavior_log_prob, advantages, mask, segment_ids=None, normalizer=None):
        return loss_of_logits(
            objective,
            two_token_logits(log_prob, mask),
            tokens=torch.where(mask, 0, -100),
            behavior_log_prob=behavior_log_prob.double(),
            advantages=advantages.double(),
            mask=mask,
            segment_ids=segment_ids,
            normalizer=normalizer,
            reduction=getattr(drpo_core, reduction),
        ).float()

    return from_function(
        loss,
        "torch",
        name=f"{name}-{reduction}-{objective!r}",
        objective=objective,
        form="score" if isinstance(objective, CISPO) else "ratio",
        reduction=reduction,
        second_order="error",
        keeps_boundary=False,  # the log-softmax's rounding moves a token off it
        dtypes=("float32",),
        cost=8.0,
        family=lambda other: through_the_kit(name, loss_of_logits, other, reduction),
    )
