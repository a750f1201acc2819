"""Glue between torch and the verification kit of `drpo_core.testing`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from drpo_core.testing.frameworks import outputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core.testing.batch import FloatArray
    from drpo_core.testing.frameworks import Outputs

__all__ = ["FRAMEWORK", "Torch"]


class Torch:
    """torch on the CPU; transforms ``"compile"`` and ``"vmap"`` (over sequences)."""

    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
    gradient = "autodiff"
    cost = 1.5

    def prepare(
        self, function: Callable[..., Any], *, differentiate: bool, transform: str | None
    ) -> Callable[[dict[str, Any], str], Outputs]:
        """See `drpo_core.testing.frameworks.Framework`."""
        if transform not in (None, "compile", "vmap"):
            msg = f"transform: torch has 'compile' and 'vmap', got {transform!r}"
            raise ValueError(msg)
        # not inductor: its C++ compilation takes longer than a whole run of the kit, and tracing is what differs
        transformed = torch.compile(function, backend="aot_eager", fullgraph=True) if transform == "compile" else function

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

    def plain(self, function: Callable[..., Any]) -> Callable[..., FloatArray]:
        """See `drpo_core.testing.frameworks.Framework`."""

        def call(*args: Any, **kwargs: Any) -> FloatArray:  # noqa: ANN401 -- whatever the function takes
            tensors = {name: _tensor(value, "float64") for name, value in kwargs.items()}
            return _numpy(function(*(_tensor(value, "float64") for value in args), **tensors))

        return call

    def fixed_shape(self, transform: str | None) -> tuple[int, int] | None:
        """See `drpo_core.testing.frameworks.Framework`."""
        return (4, 5) if transform == "compile" else None

    def source(self, *, differentiate: bool) -> str:
        """See `drpo_core.testing.frameworks.Framework`."""
        head = (
            "import torch\n\n"
            "def evaluate(function, **batch):\n"
            "    batch = {name: torch.tensor(v) if isinstance(v, np.ndarray) else v for name, v in batch.items()}\n"
        )
        if not differentiate:
            return head + "    return tuple(None if t is None else t.detach().numpy() for t in (*function(**batch), None)[:3])"
        return head + (
            "    batch['log_prob'].requires_grad_()\n"
            "    loss = function(**batch)\n"
            "    (gradient,) = torch.autograd.grad(loss.sum(), batch['log_prob'], allow_unused=True, materialize_grads=True)\n"
            "    return loss.detach().numpy(), gradient.numpy(), None"
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
