"""What is timed on a GPU: a table's case each, whose first function is the naive one that the others are compared with.

A function is None where its library is not installed. `least_bytes` and `flops` are what the work needs at least, whoever
does it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from drpo_core import DRPO
from drpo_torch import (
    full_divergences,
    linear_policy_loss,
    logits_policy_loss,
    policy_loss,
    token_log_prob,
    top_k_divergences,
)

import peers
from tokens import BYTES, DELTA, Batch, batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_device import Device

    Function = Callable[[], object]
    Loss = Callable[[], torch.Tensor]

__all__ = ["GpuCase", "cases", "copy", "product"]

OBJECTIVE = DRPO(delta=DELTA)
TOP_K = 20
LIGER_GRPO = "Liger `triton_grpo_loss`, its own loss"
LIGER_LOG_SOFTMAX = "Liger `fused_selective_log_softmax`"


class GpuCase(NamedTuple):
    """Functions that do the same work, by label."""

    name: str
    about: str
    least_bytes: int
    flops: int
    functions: dict[str, Function | None]


def cases(device: Device) -> dict[str, Callable[[], GpuCase]]:
    """What makes each, by name: its tensors exist no longer than it does."""
    shapes = {f"tokens {shape}": partial(_tokens, device, shape) for shape in device.sizes.tokens}
    of_rows = {"logits": _logits, "log-probs": _log_probs, "head": _head, "divergences": _divergences, "top-k": _top_k}
    return shapes | {name: partial(make, device) for name, make in of_rows.items()}


def copy(device: Device) -> tuple[int, Function]:
    """Bytes read and written by a copy."""
    source = torch.ones(device.sizes.copied, dtype=torch.uint8, device=device.device)
    return 2 * source.numel(), partial(torch.empty_like(source).copy_, source)


def product(device: Device) -> tuple[int, Function]:
    """FLOPs of the product of hidden states and the head, bfloat16."""
    hidden, weight = _hidden_and_weight(device)
    out = torch.empty((len(hidden), len(weight)), dtype=hidden.dtype, device=device.device)
    return 2 * hidden.numel() * len(weight), partial(torch.mm, hidden.detach(), weight.detach().T, out=out)


def naive(
    log_prob: torch.Tensor, behavior_log_prob: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """DRPO written from its formula, a mean over tokens."""
    ratio, mu, counted = torch.exp(log_prob - behavior_log_prob), torch.exp(behavior_log_prob), mask.float()
    losses = -advantages * ratio + advantages.abs() * mu * (ratio - 1.0) ** 2 / (2.0 * DELTA)
    return (losses * counted).sum() / counted.sum()


def _step(loss: Loss, *leaves: torch.Tensor) -> Function:
    """Both passes of a loss."""

    def step() -> tuple[torch.Tensor, ...]:
        found = loss()
        return found.detach(), *torch.autograd.grad(found, leaves)

    return step


# --- per token ---


def _tokens(device: Device, shape: tuple[int, int]) -> GpuCase:
    given = Batch(*(tensor.detach().to(device.device) for tensor in batch(shape)))
    leaf = given.log_prob.requires_grad_()

    def ours(**options: Any) -> torch.Tensor:
        return policy_loss(OBJECTIVE, **given._asdict(), **options)[0]

    step = partial(_step, partial(ours, diagnostics=True), leaf)
    functions: dict[str, Function | None] = {
        "autograd of the formula": _step(partial(naive, *given), leaf),
        "the same, `torch.compile`": _step(partial(device.compiled(naive), *given), leaf),
        "ours": _step(partial(ours, diagnostics=False), leaf),
        "ours, diagnostics": step(),
        "ours, diagnostics, CUDA graph": _Graph(device, step()),
        "ours, arrays": _step(partial(ours, diagnostics=False, engine="arrays"), leaf),
        "ours, arrays, diagnostics": _step(partial(ours, diagnostics=True, engine="arrays"), leaf),
    }
    n = leaf.numel()
    return GpuCase(f"tokens {shape}", f"DRPO, loss and gradient of {n:,} tokens, float32", n * BYTES, 0, functions)


class _Graph:
    """Captured at the first call, replayed at the others."""

    def __init__(self, device: Device, function: Function) -> None:
        self._device, self._function = device, function
        self._replay: Function | None = None

    def __call__(self) -> object:
        if self._replay is None:
            self._replay, self._results = self._device.captured(self._function)
        return self._replay()


# --- from logits ---


def _rows(device: Device) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """Logits in bfloat16, and sampled tokens."""
    n, v = device.sizes.rows, device.sizes.vocabulary
    generator = torch.Generator(device.device).manual_seed(0)
    logits = torch.empty((n, v), dtype=torch.bfloat16, device=device.device).normal_(0.0, 3.0, generator=generator)
    return logits, torch.randint(0, v, (n,), generator=generator, device=device.device), generator


def _beside(log_prob: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A behaviour policy near this one, advantages and a mask."""
    steps, advantages = (torch.randn(log_prob.shape, generator=generator, device=log_prob.device) for _ in range(2))
    behavior = (log_prob + 0.1 * steps).clamp(max=0.0)
    return {"behavior_log_prob": behavior, "advantages": advantages, "mask": torch.ones_like(behavior, dtype=torch.bool)}


