"""Checks of what can be known without reading an array's values: its library, dtype and shape, and of plain numbers.

The kernels make none of them, and have no control flow that depends on values.
`drpo_core.validation` checks values.
"""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace

if TYPE_CHECKING:
    from drpo_core._arrays import Array, Namespace

__all__ = [
    "check_arrays",
    "check_dtype",
    "check_flag",
    "check_mask",
    "check_number",
    "check_part",
    "check_segment_ids",
    "check_shape",
    "compute_dtype",
]


def check_arrays(*, xp: Namespace | None = None, kind: str = "real floating", **arrays: Array) -> Namespace:
    """Namespace of arrays of one library, one kind of dtype and one shape; the keywords name them in errors."""
    for name, array in arrays.items():
        _check_is_array(name, array, kind)
    if xp is None:
        xp = _common_namespace(arrays)
    reference_name, reference = next(iter(arrays.items()))
    for name, array in arrays.items():
        check_dtype(name, array, kind, xp=xp)
        check_shape(name, array, reference_name, reference)
    return xp


def check_dtype(name: str, array: Array, kind: str, *, xp: Namespace) -> None:
    """Raise `TypeError` unless ``array`` has a dtype of ``kind`` (a kind of ``xp.isdtype``)."""
    _check_is_array(name, array, kind)
    try:
        right = xp.isdtype(array.dtype, kind)
        foreign = not right and _library(array.dtype) != _library(xp.zeros(0).dtype)
    except (AttributeError, TypeError):
        # each library's own word for a dtype of another one, or for one that it has not
        right, foreign = False, True
    if foreign:
        expected = f"an array of {kind} dtype of the library of the other arguments"
        msg = f"{name}: expected {expected}, got {_described(array)} and dtype {array.dtype}"
        raise TypeError(msg)
    if not right:
        msg = f"{name}: expected {'an' if kind[0] in 'aeiou' else 'a'} {kind} dtype, got {array.dtype}"
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


def check_mask(mask: Array, reference_name: str, reference: Array, *, xp: Namespace) -> None:
    """Raise unless the mask is boolean and has the shape of ``reference``."""
    check_dtype("mask", mask, "bool", xp=xp)
    check_shape("mask", mask, reference_name, reference)


def check_segment_ids(segment_ids: Array, mask: Array, *, xp: Namespace) -> None:
    """Raise unless these are integers, one for each of the packed tokens of a 1-D mask."""
    check_dtype("segment_ids", segment_ids, "integral", xp=xp)
    check_shape("segment_ids", segment_ids, "mask", mask)
    if mask.ndim != 1:
        msg = f"segment_ids: expected packed 1-D tokens, got shape {tuple(mask.shape)}; padded rows need none"
        raise ValueError(msg)


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float = math.inf,
    whole: bool = False,
) -> float:
    """The value as a Python float (with ``whole`` an int), if it is a finite real number within its bound.

    NumPy scalars and 0-d NumPy arrays are numbers too; as they are, they would promote float32 arrays to float64.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    given: Any = value
    kind: Any = numbers.Integral if whole else numbers.Real
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, kind):
        expected = "a whole number" if whole else "a real number"
        got = f"{type(value).__name__} {value!r}" if isinstance(value, numbers.Real) else _described(value)
        msg = f"{name}: expected {expected}, got {got}"
        raise TypeError(msg)
    try:
        number = int(given) if whole else float(given)
        finite = math.isfinite(number)
    except OverflowError:
        finite = False
    low = (above is None or number > above) and (at_least is None or number >= at_least) if finite else False
    if not low or number > at_most:
        bound = f" greater than {above:g}" if above is not None else f", {at_least:g} or more" if at_least is not None else ""
        bound += "" if at_most == math.inf else f" and at most {at_most:g}"
        msg = f"{name}: expected a finite number{bound}, got {_short(value)}"
        raise ValueError(msg)
    return number


def check_flag(name: str, value: object) -> None:
    """Raise `TypeError` unless the value is True or False."""
    if not isinstance(value, bool):
        msg = f"{name}: expected True or False, got {value!r}"
        raise TypeError(msg)


def check_part(name: str, part: object, method: str, expected: str) -> None:
    """Raise `TypeError` unless the part of a mode is an instance with this method."""
    if isinstance(part, type) or not callable(getattr(part, method, None)):
        got = f"the class {part.__name__}" if isinstance(part, type) else repr(part)
        msg = f"{name}: expected {expected}, got {got}"
        raise TypeError(msg)


def compute_dtype(*arrays: Array, xp: Namespace) -> Any:
    """Dtype of the arithmetic: the inputs' common dtype, but float32 at least."""
    # not xp.result_type: Dynamo can't trace torch's for float16 and bfloat16
    wide = (xp.float64, getattr(xp, "longdouble", xp.float64))
    return xp.float64 if any(array.dtype in wide for array in arrays) else xp.float32


def _check_is_array(name: str, array: object, kind: str) -> None:
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        msg = f"{name}: expected an array of {kind} dtype, got {type(array).__name__}"
        raise TypeError(msg)


def _common_namespace(arrays: dict[str, Array]) -> Namespace:
    try:
        return array_namespace(*arrays.values())
    except TypeError as error:
        given = ", ".join(f"{name} is a {_described(array)}" for name, array in arrays.items())
        msg = f"expected arrays of one library, but {given}"
        raise TypeError(msg) from error


def _library(dtype: object) -> str:
    return type(dtype).__module__.partition(".")[0]


def _described(value: object) -> str:
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    shape = getattr(value, "shape", None)
    return name if shape is None or not isinstance(shape, tuple) else f"{name} of shape {tuple(shape)}"


def _short(value: object) -> str:
    """The value's repr; of a huge integer its first digits (Python refuses to print more than a few thousand)."""
    try:
        text = repr(value)
    except ValueError:
        return "a number too large to print"
    return text if len(text) <= 40 else f"{text[:37]}…"
