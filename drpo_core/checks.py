"""Checks of what can be known without reading a value: array, dtype and shape.

They are separate from the kernels, which stay free of checks and of value-dependent control flow.
For checks of the values themselves see `drpo_core.validation`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from array_api_compat import array_namespace

if TYPE_CHECKING:
    from drpo_core.types import Array, Namespace

__all__ = ["check_arrays", "check_dtype", "check_shape", "compute_dtype"]


def check_arrays(*, xp: Namespace | None = None, kind: str = "real floating", **arrays: Array) -> Namespace:
    """Namespace of arrays of one library, one kind of dtype and one shape; the keywords name them in errors."""
    for name, array in arrays.items():
        if not hasattr(array, "dtype"):
            msg = f"{name}: expected an array of {kind} dtype, got {type(array).__name__}"
            raise TypeError(msg)
    if xp is None:
        xp = _common_namespace(arrays)
    reference_name, reference = next(iter(arrays.items()))
    for name, array in arrays.items():
        check_dtype(name, array, kind, xp=xp)
        check_shape(name, array, reference_name, reference)
    return xp


def check_dtype(name: str, array: Array, kind: str, *, xp: Namespace) -> None:
    """Raise `TypeError` unless ``array`` has a dtype of ``kind`` (a kind of ``xp.isdtype``)."""
    if not hasattr(array, "dtype"):
        msg = f"{name}: expected an array of {kind} dtype, got {type(array).__name__}"
        raise TypeError(msg)
    if not xp.isdtype(array.dtype, kind):
        msg = f"{name}: expected a {kind} dtype, got {array.dtype}"
        if kind == "bool":
            msg += "; pass `mask != 0` (per-token weights belong in token_weights)"
        raise TypeError(msg)


def check_shape(name: str, array: Array, reference_name: str, reference: Array) -> None:
    """Raise `ValueError` unless ``array`` has exactly the shape of ``reference``: nothing is broadcast."""
    if tuple(array.shape) != tuple(reference.shape):
        msg = f"{name}: expected the shape of {reference_name}, {tuple(reference.shape)}, got {tuple(array.shape)}"
        if len(array.shape) == 1 and name == "advantages":
            msg += "; per-sequence advantages are expanded with expand_advantages(advantages, mask)"
        raise ValueError(msg)


def compute_dtype(*arrays: Array, xp: Namespace) -> object:
    """Dtype of the arithmetic: the inputs' common dtype, but float32 at least."""
    # not xp.result_type: Dynamo can't trace torch's for float16 and bfloat16
    return xp.float64 if any(array.dtype == xp.float64 for array in arrays) else xp.float32


def _common_namespace(arrays: dict[str, Array]) -> Namespace:
    try:
        return array_namespace(*arrays.values())
    except TypeError as error:
        given = ", ".join(f"{name} is a {type(array).__module__}.{type(array).__name__}" for name, array in arrays.items())
        msg = f"expected arrays of one library, but {given}"
        raise TypeError(msg) from error
