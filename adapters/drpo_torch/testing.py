"""Glue between torch and the verification kit of `drpo_core.testing`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from drpo_core.testing.frameworks import outputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core.testing.batch import FloatArray
    from drpo_core.testing.frameworks import Outputs

__all__ = ["FRAMEWORK", "Torch"]

BACKENDS: dict[str | None, str] = {"compile": "aot_eager", "inductor": "inductor"}
"""Of `torch.compile`. Inductor needs a C++ compiler, and its compilation takes longer than a whole run of the kit."""


class Torch:
    """torch on the CPU; transforms ``"compile"`` (traced, run eagerly), ``"inductor"`` and ``"vmap"`` (over sequences)."""

    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
    gradient = "autodiff"
    cost = 1.5
    gradient_source = (
        "loss = function\n\n"
        "def function(log_prob, **batch):\n"
        "    total = loss(log_prob=log_prob, **batch).sum()\n"
        "    return torch.autograd.grad(total, log_prob, create_graph=True)[0] + 0.0 * log_prob"
    )
    bfloat16_source = (
        "exact = function\n\n"
        "def function(**batch):\n"
        "    floating = {name for name, v in batch.items() if torch.is_tensor(v) and v.is_floating_point()}\n"
        "    return exact(**{name: v.to(torch.bfloat16) if name in floating else v for name, v in batch.items()})"
    )

    def prepare(
        self, function: Callable[..., Any], *, differentiate: bool, transform: str | None
    ) -> Callable[[dict[str, Any], str], Outputs]:
        """See `drpo_core.testing.frameworks.Framework`."""
        if transform not in (None, *BACKENDS, "vmap"):
            msg = f"transform: torch has 'compile', 'inductor' and 'vmap', got {transform!r}"
            raise ValueError(msg)
        backend = BACKENDS.get(transform)
        transformed = function if backend is None else torch.compile(function, backend=backend, fullgraph=True)

        def call(arguments: dict[str, Any], dtype: str) -> Outputs:
            # one limit for all functions the kit compiles: they share the code object of its wrapper
            with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=10_000):  # noqa: SLF001
                return evaluate(arguments, dtype)

        def evaluate(arguments: dict[str, Any], dtype: str) -> Outputs:
            tensors = {name: _tensor(value, dtype) for name, value in arguments.items()}
            if not differentiate:
                return outputs(None if t is None else _numpy(t) for t in _apply(transformed, tensors, transform))
            log_prob = tensors["log_prob"].requires_grad_()
            loss = _apply(transformed, tensors, transform)
            (gradient,) = torch.autograd.grad(loss.sum(), log_prob, allow_unused=True, materialize_grads=True)
            return _numpy(loss), _numpy(gradient), None

        return call

    def gradient_of(self, function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        """See `drpo_core.testing.frameworks.Framework`."""

        def gradient(log_prob: torch.Tensor, **batch: Any) -> torch.Tensor:  # noqa: ANN401 -- whatever the function takes
            total = function(log_prob=log_prob, **batch).sum()
            (first,) = torch.autograd.grad(total, log_prob, create_graph=True)
            # a gradient that is a constant has the derivative 0
            return first + 0.0 * log_prob

        return gradient

    def plain(self, function: Callable[..., Any]) -> Callable[..., FloatArray]:
        """See `drpo_core.testing.frameworks.Framework`."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> FloatArray:  # noqa: ANN401 -- whatever the function takes
            tensors = {name: _tensor(value, "float64") for name, value in kwargs.items()}
            return _numpy(function(*(_tensor(value, "float64") for value in args), **tensors))

        return call

    def fixed_shape(self, transform: str | None) -> tuple[int, int] | None:
        """See `drpo_core.testing.frameworks.Framework`."""
        return (4, 5) if transform in BACKENDS else None

    def source(self, *, differentiate: bool) -> str:
        """See `drpo_core.testing.frameworks.Framework`."""
        head = (
            "import torch\n\n"
            "def evaluate(function, **batch):\n"
            "    batch = {name: torch.tensor(v) if isinstance(v, np.ndarray) else v for name, v in batch.items()}\n"
        )
        if not differentiate:
            return head + (
                "    outputs = (*function(**batch), None)[:3]\n"
                "    return tuple(None if t is None else t.detach().double().numpy() for t in outputs)"
            )
        return head + (
            "    batch['log_prob'].requires_grad_()\n"
            "    loss = function(**batch)\n"
            "    (gradient,) = torch.autograd.grad(loss.sum(), batch['log_prob'], allow_unused=True, materialize_grads=True)\n"
            "    return loss.detach().double().numpy(), gradient.double().numpy(), None"
        )


def _apply(function: Callable[..., Any], tensors: dict[str, Any], transform: str | None) -> Any:  # noqa: ANN401
    if transform == "vmap":
        return torch.func.vmap(lambda batch: function(**batch))(tensors)
    return function(**tensors)


def _tensor(value: Any, dtype: str) -> Any:  # noqa: ANN401
    if not isinstance(value, np.ndarray):
        return value
    # shares memory, so that an input changed in place is seen
    tensor = torch.from_numpy(value)
    return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor


def _numpy(tensor: torch.Tensor) -> FloatArray:
    return tensor.detach().to(torch.float64).numpy().copy()


FRAMEWORK = Torch()
