"""From hidden states and the LM head to the loss, ∂hidden and ∂weight."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from drpo_core import DRPO
from drpo_torch import linear_policy_loss, policy_loss

import peers
from measure import Case, extra_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Function = Callable[[], object]

OBJECTIVE = DRPO(delta=0.15)
HIDDEN = 1024
PRODUCTS = "the three products alone"
LOW_MEMORY = {"chunk_tokens": 1024, "chunk_vocabulary": 6144}


def functions(n: int, v: int, dtype: torch.dtype, *, with_peers: bool) -> dict[str, Function]:
    """Unfused, ours, the peers that can be imported and the products that all of them need."""
    torch.manual_seed(0)
    hidden = torch.randn(n, HIDDEN, dtype=dtype).requires_grad_()
    weight = (0.02 * torch.randn(v, HIDDEN)).to(dtype).requires_grad_()
    ids, behavior, advantages = torch.randint(0, v, (n,)), torch.full((n,), -11.9), torch.randn(n)
    rest = {"behavior_log_prob": behavior, "advantages": advantages, "mask": torch.ones(n, dtype=torch.bool)}

    def backward(loss: Callable[[], torch.Tensor]) -> None:
        hidden.grad = weight.grad = None
        loss().backward()

    def of_log_prob(log_prob: torch.Tensor) -> torch.Tensor:
        return policy_loss(OBJECTIVE, log_prob=log_prob, **rest)[0]

    def unfused() -> torch.Tensor:
        logits = (hidden @ weight.T).float()
        return of_log_prob(logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])

    def ours(**changed: Any) -> torch.Tensor:
        return linear_policy_loss(OBJECTIVE, hidden=hidden, weight=weight, tokens=ids, **(rest | changed)).loss

    half = torch.arange(n) % 2 == 0
    losses: dict[str, Callable[[], torch.Tensor]] = {"unfused": unfused}
    for engine in ("arrays", "compiled"):
        losses[f"ours, {engine}"] = partial(ours, engine=engine)
        losses[f"ours, {engine}, half of the tokens masked"] = partial(ours, engine=engine, mask=half)
        losses[f"ours, {engine}, low memory"] = partial(ours, engine=engine, **LOW_MEMORY)
    for label, head in peers.heads().items() if with_peers else ():
        losses[label] = partial(head, hidden, weight, ids, behavior, advantages, of_log_prob)
    found: dict[str, Function] = {label: partial(backward, loss) for label, loss in losses.items()}
    found[PRODUCTS] = _products(hidden.detach(), weight.detach())
    return found


def _products(hidden: torch.Tensor, weight: torch.Tensor) -> Function:
    """Logits, ∂hidden and ∂weight as products of whole matrices, into memory that is there: nobody can do without them."""
    # untouched pages take no memory, so that `peak` does not see them
    logits, of_hidden, of_weight = (
        hidden.new_empty(len(hidden), len(weight)),
        torch.empty_like(hidden),
        torch.empty_like(weight),
    )

    def multiply() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=of_hidden)
        torch.mm(logits.T, hidden, out=of_weight)

    return multiply


def cases(n: int, v: int, dtype: torch.dtype, seconds: float, *, with_peers: bool) -> Iterator[Case]:
    """One shape and dtype."""
    name = str(dtype).removeprefix("torch.")
    about = f"hidden 1024 → DRPO → ∂hidden, ∂weight, N = {n}, V = {v:,}, {name}"
    yield Case(f"linear {n} {name}", about, n, functions(n, v, dtype, with_peers=with_peers), seconds=seconds)


def peak(label: str, dtype: str) -> int:
    """Bytes beyond inputs and gradients that one call needs, N = 512, V = 151,936."""
    n, v, kind = 512, 151_936, getattr(torch, dtype)
    function = functions(n, v, kind, with_peers=False)[label]
    # what libraries allocate at their first product is not the call's
    functions(8, 64, kind, with_peers=False)[label]()
    return extra_memory(function) - HIDDEN * (n + v) * kind.itemsize
