"""What a GPU computes beside float64: each check is a call on the device in a dtype, and the same one on the CPU.

The CPU's is by array operations in float64, from the same numbers, those that the dtype can hold. On the device
``engine="compiled"`` raises where a kernel has not passed its trial.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from drpo_core import DPPO, DRPO, PPOClip, modes
from drpo_torch import (
    Support,
    TopKDivergence,
    full_divergences,
    linear_log_prob,
    linear_policy_loss,
    logits_policy_loss,
    policy_loss,
    token_log_prob,
    top_k_divergences,
)
from drpo_torch.engines.trial import TOLERANCE

from launches import arguments_for, tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpu_device import Device, Sizes

    Tensors = dict[str, torch.Tensor]
    # tensors, engine → results by name
    Call = Callable[[Tensors, str], Tensors]

__all__ = ["checks"]

OBJECTIVES = {"DRPO": DRPO(delta=0.15), "PPOClip": PPOClip(eps=0.2), "DPPO": DPPO(delta=0.1), "GSPO": modes.verl("gspo")}
LIMITS = {dtype: TOLERANCE[dtype] for dtype in (torch.float32, torch.bfloat16)}
OF_PRODUCTS = LIMITS | {torch.bfloat16: 2.0**-4}
"""The same where logits are products, which are rounded to the dtype."""
TOP_K = 5


class Check(NamedTuple):
    """A largest error beside the largest number, and what it may be."""

    error: float
    limit: float


def checks(device: Device) -> Iterator[tuple[str, Callable[[], Check]]]:
    """Each by its name; of a miniature every other one, so that each call is made in one of the dtypes."""
    of_dtypes = _of_dtypes(device)
    yield from islice(of_dtypes, 0, None, 2) if device.miniature else of_dtypes
    yield "rows beyond offsets of 32 bits, bfloat16", partial(_far, device)
    yield "CUDA graph of policy_loss, replayed with other numbers", partial(_replayed_tokens, device)
    yield "CUDA graph of logits_policy_loss, replayed with other numbers", partial(_replayed_logits, device)


def _of_dtypes(device: Device) -> Iterator[tuple[str, Callable[[], Check]]]:
    sizes = device.sizes
    for dtype, limit in LIMITS.items():
        name = str(dtype).removeprefix("torch.")
        given = {key: tensor.detach()[: sizes.checked_sequences] for key, tensor in tokens(dtype).items()}
        for label, objective in OBJECTIVES.items():
            yield f"policy_loss, {label}, {name}", _check(device, given, partial(_of_tokens, objective), limit)
        given = _world(sizes, dtype)
        for label, call in OF_LOGITS.items():
            yield f"{label}, {name}", _check(device, given, call, limit)
        for label, call in OF_HEAD.items():
            yield f"{label}, {name}", _check(device, given, call, OF_PRODUCTS[dtype])


def _check(device: Device, given: Tensors, call: Call, limit: float) -> Callable[[], Check]:
    def run() -> Check:
        found = call({name: tensor.to(device.device) for name, tensor in given.items()}, "compiled")
        exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
        wanted = call(exact, "arrays")
        return Check(max(_error(found[name], array) for name, array in wanted.items()), limit)

    return run


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference beside the largest number; infinite where one is not finite and the other is not the same."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    if found.shape != wanted.shape or not torch.equal(found.isfinite(), wanted.isfinite()):
        return float("inf")
    finite = wanted.isfinite()
    scale = float(wanted[finite].abs().max()) if finite.any() else 0.0
    worst = float((found - wanted)[finite].abs().max()) if finite.any() else 0.0
    return worst / (scale or 1.0)


def _of_tokens(objective: Any, given: Tensors, engine: Any) -> Tensors:
    leaf = given["log_prob"].clone().requires_grad_()
    found = arguments_for(objective, given | {"log_prob": leaf})
    loss, diagnostics = policy_loss(objective, **found, engine=engine)  # type: ignore[arg-type]
    statistics = {name: torch.stack([*fields]) for name, fields in (diagnostics or {}).items()}
    return {"loss": loss, "gradient": torch.autograd.grad(loss, leaf)[0]} | statistics


# --- from logits and from the head ---


def _world(sizes: Sizes, dtype: torch.dtype) -> Tensors:
    """Two policies; at tokens that are masked, NaN in `logits` and `hidden`."""
    n, v, h = sizes.checked, sizes.checked_vocabulary, sizes.checked_hidden
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight, behavior_hidden = 3.0 * h**-0.5 * normal(v, h), normal(n, h)
    hidden = behavior_hidden + 0.1 * normal(n, h)
    mask = torch.arange(n) % 5 != 0
    log_mu = (behavior_hidden @ weight.T).log_softmax(-1)
    top, ids = log_mu.topk(TOP_K, dim=-1)
    kept = torch.rand((n, v), generator=generator) < 0.5
    policy = hidden @ weight.T
    floats = {
        "weight": weight,
        "hidden": torch.where(mask[:, None], hidden, torch.nan),
        "logits": torch.where(mask[:, None], policy, torch.nan),
        "policy_logits": policy,
        "behavior_logits": behavior_hidden @ weight.T,
        "behavior_log_prob": top[:, 1],
        "top_k_behavior_log_prob": top,
        "advantages": normal(n),
        "temperature": 0.5 + torch.rand(n, generator=generator, dtype=torch.float64),
    }
    found = {name: tensor.to(dtype) for name, tensor in floats.items()}
    found |= {"tokens": ids[:, 1].contiguous(), "top_k_ids": ids, "mask": mask}
    return found | {"kept": kept.scatter(-1, ids, torch.ones_like(ids, dtype=torch.bool))}


def _options(given: Tensors, *, tempered: bool = False, supported: bool = False) -> dict[str, Any]:
    options: dict[str, Any] = {"temperature": given["temperature"]} if tempered else {}
    return options | ({"support": Support.from_mask(given["kept"])} if supported else {})


def _log_probs(names: tuple[str, ...], given: Tensors, engine: Any, **which: bool) -> Tensors:
    leaves = {name: given[name].clone().requires_grad_() for name in names}
    function: Any = token_log_prob if names == ("logits",) else linear_log_prob
    options = _options(given, **which)
    result = function(**leaves, tokens=given["tokens"], mask=given["mask"], entropy=True, engine=engine, **options)
    smooth = {"log_prob": result.log_prob, "entropy": result.entropy, "log_normalizer": result.log_normalizer}
    total = sum(torch.where(given["mask"], each, 0.0).sum() for each in smooth.values())
    gradients = torch.autograd.grad(total, [*leaves.values()])  # type: ignore[arg-type]
    return smooth | {f"gradient of {name}": each for name, each in zip(names, gradients, strict=True)}


def _losses(names: tuple[str, ...], given: Tensors, engine: Any, *, top_k: bool = False, **which: bool) -> Tensors:
    leaves = {name: given[name].clone().requires_grad_() for name in names}
    function: Any = logits_policy_loss if names == ("logits",) else linear_policy_loss
    options = _options(given, **which)
    objective: Any = DRPO(delta=0.15)
    if top_k:
        objective = DPPO(delta=0.3, divergence="per_token")
        recorded = given["top_k_behavior_log_prob"]
        options["divergence"] = TopKDivergence(kind="tv", ids=given["top_k_ids"], behavior_log_prob=recorded)
    beside = {name: given[name] for name in ("tokens", "behavior_log_prob", "advantages", "mask")}
    result = function(objective, **leaves, **beside, entropy_coefficient=0.01, engine=engine, **options)
    gradients = torch.autograd.grad(result.loss, [*leaves.values()])
    statistics = {name: torch.stack([*fields]) for name, fields in (result.diagnostics or {}).items()}
    found = {f"gradient of {name}": each for name, each in zip(names, gradients, strict=True)}
    return {"loss": result.loss, "log_prob": result.log_prob} | statistics | found


def _full(given: Tensors, engine: Any, **which: bool) -> Tensors:
    leaf = given["policy_logits"].clone().requires_grad_()
    options = _options(given, **which)
    found = full_divergences(logits=leaf, behavior_logits=given["behavior_logits"], engine=engine, **options)
    return found._asdict() | {"gradient": torch.autograd.grad(found.tv.sum() + found.kl.sum(), leaf)[0]}


def _top_k(given: Tensors, engine: Any) -> Tensors:
    leaf = given["policy_logits"].clone().requires_grad_()
    normalizer = token_log_prob(logits=leaf, tokens=given["tokens"], engine=engine).log_normalizer
    names = ("tokens", "behavior_log_prob", "top_k_ids", "top_k_behavior_log_prob")
    found = top_k_divergences(logits=leaf, log_normalizer=normalizer, **{name: given[name] for name in names})
    return found._asdict() | {"gradient": torch.autograd.grad(found.tv.sum() + found.kl.sum(), leaf)[0]}


LOGITS, HEAD = ("logits",), ("hidden", "weight")
OF_LOGITS: dict[str, Call] = {
    "token_log_prob": partial(_log_probs, LOGITS),
    "token_log_prob, support, temperature a token": partial(_log_probs, LOGITS, tempered=True, supported=True),
    "logits_policy_loss": partial(_losses, LOGITS),
    "logits_policy_loss, top-k divergence, support": partial(_losses, LOGITS, supported=True, top_k=True),
    "logits_policy_loss, temperature a token": partial(_losses, LOGITS, tempered=True),
    "full_divergences": _full,
    "full_divergences, support, temperature a token": partial(_full, tempered=True, supported=True),
    "top_k_divergences": _top_k,
}
OF_HEAD: dict[str, Call] = {
    "linear_log_prob": partial(_log_probs, HEAD),
    "linear_policy_loss": partial(_losses, HEAD),
    "linear_policy_loss, support, temperature a token": partial(_losses, HEAD, tempered=True, supported=True),
}


def _far(device: Device) -> Check:
    """The last rows of so many are the same as when they are alone."""
    sizes, last = device.sizes, 8
    logits = torch.zeros((sizes.far, sizes.vocabulary), dtype=torch.bfloat16, device=device.device)
    logits[-last:].normal_(generator=torch.Generator(device.device).manual_seed(0))
    leaves = [logits.requires_grad_(), logits[-last:].detach().clone().requires_grad_()]
    results = []
    for leaf in leaves:
        ids = torch.arange(len(leaf), device=device.device) * 0 + sizes.vocabulary - 1
        found = token_log_prob(logits=leaf, tokens=ids, engine="compiled").log_prob
        results.append((found[-last:], torch.autograd.grad(found.sum(), leaf)[0][-last:]))
    return Check(max(_error(one, other) for one, other in zip(*results, strict=True)), 0.0)


# --- CUDA graphs ---


def _replayed_tokens(device: Device) -> Check:
    # by flipping them, other numbers
    given = {name: tensor.detach().to(device.device)[: device.sizes.checked_sequences] for name, tensor in tokens().items()}
    names = ("log_prob", "behavior_log_prob", "advantages", "mask")
    static = {name: given[name].clone() for name in names}
    static["log_prob"].requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        loss, _ = policy_loss(DRPO(delta=0.15), **static, engine="compiled")
        return loss, *torch.autograd.grad(loss, static["log_prob"])

    return _replayed(device, static, step)


def _replayed_logits(device: Device) -> Check:
    given = {name: tensor.to(device.device) for name, tensor in _world(device.sizes, torch.bfloat16).items()}
    static = {name: given[name].clone() for name in ("logits", "tokens", "behavior_log_prob", "advantages", "mask")}
    static["logits"].requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        loss = logits_policy_loss(DRPO(delta=0.15), **static, engine="compiled").loss
        return loss, *torch.autograd.grad(loss, static["logits"])

    return _replayed(device, static, step)


@torch.no_grad()
def _overwrite(static: Tensors) -> None:
    """Other numbers in the same memory."""
    for tensor in static.values():
        tensor.copy_(tensor.detach().flip(0))


def _replayed(device: Device, static: Tensors, step: Callable[[], tuple[torch.Tensor, ...]]) -> Check:
    """A graph gives the numbers of the call, for those that it was captured with and for others."""
    wanted = []
    for _ in range(2):
        wanted.append([each.detach().clone() for each in step()])
        _overwrite(static)
    replay, results = device.captured(step)
    worst = 0.0
    for numbers in wanted:
        replay()
        worst = max(worst, *(_error(one, other) for one, other in zip(results, numbers, strict=True)))
        _overwrite(static)
    return Check(worst, 0.0)
