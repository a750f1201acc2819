"""Glue between JAX and the verification kit of `drpo_core.testing`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from drpo_core.testing.frameworks import outputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core.testing.batch import FloatArray
    from drpo_core.testing.frameworks import Outputs

__all__ = ["FRAMEWORK", "Jax"]


class Jax:
    """JAX on the CPU, in x64 for float64; transforms ``"jit"`` and ``"vmap"`` (over sequences, jitted)."""

    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
    gradient = "autodiff"
    cost = 4.0
    gradient_source = (
        "loss = function\n\n"
        "def function(log_prob, **batch):\n"
        "    return jax.grad(lambda x: loss(log_prob=x, **batch).sum())(log_prob)"
    )
    bfloat16_source = (
        "exact = function\n\n"
        "def function(**batch):\n"
        "    floating = {name for name, v in batch.items() if jnp.issubdtype(jnp.result_type(v), jnp.floating)}\n"
        "    return exact(**{name: v.astype(jnp.bfloat16) if name in floating else v for name, v in batch.items()})"
    )

    def prepare(
        self, function: Callable[..., Any], *, differentiate: bool, transform: str | None
    ) -> Callable[[dict[str, Any], str], Outputs]:
        """See `drpo_core.testing.frameworks.Framework`."""
        if transform not in (None, "jit", "vmap"):
            msg = f"transform: JAX has 'jit' and 'vmap', got {transform!r}"
            raise ValueError(msg)

        def evaluate(batch: dict[str, Any]) -> Any:  # noqa: ANN401
            if not differentiate:
                return _apply(function, batch, transform)

            def total(log_prob: jax.Array) -> tuple[jax.Array, jax.Array]:
                loss = _apply(function, batch | {"log_prob": log_prob}, transform)
                return loss.sum(), loss

            gradient, loss = jax.grad(total, has_aux=True)(batch["log_prob"])
            return loss, gradient

        compiled = evaluate if transform is None else jax.jit(evaluate)

        def call(arguments: dict[str, Any], dtype: str) -> Outputs:
            with jax.enable_x64(dtype == "float64"):
                batch = {name: _array(value, dtype) for name, value in arguments.items()}
                return outputs(None if a is None else _numpy(a) for a in compiled(batch))

        return call

    def gradient_of(self, function: Callable[..., Any]) -> Callable[..., jax.Array]:
        """See `drpo_core.testing.frameworks.Framework`."""

        def gradient(log_prob: jax.Array, **batch: Any) -> jax.Array:  # noqa: ANN401 -- whatever the function takes
            first: jax.Array = jax.grad(lambda x: function(log_prob=x, **batch).sum())(log_prob)
            return first

        return gradient

    def plain(self, function: Callable[..., Any]) -> Callable[..., FloatArray]:
        """See `drpo_core.testing.frameworks.Framework`."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> FloatArray:  # noqa: ANN401 -- whatever the function takes
            with jax.enable_x64(True):  # noqa: FBT003 -- its only argument
                arrays = {name: _array(value, "float64") for name, value in kwargs.items()}
                return _numpy(function(*(_array(value, "float64") for value in args), **arrays))

        return call

    def fixed_shape(self, transform: str | None) -> tuple[int, int] | None:
        """See `drpo_core.testing.frameworks.Framework`; eager JAX compiles each operation for each shape, too."""
        del transform
        return (4, 5)

    def source(self, *, differentiate: bool) -> str:
        """See `drpo_core.testing.frameworks.Framework`."""
        head = (
            "import jax\nimport jax.numpy as jnp\n\n"
            "jax.config.update('jax_enable_x64', True)\n\n"
            "def evaluate(function, **batch):\n"
            "    batch = {name: jnp.asarray(v) if isinstance(v, np.ndarray) else v for name, v in batch.items()}\n"
        )
        if not differentiate:
            return head + "    return tuple(None if a is None else np.asarray(a) for a in (*function(**batch), None)[:3])"
        return head + (
            "    def total(log_prob):\n"
            "        loss = function(**batch | {'log_prob': log_prob})\n"
            "        return loss.sum(), loss\n"
            "    gradient, loss = jax.grad(total, has_aux=True)(batch['log_prob'])\n"
            "    return np.asarray(loss), np.asarray(gradient), None"
        )


def _apply(function: Callable[..., Any], batch: dict[str, Any], transform: str | None) -> Any:  # noqa: ANN401
    return jax.vmap(lambda row: function(**row))(batch) if transform == "vmap" else function(**batch)


def _array(value: Any, dtype: str) -> Any:  # noqa: ANN401
    if not isinstance(value, np.ndarray):
        return value
    return jnp.asarray(value, dtype=dtype) if np.issubdtype(value.dtype, np.floating) else jnp.asarray(value)


def _numpy(array: jax.Array) -> FloatArray:
    return np.asarray(array).astype(np.float64)


FRAMEWORK = Jax()
