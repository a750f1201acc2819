"""The namespaces every test runs on, as values with the same few methods.

A test written against `Backend.run` takes and returns NumPy arrays, so its expectations are plain numbers.
"""

import enum

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import torch

STRICTEST = {
    "api_version": "2025.12",
    "boolean_indexing": False,
    "data_dependent_shapes": False,
    "enabled_extensions": (),
}


class Backend(enum.Enum):
    """A namespace and a way of calling functions on its arrays."""

    NUMPY = "numpy"
    NUMPY_READ_ONLY = "numpy-read-only"
    STRICT = "array-api-strict"
    TORCH = "torch"
    JAX = "jax"
    JAX_JIT = "jax-jit"

    @property
    def array_type(self):
        """What this namespace calls an array (0-d results of NumPy are scalars)."""
        return {
            Backend.STRICT: type(array_api_strict.asarray(0.0)),
            Backend.TORCH: torch.Tensor,
            Backend.JAX: jax.Array,
            Backend.JAX_JIT: jax.Array,
        }.get(self, (np.ndarray, np.generic))

    def asarray(self, values, dtype=None):
        """The values as an array of this namespace; `dtype` by name, such as "bfloat16"."""
        if self is Backend.TORCH:
            array = torch.tensor(values if isinstance(values, list) else np.asarray(values))
            return array if dtype is None else array.to(getattr(torch, dtype))
        if self in {Backend.JAX, Backend.JAX_JIT}:
            return jnp.asarray(values, dtype=dtype)
        array = np.array(values) if dtype is None else np.array(values).astype(dtype)
        if self is Backend.NUMPY_READ_ONLY:
            array.flags.writeable = False
        return array_api_strict.asarray(array) if self is Backend.STRICT else array

    def to_numpy(self, array):
        """The array, or every array of a tuple or dict, as NumPy; bfloat16 as float32."""
        if isinstance(array, dict):
            return {name: self.to_numpy(item) for name, item in array.items()}
        if isinstance(array, tuple):
            items = [self.to_numpy(item) for item in array]
            return type(array)(*items) if hasattr(array, "_fields") else tuple(items)
        if not isinstance(array, self.array_type):
            msg = f"{self.value}: the library returned a {type(array).__name__}, not an array of its arguments' namespace"
            raise TypeError(msg)
        if self is Backend.TORCH and array.dtype == torch.bfloat16:
            array = array.float()
        return np.asarray(array)

    def call(self, function, *args, **kwargs):
        """`function` on arrays of this namespace; under `jax.jit` for JAX_JIT, where all but arrays is static."""
        if self is not Backend.JAX_JIT:
            return function(*args, **kwargs)
        positional = {i: a for i, a in enumerate(args) if isinstance(a, jax.Array)}
        named = {name: a for name, a in kwargs.items() if isinstance(a, jax.Array)}

        def traced(positional, named):
            return function(*(positional.get(i, a) for i, a in enumerate(args)), **(kwargs | named))

        return jax.jit(traced)(positional, named)

    def run(self, function, *args, **kwargs):
        """`call` with the NumPy arrays among the arguments converted, and the result converted back."""

        def convert(argument):
            return self.asarray(argument) if isinstance(argument, np.ndarray) else argument

        result = self.call(function, *map(convert, args), **{name: convert(a) for name, a in kwargs.items()})
        return self.to_numpy(result)
