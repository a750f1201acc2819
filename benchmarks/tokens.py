"""Per-token losses: log π, log μ, A and a mask in, the loss and ∂loss/∂log π out."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    Objective,
    PolicyGradient,
    PPOClip,
    modes,
    policy_loss_and_gradient,
)
from drpo_core.engines import numba_loop
from drpo_core.loss import CHUNK, policy_pass
from drpo_torch import policy_loss
from drpo_torch.engines.threads import in_threads

import peers
from measure import Case

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Function = Callable[[], object]

DELTA = 0.15
BYTES = 17
"""Per token, at least: read log π, log μ and A in float32 and a mask of one byte, write the gradient."""

OBJECTIVES: dict[str, Objective] = {
    "DRPO": DRPO(delta=DELTA),
    "MaskDRPO": MaskDRPO(delta=DELTA),
    "policy gradient": PolicyGradient(max_ratio=2.0),
    "PPO clip": PPOClip(eps=0.2, dual_clip=3.0),
    "CISPO": CISPO(max_ratio=5.0),
    "SPO": SPO(eps=0.2),
    "DPPO, Binary TV": DPPO(delta=DELTA),
    "DPPO, Binary KL": DPPO(delta=0.05, divergence="binary_kl"),
}


class Batch(NamedTuple):
    """A fifth of the tokens is masked."""

    log_prob: torch.Tensor
    behavior_log_prob: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor


def batch(shape: tuple[int, ...]) -> Batch:
    """Tokens of a policy that has moved by 0.1 nats."""
    generator = torch.Generator().manual_seed(0)
    log_prob = -5.0 * torch.rand(shape, generator=generator)
    behavior = (log_prob + 0.1 * torch.randn(shape, generator=generator)).clamp(max=0.0)
    mask = torch.rand(shape, generator=generator) < 0.8
    return Batch(log_prob.requires_grad_(), behavior, torch.randn(shape, generator=generator), mask)


def autograd(tokens: Batch, *, metrics: bool = False) -> object:
    """DRPO written from its formula, differentiated by autograd; six metrics of the kind that trainers log."""
    log_prob, behavior, advantages, mask = tokens
    log_prob.grad = None
    ratio, mu, counted = torch.exp(log_prob - behavior), torch.exp(behavior), mask.float()
    losses = -advantages * ratio + advantages.abs() * mu * (ratio - 1.0) ** 2 / (2.0 * DELTA)
    loss = (losses * counted).sum() / counted.sum()
    loss.backward()
    if metrics:
        with torch.no_grad():
            shift, n = (log_prob.exp() - mu).abs(), counted.sum()
            means = (ratio, shift, (shift > DELTA).float(), ratio - 1.0 - (log_prob - behavior))
            _ = [((value * counted).sum() / n).item() for value in means]
            _ = [(value * counted).max().item() for value in (ratio, shift)]
    return loss


def ours(
    tokens: Batch, engine: Any, *, diagnostics: bool = False, objective: Any = OBJECTIVES["DRPO"], **others: Any
) -> object:
    """The adapter's loss and its backward pass."""
    tokens.log_prob.grad = None
    loss, _ = policy_loss(objective, **tokens._asdict(), engine=engine, diagnostics=diagnostics, **others)
    loss.backward()
    return loss


def stream(tokens: Batch) -> Function:
    """Reads three arrays and writes one, 16 bytes a token, as fast as torch does."""
    x, b, a = (value.detach() for value in tokens[:3])
    return partial(torch.addcmul, x, b, a, out=torch.empty_like(x))


def cases(shape: tuple[int, ...], threads: int) -> Iterator[Case]:
    """All of these tables for one shape."""
    tokens = batch(shape)
    n, shown = tokens.mask.numel(), f"{shape} float32"
    functions: dict[str, Function] = {
        "torch eager autograd of the formula": partial(autograd, tokens),
        "the same, with six `.item()` metrics": partial(autograd, tokens, metrics=True),
        "bandwidth probe (`torch.addcmul`, 16 B a token)": stream(tokens),
    }
    functions["torch's exp, exp and expm1 alone"] = _transcendental(
        tokens.log_prob.detach().reshape(-1), CHUNK * threads, torch
    )
    functions["NumPy's exp, exp and expm1 alone"] = _transcendental(tokens.log_prob.detach().numpy().reshape(-1), CHUNK, np)
    for engine in ("arrays", "compiled"):
        functions[f"torch {engine}"] = partial(ours, tokens, engine)
        functions[f"torch {engine}, diagnostics"] = partial(ours, tokens, engine, diagnostics=True)
    arrays = [value.detach().numpy() for value in tokens]
    for count in range(1, threads + 1):
        functions[f"the compiled loop alone, {count} thread{'s' * (count > 1)}"] = _loop(arrays, count)
    for engine in ("arrays", "compiled"):
        for diagnostics in (False, True):
            label = f"NumPy {engine}{', diagnostics' if diagnostics else ''}"
            functions[label] = partial(_numpy, arrays, engine=engine, diagnostics=diagnostics, threads=threads)
    yield Case(f"tokens {shape}", f"DRPO, loss and gradient, {shown}", n, functions, seconds=15)
    verl = peers.verl_policy_losses(tokens)
    if verl:
        functions = {"torch eager autograd of the formula": partial(autograd, tokens), **verl}
        functions |= {"DRPO, torch compiled, diagnostics": partial(ours, tokens, "compiled", diagnostics=True)}
        yield Case(f"verl {shape}", f"verl's policy losses with their metrics, {shown}", n, functions, seconds=8)
    yield from _modes(tokens, shown)
    for engine in ("arrays", "compiled"):
        functions = {name: partial(ours, tokens, engine, objective=value) for name, value in OBJECTIVES.items()}
        yield Case(f"objectives {engine} {shape}", f"every objective, torch {engine}, {shown}", n, functions, seconds=8)


