"""Arrays of each library: made of exact numbers, laid out in memory as asked, and read back exactly."""

from __future__ import annotations

from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import torch
from contract.axes import DType, Library, Storage

NUMPY = (Library.NUMPY, Library.READ_ONLY)


def make(values: Any, dtype: DType, library: Library, storage: Storage = Storage.CONTIGUOUS) -> Any:
    """An array of the values, rounded to the dtype; of an expanded one, all rows are the first."""
    values = np.asarray(values)
    if library is Library.TORCH:
        return _torch(values, getattr(torch, dtype), storage)
    if library is Library.JAX:
        return jnp.asarray(values).astype(dtype) if dtype in {"bfloat16", "float16"} else jnp.asarray(values, dtype=dtype)
    if library is Library.STRICT:
        return array_api_strict.asarray(values.astype(dtype))
    array = _numpy(values.astype(dtype), storage)
    if library is Library.READ_ONLY:
        array.flags.writeable = False
    return array


def _torch(values: np.ndarray, dtype: torch.dtype, storage: Storage) -> torch.Tensor:
    if storage is Storage.EXPANDED and values.ndim:
        return torch.tensor(values[:1]).to(dtype).expand(values.shape)
    tensor = torch.tensor(values).to(dtype)
    if storage is Storage.TRANSPOSED:
        axes = tuple(reversed(range(values.ndim)))
        return tensor.permute(axes).contiguous().permute(axes)
    if storage is Storage.SLICED and values.ndim:
        return torch.stack((tensor, torch.ones_like(tensor)), dim=-1)[..., 0]
    return tensor


def _numpy(values: np.ndarray, storage: Storage) -> np.ndarray:
    if storage is Storage.EXPANDED and values.ndim:
        return np.broadcast_to(values[:1].copy(), values.shape)
    if storage is Storage.TRANSPOSED:
        return values.T.copy().T
    if storage is Storage.SLICED and values.ndim:
        return np.stack((values, np.ones_like(values)), axis=-1)[..., 0]
    return np.array(values)


def exact(array: Any) -> np.ndarray:
    """What an array holds, as float64, int64 or bool of NumPy."""
    if isinstance(array, torch.Tensor):
        array = array.detach()
        array = array.double() if array.is_floating_point() else array
    values = np.asarray(array)
    if values.dtype == np.bool_:
        return values
    return values.astype(np.int64 if np.issubdtype(values.dtype, np.integer) else np.float64)


def bits(array: Any) -> bytes:
    """Shape, dtype and every bit of an array."""
    head = f"{array.dtype}{tuple(array.shape)}".encode()
    if isinstance(array, torch.Tensor):
        flat = array.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
        return head + (flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return head + np.asarray(array).tobytes()


def dtype_of(array: Any) -> str:
    """Name of an array's dtype."""
    return str(array.dtype).rpartition(".")[2]


def is_array(value: Any) -> bool:
    """Whether this is an array of one of the libraries; NumPy's 0-d results are scalars."""
    return isinstance(value, (np.ndarray, np.generic, torch.Tensor, jax.Array, type(array_api_strict.asarray(0.0))))


def memory(array: Any) -> np.ndarray | None:
    """The array as a view that NumPy can compare with another's memory; None where nothing can be changed in place."""
    if isinstance(array, torch.Tensor):
        if array.device.type != "cpu" or not array.numel():
            return None
        array = array.detach()
        return (array.view(torch.int16) if array.dtype == torch.bfloat16 else array).numpy()
    if isinstance(array, np.ndarray):
        return array if array.size else None
    return np.asarray(array) if isinstance(array, type(array_api_strict.asarray(0.0))) and array.size else None


def flatten(value: Any, names: tuple[str, ...] = (), path: str = "") -> dict[str, Any]:
    """Every array of a result by the path to it; what is None is left out."""
    if value is None:
        return {}
    if is_array(value):
        return {path: value}
    if isinstance(value, dict):
        items = value.items()
    elif hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
    elif isinstance(value, (tuple, list)):
        items = zip(names or map(str, range(len(value))), value, strict=True)
    else:
        msg = f"{path or 'result'}: neither an array nor a tuple or dict of arrays, but a {type(value).__name__}"
        raise AssertionError(msg)
    return {
        key: array
        for name, item in items
        for key, array in flatten(item, path=f"{path}/{name}" if path else str(name)).items()
    }


def statistics(value: Any, path: str = "") -> dict[str, Any]:
    """Every statistic of a result, by the path to it: `value` as an array."""
    if hasattr(value, "value") and "count" in getattr(value, "_fields", ()):
        return {path: value.value}
    if isinstance(value, dict):
        items = value.items()
    elif hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
    elif isinstance(value, (tuple, list)):
        items = ((str(i), item) for i, item in enumerate(value))
    else:
        return {}
    return {
        key: array for name, item in items for key, array in statistics(item, f"{path}/{name}" if path else str(name)).items()
    }