def _log_softmax(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The textbook's log-prob, in float32."""
    return logits.log_softmax(-1, dtype=torch.float32).gather(-1, ids[:, None])[:, 0]


def _logits(device: Device) -> GpuCase:
    logits, ids, generator = _rows(device)
    rest = _beside(token_log_prob(logits=logits, tokens=ids).log_prob, generator)
    logits.requires_grad_()

    def of_formula() -> torch.Tensor:
        return naive(_log_softmax(logits, ids), **rest)

    def ours(**options: Any) -> torch.Tensor:
        return logits_policy_loss(OBJECTIVE, logits=logits, tokens=ids, **rest, **options).loss

    grpo = peers.liger_grpo()
    # it takes a token more than it looks at
    of_liger = rest["behavior_log_prob"][None, :-1], rest["advantages"][:1]
    liger = grpo and partial(grpo, logits[None], ids[None, :-1], *of_liger)
    losses: dict[str, Loss | None] = {
        "autograd of log_softmax": of_formula,
        "the same, `torch.compile`": device.compiled(of_formula),
        "ours": ours,
        "ours, entropy": partial(ours, entropy=True),
        "ours, arrays": partial(ours, engine="arrays"),
        LIGER_GRPO: liger,
    }
    about = f"logits → DRPO → ∂logits, {_size(logits)}"
    functions = {label: loss and _step(loss, logits) for label, loss in losses.items()}
    return GpuCase("logits", about, 6 * logits.numel(), 0, functions)


def _log_probs(device: Device) -> GpuCase:
    logits, ids, _ = _rows(device)
    take = peers.liger_log_softmax()

    def ours(**options: Any) -> torch.Tensor:
        return token_log_prob(logits=logits, tokens=ids, **options).log_prob

    functions: dict[str, Function | None] = {
        "log_softmax": partial(_log_softmax, logits, ids),
        "the same, `torch.compile`": partial(device.compiled(_log_softmax), logits, ids),
        "ours": ours,
        "ours, arrays": partial(ours, engine="arrays"),
        LIGER_LOG_SOFTMAX: take and partial(take, logits[None], ids[None, :-1]),
    }
    return GpuCase("log-probs", f"logits → log π, forward, {_size(logits)}", 2 * logits.numel(), 0, functions)


# --- from the head ---


def _hidden_and_weight(device: Device) -> tuple[torch.Tensor, torch.Tensor]:
    sizes, generator = device.sizes, torch.Generator(device.device).manual_seed(0)
    shapes = {(sizes.rows, sizes.hidden): 1.0, (sizes.vocabulary, sizes.hidden): 3.0 * sizes.hidden**-0.5}
    made: dict[str, Any] = {"dtype": torch.bfloat16, "device": device.device}
    hidden, weight = (torch.empty(s, **made).normal_(0.0, width, generator=generator) for s, width in shapes.items())
    return hidden.requires_grad_(), weight.requires_grad_()


def _head(device: Device) -> GpuCase:
    hidden, weight = _hidden_and_weight(device)
    generator, chunk = torch.Generator(device.device).manual_seed(1), device.sizes.chunk
    ids = torch.randint(0, len(weight), (len(hidden),), generator=generator, device=device.device)
    # about the logarithm of one id among as many
    rest = _beside(torch.full((len(ids),), -torch.tensor(len(weight)).log().item(), device=device.device), generator)

    def of_formula() -> torch.Tensor:
        return naive(_log_softmax(hidden @ weight.T, ids), **rest)

    def ours(**options: Any) -> torch.Tensor:
        return linear_policy_loss(OBJECTIVE, hidden=hidden, weight=weight, tokens=ids, **rest, **options).loss

    losses: dict[str, Loss | None] = {
        "unfused": of_formula,
        "the same, `torch.compile`": device.compiled(of_formula),
        "ours": ours,
        f"ours, chunks of {chunk:,}": partial(ours, chunk_tokens=chunk),
        f"ours, chunks of {chunk:,}, arrays": partial(ours, chunk_tokens=chunk, engine="arrays"),
    }
    of_log_prob = partial(naive, **rest)
    found = peers.heads(chunk)
    for label in peers.head_labels(chunk):
        head = found.get(label)
        arguments = hidden, weight, ids, rest["behavior_log_prob"], rest["advantages"], of_log_prob
        losses[label] = head and partial(head, *arguments)
    about = f"hidden {hidden.shape[1]:,} → DRPO → ∂hidden, ∂weight, N = {len(hidden):,}, V = {len(weight):,}, bfloat16"
    functions = {label: loss and _step(loss, hidden, weight) for label, loss in losses.items()}
    return GpuCase("head", about, 0, 6 * hidden.numel() * len(weight), functions)


# --- divergences ---


def _divergences(device: Device) -> GpuCase:
    logits, _, generator = _rows(device)
    other = logits + 0.1 * torch.randn(logits.shape, dtype=logits.dtype, device=logits.device, generator=generator)

    def of_formula(logits: torch.Tensor, behavior: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (each.log_softmax(-1, dtype=torch.float32) for each in (logits, behavior))
        mu = y.exp()
        return 0.5 * (x.exp() - mu).abs().sum(-1), (mu * (y - x)).sum(-1)

    ours = partial(full_divergences, logits=other, behavior_logits=logits)
    functions: dict[str, Function | None] = {
        "two log_softmax": partial(of_formula, other, logits),
        "the same, `torch.compile`": partial(device.compiled(of_formula), other, logits),
        "ours": ours,
        "ours, arrays": partial(ours, engine="arrays"),
    }
    return GpuCase("divergences", f"TV and KL of two policies, forward, {_size(logits)}", 4 * logits.numel(), 0, functions)


def _top_k(device: Device) -> GpuCase:
    logits, ids, _ = _rows(device)
    found = token_log_prob(logits=logits, tokens=ids)
    places = logits.topk(TOP_K, -1).indices
    recorded = logits.gather(-1, places).float() - found.log_normalizer[:, None]
    mu, behavior = recorded.exp(), found.log_prob

    def of_formula(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = logits.log_softmax(-1, dtype=torch.float32).gather(-1, places)
        rest = 1.0 - x.exp().sum(-1), 1.0 - mu.sum(-1)
        tv = 0.5 * ((x.exp() - mu).abs().sum(-1) + (rest[0] - rest[1]).abs())
        return tv, (mu * (recorded - x)).sum(-1) + rest[1] * (rest[1] / rest[0]).log()

    def ours(**options: Any) -> object:
        normalizer = token_log_prob(logits=logits, tokens=ids, **options).log_normalizer
        top = {"behavior_log_prob": behavior, "top_k_ids": places, "top_k_behavior_log_prob": recorded}
        return top_k_divergences(logits=logits, log_normalizer=normalizer, tokens=ids, **top)

    functions: dict[str, Function | None] = {
        "log_softmax": partial(of_formula, logits),
        "the same, `torch.compile`": partial(device.compiled(of_formula), logits),
        "ours, with the normaliser": ours,
        "ours, arrays": partial(ours, engine="arrays"),
    }
    about = f"top-{TOP_K} TV and KL of logits and recorded log μ, forward, {_size(logits)}"
    return GpuCase("top-k", about, 2 * logits.numel(), 0, functions)


def _size(logits: torch.Tensor) -> str:
    n, v = logits.shape
    return f"N = {n:,}, V = {v:,}, bfloat16"