def _modes(tokens: Batch, shown: str) -> Iterator[Case]:
    """Modes of verl's keys beside verl itself, with the metrics that it always computes and with our diagnostics."""
    proximal = (tokens.behavior_log_prob + 0.02 * torch.randn_like(tokens.behavior_log_prob)).clamp(max=0.0)
    theirs = peers.verl_modes(tokens, proximal)
    for name, (loss_mode, keys) in peers.VERL_MODES.items():
        mode = modes.verl(loss_mode, **keys)
        functions = {f"verl {name}": theirs[name]} if theirs else {}
        functions |= {
            f"ours, {engine}": partial(ours, tokens, engine, objective=mode, proximal_log_prob=proximal, diagnostics=True)
            for engine in ("arrays", "compiled")
        }
        yield Case(f"mode {name}", f"verl's {name} with metrics, {shown}", tokens.mask.numel(), functions, seconds=8)


def jax_cases(shape: tuple[int, ...]) -> Iterator[Case]:
    """The JAX adapter against the naive loss, each one jitted function."""
    import jax  # noqa: PLC0415 -- its threads start with it
    import jax.numpy as jnp  # noqa: PLC0415
    from drpo_jax import policy_loss as jax_policy_loss  # noqa: PLC0415

    arrays = [jnp.asarray(value.detach().numpy()) for value in batch(shape)]

    def naive(log_prob: Any, behavior: Any, advantages: Any, mask: Any) -> Any:
        ratio, mu = jnp.exp(log_prob - behavior), jnp.exp(behavior)
        losses = -advantages * ratio + jnp.abs(advantages) * mu * (ratio - 1.0) ** 2 / (2.0 * DELTA)
        return jnp.where(mask, losses, 0.0).sum() / mask.sum()

    def adapter(*values: Any, objective: Objective = OBJECTIVES["DRPO"]) -> Any:
        return jax_policy_loss(objective, **dict(zip(Batch._fields, values, strict=True)))

    def loss(*values: Any, **options: Any) -> Any:
        return adapter(*values, **options)[0]

    def call(function: Any) -> Function:
        compiled = jax.jit(function)
        return lambda: jax.block_until_ready(compiled(*arrays))

    functions = {
        "naive, value and gradient": call(jax.value_and_grad(naive)),
        "naive, gradient": call(jax.grad(naive)),
        "drpo_jax, value and gradient": call(jax.value_and_grad(loss)),
        "drpo_jax, gradient": call(jax.grad(loss)),
        "drpo_jax, value, gradient and diagnostics": call(jax.value_and_grad(adapter, has_aux=True)),
        "bandwidth probe (jitted, 17 B a token)": call(lambda x, b, a, m: jnp.where(m, x + b * a, 0.0)),
    }
    yield Case(f"jax {shape}", f"DRPO, jitted, {shape} float32", arrays[0].size, functions, seconds=10)
    functions = {name: call(jax.value_and_grad(partial(loss, objective=value))) for name, value in OBJECTIVES.items()}
    about = f"every objective, jitted, value and gradient, {shape} float32"
    yield Case(f"objectives jax {shape}", about, arrays[0].size, functions, seconds=8)


def growth() -> Iterator[Case]:
    """2¹² … 2²² tokens."""
    batches = {exponent: batch((2**exponent,)) for exponent in range(12, 23, 2)}
    for engine in ("arrays", "compiled"):
        functions = {f"2^{exponent}": partial(ours, tokens, engine) for exponent, tokens in batches.items()}
        yield Case(f"growth tokens {engine}", f"torch {engine}, per token", 1, functions, seconds=4)


def smoke() -> Iterator[Case]:
    """The smallest case, to see that the command runs."""
    tokens = batch((4, 64))
    functions = {
        "torch eager autograd of the formula": partial(autograd, tokens),
        "torch auto": partial(ours, tokens, "auto"),
    }
    yield Case("tokens (4, 64)", "DRPO, loss and gradient, (4, 64) float32", 256, functions, seconds=0.2)


def _transcendental(values: Any, piece: int, library: Any) -> Function:
    """Three functions a token, of which DRPO needs as many, on pieces that stay in the cache, one after another."""
    out = library.empty_like(values[:piece])

    def evaluate() -> None:
        for first in range(0, len(values), piece):
            part = values[first : first + piece]
            for function in (library.exp, library.exp, library.expm1):
                function(part, out=out[: len(part)])

    return evaluate


def _loop(arrays: list[np.ndarray[Any, Any]], threads: int) -> Function:
    """What numba compiles, on torch's threads, into an array that is there already."""
    flat = [array.reshape(-1) for array in arrays]
    arrays = [*flat, np.full(1, 1.0 / flat[-1].sum(), np.float32), None]
    options = {"diagnostics": False, "threads": threads, "spread": in_threads}
    return partial(numba_loop.run, policy_pass, OBJECTIVES["DRPO"], arrays, np.empty_like(flat[0]), **options)


def _numpy(arrays: list[np.ndarray[Any, Any]], **options: Any) -> object:
    log_prob, behavior, advantages, mask = arrays
    return policy_loss_and_gradient(OBJECTIVES["DRPO"], log_prob, behavior, advantages, mask=mask, **options)
