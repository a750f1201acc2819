"""NumPy with a faster `where`: its own takes as long as a dozen multiplications."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from drpo_core.types import Namespace

__all__ = ["SelectingNamespace"]


class SelectingNamespace:
    """A NumPy namespace whose `where` chooses between floats by arithmetic on their bits, modulo 2³² or 2⁶⁴.

    It is exact, and as blind to NaN as a selection.
    """

    def __init__(self, xp: Namespace) -> None:
        """The namespace, for everything else."""
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        """Whatever is not replaced."""
        return getattr(self._xp, name)

    def where(self, condition: NDArray[np.bool_], x: Any, y: Any) -> NDArray[Any]:
        """The elements of x where the condition holds, else those of y."""
        arrays = [v for v in (x, y) if isinstance(v, np.ndarray)]
        dtypes, shapes = {v.dtype for v in arrays}, {v.shape for v in arrays}
        if len(dtypes) != 1 or not dtypes <= _INTEGERS.keys() or shapes != {np.shape(condition)}:
            return np.asarray(np.where(condition, x, y))
        (dtype,) = dtypes
        chosen, a, b = condition.astype(_INTEGERS[dtype]), _bits(x, dtype), _bits(y, dtype)
        nothing_else = b.ndim == 0 and b == 0
        chosen *= a if nothing_else else a - b
        if not nothing_else:
            chosen += b
        result: NDArray[Any] = chosen.view(dtype)
        return result


_INTEGERS: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.float32): np.dtype(np.int32),
    np.dtype(np.float64): np.dtype(np.int64),
}


def _bits(x: Any, dtype: np.dtype[Any]) -> Any:
    return np.asarray(x, dtype).view(_INTEGERS[dtype])
