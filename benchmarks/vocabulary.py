"""From logits (tokens × vocabulary): log-probs, entropies, policy losses and divergences."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from drpo_core import DRPO
from drpo_torch import full_divergences, logits_policy_loss, policy_loss, token_log_prob, top_k_divergences

import peers
from measure import Case

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OBJECTIVE = DRPO(delta=0.1)


def _unfused(take: Any, logits: torch.Tensor, ids: torch.Tensor, rest: dict[str, torch.Tensor]) -> None:
    leaf = logits.detach().requires_grad_()
    policy_loss(OBJECTIVE, log_prob=take(leaf, ids), **rest)[0].backward()


def log_softmax(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The textbook's log-prob."""
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def _ours(logits: torch.Tensor, ids: torch.Tensor, rest: dict[str, torch.Tensor], **options: Any) -> None:
    leaf = logits.detach().requires_grad_()
    logits_policy_loss(OBJECTIVE, logits=leaf, tokens=ids, **options, **rest).loss.backward()


def _overwriting(buffer: torch.Tensor, *arguments: Any, **options: Any) -> None:
    # the logits of the next round are the gradient of this one. They grow, and most of a row's exponentials become 0:
    # the loops take no longer, as they have no subnormal numbers; torch's softmax may
    leaf = buffer.detach().requires_grad_()
    result = logits_policy_loss(
        OBJECTIVE, logits=leaf, tokens=arguments[0], entropy=True, overwrite_logits=True, **options, **arguments[1]
    )
    torch.autograd.grad(result.loss, leaf)


def _batch(n: int, v: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    logits, ids = 3.0 * torch.randn(n, v), torch.randint(0, v, (n,))
    behavior = log_softmax(logits, ids) + 0.1 * torch.randn(n)
    mask = torch.ones(n, dtype=torch.bool)
    return logits, ids, {"behavior_log_prob": behavior, "advantages": torch.randn(n), "mask": mask}


def cases(n: int, v: int) -> Iterator[Case]:
    """The loss from logits, divergences, and Top-K."""
    logits, ids, rest = _batch(n, v)
    functions: dict[str, Callable[[], object]] = {"log_softmax + gather": partial(_unfused, log_softmax, logits, ids, rest)}
    for label, take in peers.log_probs().items():
        functions[label] = partial(_unfused, take, logits, ids, rest)
    for engine in ("arrays", "compiled"):
        label, options = f"ours, {engine}", {"engine": engine}
        functions[label] = partial(_ours, logits, ids, rest, **options)
        functions[f"{label}, entropy"] = partial(_ours, logits, ids, rest, entropy=True, **options)
        functions[f"{label}, entropy, in the logits' storage"] = partial(_overwriting, logits.clone(), ids, rest, **options)
    yield Case("logits", f"logits → DRPO → ∂logits, N = {n}, V = {v:,}, float32", n * v, functions, seconds=20)

    other = logits + 0.1 * torch.randn(n, v)

    def naive() -> object:
        x, y = other.log_softmax(-1), logits.log_softmax(-1)
        q = y.exp()
        return 0.5 * (x.exp() - q).abs().sum(-1), (q * (y - x)).sum(-1)

    ours = partial(full_divergences, logits=other, behavior_logits=logits)
    functions = {"two log_softmax": naive} | {f"ours, {e}": partial(ours, engine=e) for e in ("arrays", "compiled")}
    yield Case("divergences", f"TV and KL of two policies, N = {n}, V = {v:,}, float32", n * v, functions, seconds=8)
    yield _top_k("top-k", logits, ids, rest["behavior_log_prob"], (20,))
    logits, ids, rest = _batch(16 * n, v)
    yield _top_k("top-k, many tokens", logits, ids, rest["behavior_log_prob"], (20,))


def growth() -> Iterator[Case]:
    """Vocabularies of 8k … 262k at the same number of logits, and K = 1 … 1024."""
    batches = {v: _batch(2**23 // v, v) for v in (2**13, 2**15, 2**17, 2**18)}
    functions: dict[str, Callable[[], object]] = {f"{v:,}": partial(_ours, *parts) for v, parts in batches.items()}
    yield Case("growth vocabulary", "logits → loss → ∂logits, 2²³ logits", 2**23, functions, seconds=6)
    logits, ids, rest = batches[2**17]
    yield _top_k("growth top-k", logits, ids, rest["behavior_log_prob"], (1, 8, 64, 1024))


def _top_k(name: str, logits: torch.Tensor, ids: torch.Tensor, behavior: torch.Tensor, sizes: tuple[int, ...]) -> Case:
    normalizer = token_log_prob(logits=logits, tokens=ids).log_normalizer
    normalize = partial(token_log_prob, logits=logits, tokens=ids)
    functions: dict[str, Callable[[], object]] = {
        f"log-sum-exp, {engine}": partial(normalize, engine=engine) for engine in ("arrays", "compiled")
    }
    for k in sizes:
        top, places = (logits - normalizer[:, None]).topk(k, -1)
        recorded = {"behavior_log_prob": behavior, "top_k_ids": places, "top_k_behavior_log_prob": top}
        functions[f"K = {k}"] = partial(top_k_divergences, logits=logits, log_normalizer=normalizer, tokens=ids, **recorded)
    n, v = logits.shape
    return Case(name, f"Top-K TV and KL beside the log-sum-exp, N = {n}, V = {v:,}, float32", n, functions, seconds=4)
