"""How a function is called with NumPy arrays and its gradient taken, one small class per array library.

torch and JAX have theirs in the adapters (`drpo_torch.testing`, `drpo_jax.testing`), imported when first asked for:
`drpo_core` itself never imports a framework.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core.testing.batch import FloatArray

__all__ = ["Framework", "NumPy", "Outputs", "framework_named", "outputs"]

Outputs: TypeAlias = "tuple[FloatArray, FloatArray, FloatArray | None]"

STEP = 2.0**-9
"""Of the finite differences, which are of fourth order."""


class Framework(Protocol):
    """What the kit needs of an array library."""

    dtypes: tuple[str, ...]
    """Dtypes in which the core is tested with it."""
    gradient: str
    """How a gradient is taken: ``"autodiff"`` or ``"differences"``."""
    cost: float
    """Relative time of a call."""
    gradient_source: str
    """Python source that replaces `function` by its gradient, for snippets."""
    bfloat16_source: str
    """Python source that makes `function` round its floating-point arrays to bfloat16, for snippets."""

    def prepare(
        self, function: Callable[..., Any], *, differentiate: bool, transform: str | None
    ) -> Callable[[dict[str, Any], str], Outputs]:
        """A function of (arguments as NumPy arrays, dtype) to (loss, gradient, weight or None)."""
        ...

    def gradient_of(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """The gradient of a function's sum in `log_prob`, to be differentiated again; None without autodiff."""
        ...

    def plain(self, function: Callable[..., Any]) -> Callable[..., FloatArray]:
        """A function of arrays as a function of float64 NumPy arrays."""
        ...

    def fixed_shape(self, transform: str | None) -> tuple[int, int] | None:
        """The shape to keep to, if a new one is expensive."""
        ...

    def source(self, *, differentiate: bool) -> str:
        """Python source of `evaluate(function, **batch)`, for snippets."""
        ...


class NumPy:
    """NumPy or array-api-strict arrays; the gradient of a value is a finite difference.

    Parameters
    ----------
    writeable
        False to hand over read-only arrays.
    strict
        True for array-api-strict with its strictest flags.
    """

    dtypes: tuple[str, ...] = ("float64", "float32")
    gradient = "differences"
    cost = 1.0
    gradient_source = bfloat16_source = ""

    def __init__(self, *, writeable: bool = True, strict: bool = False) -> None:
        self._writeable = writeable
        self._strict = importlib.import_module("array_api_strict") if strict else None

    def prepare(
        self, function: Callable[..., Any], *, differentiate: bool, transform: str | None
    ) -> Callable[[dict[str, Any], str], Outputs]:
        """See `Framework.prepare`."""
        if transform is not None:
            msg = f"transform: NumPy has none, got {transform!r}"
            raise ValueError(msg)

        def direct(arguments: dict[str, Any], dtype: str) -> Outputs:
            del dtype  # the arrays have it
            return outputs(self._call(function, arguments))

        def by_differences(arguments: dict[str, Any], dtype: str) -> Outputs:
            del dtype
            loss = np.asarray(self._call(function, arguments), dtype=np.float64)
            return loss, _central_differences(lambda x: self._call(function, arguments | {"log_prob": x}), arguments), None

        return by_differences if differentiate else direct

    def gradient_of(self, function: Callable[..., Any]) -> None:
        """None: NumPy has no autodiff."""

    def plain(self, function: Callable[..., Any]) -> Callable[..., FloatArray]:
        """See `Framework.plain`."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> FloatArray:
            return np.asarray(self._call(function, kwargs, args), dtype=np.float64)

        return call

    def fixed_shape(self, transform: str | None) -> tuple[int, int] | None:
        """None: a new shape costs nothing."""
        del transform
        return None

    def source(self, *, differentiate: bool) -> str:
        """See `Framework.source`."""
        if not differentiate:
            return (
                "def evaluate(function, **batch):\n"
                "    outputs = function(**batch)\n"
                "    return tuple(map(np.asarray, (*outputs, None)[:3]))"
            )
        return (
            "def evaluate(function, log_prob, **batch):\n"
            "    loss, gradient = np.asarray(function(log_prob, **batch)), np.zeros(log_prob.shape)\n"
            f"    h = {STEP!r}\n"
            "    for index in np.ndindex(log_prob.shape):\n"
            "        values = []\n"
            "        for step in (2 * h, h, -h, -2 * h):\n"
            "            moved = log_prob.copy()\n"
            "            moved[index] += step\n"
            "            values.append(np.asarray(function(moved, **batch)))\n"
            "        a, b, c, d = values\n"
            "        gradient[index] = np.sum((8 * (b - c) - (a - d)) / (12 * h))\n"
            "    return loss, gradient, None"
        )

    def _call(self, function: Callable[..., Any], arguments: dict[str, Any], positional: tuple[Any, ...] = ()) -> Any:
        if self._strict is None:
            if not self._writeable:
                for array in (*positional, *arguments.values()):
                    if isinstance(array, np.ndarray):
                        array.flags.writeable = False
            return function(*positional, **arguments)
        xp = self._strict
        with xp.ArrayAPIStrictFlags(boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()):
            wrapped = [xp.asarray(v) if isinstance(v, np.ndarray) else v for v in (*positional, *arguments.values())]
            return function(*wrapped[: len(positional)], **dict(zip(arguments, wrapped[len(positional) :], strict=True)))


def framework_named(name: str) -> Framework:
    """A framework by its name, imported when asked for.

    Parameters
    ----------
    name
        ``"numpy"``, ``"numpy-readonly"``, ``"array-api-strict"``, ``"torch"`` or ``"jax"``.

    Returns
    -------
    Framework
        Its glue.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    match name:
        case "numpy":
            return NumPy()
        case "numpy-readonly":
            return NumPy(writeable=False)
        case "array-api-strict":
            return NumPy(strict=True)
        case "torch" | "jax":
            framework: Framework = importlib.import_module(f"drpo_{name}.testing").FRAMEWORK
            return framework
    msg = f"framework: expected 'numpy', 'numpy-readonly', 'array-api-strict', 'torch' or 'jax', got {name!r}"
    raise ValueError(msg)


def outputs(result: Any) -> Outputs:
    """(loss, gradient[, weight]) of NumPy arrays, as float64."""
    loss, gradient, weight = (*result, None)[:3]
    as_float = [None if a is None else np.array(a, dtype=np.float64) for a in (loss, gradient, weight)]
    return tuple(as_float)  # type: ignore[return-value]


def _central_differences(function: Callable[[FloatArray], Any], arguments: dict[str, Any]) -> FloatArray:
    """Gradient of the sum of a function's values, one input at a time, so that no token hides another's influence."""
    log_prob = arguments["log_prob"]
    gradient = np.zeros(log_prob.shape)
    for index in np.ndindex(log_prob.shape):

        def value(step: float, index: tuple[int, ...] = index) -> FloatArray:
            moved = log_prob.copy()
            moved[index] += step
            return np.asarray(function(moved), dtype=np.float64)

        # difference before summing: what does not depend on this input cancels exactly
        slope = (8.0 * (value(STEP) - value(-STEP)) - (value(2.0 * STEP) - value(-2.0 * STEP))) / (12.0 * STEP)
        gradient[index] = slope.sum()
    return gradient
