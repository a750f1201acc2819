"""What the code under test is called: the one place to change when a name changes."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import drpo_jax
import drpo_jax.distributed
import drpo_torch
import drpo_torch.distributed
from array_api_compat import array_namespace
from contract.axes import Engine

import drpo_core
import drpo_core.reduction

MODULES = (
    drpo_core,
    drpo_core.reduction,
    drpo_torch,
    drpo_torch.distributed,
    drpo_jax,
    drpo_jax.distributed,
)

NEW_NAMES = {"selective_log_prob": "token_log_prob", "diagnostics": "token_diagnostics"}
GOING = ("_loss", "_weight")
"""Ends of the names of twins that the second edition deletes."""

ENGINES = {
    "drpo_core.policy_loss_and_gradient": {Engine.ARRAYS: "plain", Engine.COMPILED: "jit"},
}
TORCH_ENGINES = {Engine.ARRAYS: "eager", Engine.COMPILED: "jit"}


def engine(subject: str, choice: Engine) -> str:
    """What a function calls an engine."""
    return ENGINES.get(subject, TORCH_ENGINES).get(choice, choice)


@functools.cache
def public() -> dict[str, Any]:
    """Every public function and class by its module and name, each once."""
    found: dict[str, Any] = {}
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            going = module is drpo_core and name.endswith(GOING) and name != "policy_loss_and_gradient"
            if (inspect.isfunction(value) or inspect.isclass(value)) and not going and value not in found.values():
                found[f"{module.__name__}.{NEW_NAMES.get(name, name)}"] = value
    return found


@functools.cache
def objectives() -> dict[str, Any]:
    """Every objective of the library by its label: each class with thresholds of its own, and its variants."""
    core = drpo_core
    return {
        "DRPO": core.DRPO(delta=0.15),
        "DRPO low/high": core.DRPO(delta_low=0.1, delta_high=0.3),
        "PG-IS": core.PolicyGradient(),
        "PG-IS truncated": core.PolicyGradient(max_ratio=1.1),
        "PPO-clip": core.PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
        "CISPO": core.CISPO(max_ratio=1.2),
        "SPO": core.SPO(eps=0.2),
        "DPPO-TV": core.DPPO(delta=0.1),
        "DPPO-KL": core.DPPO(delta=0.05, divergence="binary_kl", max_ratio=2.0),
        "DPPO per token": core.DPPO(delta=0.06, divergence="per_token"),
        "Mask-DRPO": core.MaskDRPO(delta=0.1),
    }


def namespace(array: Any) -> Any:
    """Namespace of an array."""
    return array_namespace(array)


def compilations() -> int:
    """How many loops have been compiled."""
    import drpo_core.jit  # noqa: PLC0415

    return drpo_core.jit._compiled.cache_info().misses


def untraceable() -> type[Exception]:
    """What an engine raises that can't compile an objective."""
    from drpo_core.trace import UntraceableError  # noqa: PLC0415

    return UntraceableError
