"""From hidden states and the LM head to log-probs, and the gradients of any loss of them back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from drpo_torch import linear_log_prob

import peers
from linear import HIDDEN, LOW_MEMORY
from measure import Case, extra_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    # hidden, weight, ids → log π, and the entropy or None
    Primitive = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]

UNFUSED = "log_softmax of all logits"


def _unfused(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, None]:
    logits = hidden @ weight.T
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0], None


def _ours(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    found = linear_log_prob(hidden=hidden, weight=weight, tokens=ids, **options)
    return found.log_prob, found.entropy


def primitives() -> dict[str, Primitive]:
    """The textbook's, ours, and the peers that can be imported."""
    found: dict[str, Primitive] = {UNFUSED: _unfused}
    for engine in ("arrays", "compiled"):
        found[f"ours, {engine}"] = partial(_ours, engine=engine)
        found[f"ours, {engine}, entropy"] = partial(_ours, engine=engine, entropy=True)
    found["ours, compiled, entropy, low memory"] = partial(_ours, engine="compiled", entropy=True, **LOW_MEMORY)
    return found | peers.linear_log_probs()


class Inputs:
    """Hidden states and a head of a dtype, and the cotangent of each log-prob and entropy."""

    def __init__(self, n: int, v: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(n, HIDDEN).to(dtype).requires_grad_()
        self.weight = (0.05 * torch.randn(v, HIDDEN)).to(dtype).requires_grad_()
        self.ids = torch.randint(0, v, (n,))
        self.of_log_prob, self.of_entropy = torch.randn(n) / n, 0.01 * torch.randn(n) / n

    def step(self, primitive: Primitive) -> torch.Tensor:
        """Both passes; the log-probs."""
        self.hidden.grad = self.weight.grad = None
        log_prob, entropy = primitive(self.hidden, self.weight, self.ids)
        loss = (log_prob * self.of_log_prob).sum()
        if entropy is not None and entropy.requires_grad:
            loss = loss + (entropy * self.of_entropy).sum()
        loss.backward()
        return log_prob.detach()


def cases(n: int, v: int, dtype: torch.dtype, seconds: float) -> Iterator[Case]:
    """One shape and dtype."""
    name, inputs = str(dtype).removeprefix("torch."), Inputs(n, v, dtype)
    about = f"hidden 1024 → log π → ∂hidden, ∂weight, N = {n}, V = {v:,}, {name}"
    functions: dict[str, Callable[[], object]] = {
        label: partial(inputs.step, primitive) for label, primitive in primitives().items()
    }
    yield Case(f"log-prob {name}", about, n, functions, seconds=seconds)


def errors(n: int, v: int, dtype: torch.dtype) -> dict[str, tuple[float, float, float]]:
    """Largest error of log π in nats, and of ∂hidden and ∂weight beside their largest element; the truth is float64's."""
    inputs, exact = Inputs(n, v, dtype), Inputs(n, v, torch.float64)
    exact.hidden, exact.weight = (x.detach().double().requires_grad_() for x in (inputs.hidden, inputs.weight))
    truth = exact.step(_unfused)

    def of(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one.double() - other).abs().max() / other.abs().max())

    found = {}
    for label, primitive in primitives().items():
        # an entropy's gradient would be another truth
        log_prob = inputs.step(lambda *a, take=primitive: (take(*a)[0], None))
        assert inputs.hidden.grad is not None
        assert inputs.weight.grad is not None
        assert exact.hidden.grad is not None
        assert exact.weight.grad is not None
        worst = float((log_prob.double() - truth).abs().max())
        found[label] = worst, of(inputs.hidden.grad, exact.hidden.grad), of(inputs.weight.grad, exact.weight.grad)
    return found


def peak(label: str, dtype: str) -> int:
    """Bytes beyond inputs and gradients that both passes need, N = 512, V = 151,936."""
    n, v, kind = 512, 151_936, getattr(torch, dtype)
    primitive = primitives()[label]
    # what libraries allocate at their first product is not the call's
    Inputs(8, 64, kind).step(primitive)
    inputs = Inputs(n, v, kind)
    return extra_memory(lambda: inputs.step(primitive)) - HIDDEN * (n + v) * kind.itemsize
