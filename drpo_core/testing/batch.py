"""What a check is given: a batch of tokens, or a small vocabulary enumerated to the last token.

Arrays are NumPy float64, whatever the implementation computes in: a batch for float32 or bfloat16 holds values that the
smaller dtype represents exactly, so the reference and the implementation see the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DTYPES", "BoolArray", "FloatArray", "TokenBatch", "Vocabulary", "literal", "round_to", "unit_roundoff"]

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]

DTYPES = ("float64", "float32", "bfloat16")

_UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Tokens of a batch: (sequences, tokens) padded, or 1-D packed with `segment_ids`.

    Parameters
    ----------
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats) and A per token, float64.
    mask
        True at tokens that count.
    segment_ids
        Of packed tokens: which sequence each belongs to.
    proximal_log_prob, reference_log_prob
        log π_old and log π_ref per token, for a mode that needs them.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core.testing import TokenBatch
    >>> x = np.log([[0.5, 0.2]])
    >>> TokenBatch(x, x, np.ones((1, 2)), np.array([[True, False]])).shape
    (1, 2)
    """

    log_prob: FloatArray
    behavior_log_prob: FloatArray
    advantages: FloatArray
    mask: BoolArray
    segment_ids: NDArray[np.int64] | None = None
    proximal_log_prob: FloatArray | None = None
    reference_log_prob: FloatArray | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the arrays of numbers that it has."""
        optional = ("proximal_log_prob", "reference_log_prob")
        others = (name for name in optional if getattr(self, name) is not None)
        return ("log_prob", "behavior_log_prob", "advantages", *others)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of every array."""
        return self.mask.shape

    @property
    def log_ratio(self) -> FloatArray:
        """ℓ = log π − log μ."""
        return self.log_prob - self.behavior_log_prob

    def replace(self, **changes: object) -> TokenBatch:
        """The batch with other arrays."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def map(self, function: Any) -> TokenBatch:
        """The batch with a function of one array applied to each of them."""
        given = {name: getattr(self, name) for name in (*self.inputs, "mask", "segment_ids")}
        return replace(self, **{name: function(array) for name, array in given.items() if array is not None})

    def __getitem__(self, index: Any) -> TokenBatch:
        """The tokens at an index, of every array."""
        return self.map(lambda array: array[index])

    def join(self, *others: TokenBatch) -> TokenBatch:
        """The sequences of several padded batches of one width."""
        parts = (self, *others)
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in (*self.inputs, "mask")}
        return replace(self, **joined)

    def poisoned(self, value: float, names: Sequence[str] | None = None) -> TokenBatch:
        """The batch with a value in some inputs of its masked positions, by default all."""
        chosen = self.inputs if names is None else names
        return self.replace(**{name: np.where(self.mask, getattr(self, name), value) for name in chosen})

    def padded(self, *, rows: int = 0, columns: int = 0, value: float = 0.0) -> TokenBatch:
        """The batch with masked rows and columns appended, which hold a value."""
        width = [(0, rows), (0, columns)]

        def extend(array: NDArray[Any]) -> NDArray[Any]:
            return np.pad(array, width, constant_values=False if array.dtype == bool else value)

        return self.map(extend)

    def packed(self, *, drop_padding: bool = True) -> TokenBatch:
        """The same tokens, 1-D, with the row of each as its segment id; optionally without the masked ones."""
        ids = np.broadcast_to(np.arange(self.shape[0])[:, None], self.shape)
        keep = self.mask if drop_padding else np.ones(self.shape, dtype=bool)
        return replace(self, segment_ids=ids)[keep]

    def __repr__(self) -> str:
        """Construct the batch, in full precision."""
        names = ["log_prob", "behavior_log_prob", "advantages", "mask", *self.inputs[3:]]
        if self.segment_ids is not None:
            names.append("segment_ids")
        return "TokenBatch(" + ", ".join(f"{name}={literal(getattr(self, name))}" for name in names) + ")"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Two policies over a vocabulary small enough to enumerate, one state a row.

    Parameters
    ----------
    log_prob, behavior_log_prob
        log π and log μ of every token in every state, nats; (states, vocabulary).
    advantages
        A of every token in every state.
    sampled
        A token of each state.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core.testing import Vocabulary
    >>> p = np.log([[0.5, 0.5]])
    >>> Vocabulary(p, p, np.array([[1.0, -1.0]]), np.array([0])).batch().shape
    (1, 2)
    """

    log_prob: FloatArray
    behavior_log_prob: FloatArray
    advantages: FloatArray
    sampled: NDArray[np.int64]

    def batch(self) -> TokenBatch:
        """Every token of every state as if it had been sampled."""
        return TokenBatch(self.log_prob, self.behavior_log_prob, self.advantages, np.ones(self.advantages.shape, dtype=bool))

    def __repr__(self) -> str:
        """Construct the vocabulary, in full precision."""
        names = ("log_prob", "behavior_log_prob", "advantages", "sampled")
        return "Vocabulary(" + ", ".join(f"{name}={literal(getattr(self, name))}" for name in names) + ")"


def unit_roundoff(dtype: str) -> float:
    """Largest relative rounding error of a dtype."""
    return _UNIT_ROUNDOFF[dtype]


def round_to(dtype: str, values: FloatArray) -> FloatArray:
    """The nearest values that a dtype represents, as float64."""
    if dtype == "float64":
        return values
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    if dtype == "bfloat16":
        # to nearest, ties to even, on the upper 16 bits: NumPy has no bfloat16
        bits = single.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        single = np.where(np.isfinite(single), rounded.view(np.float32), single)
    return single.astype(np.float64)


def literal(array: Any) -> str:
    """Python source of an array, in full precision."""
    array = np.asarray(array)
    suffix = "" if array.dtype in (np.float64, np.int64, bool) else f", dtype=np.{array.dtype}"
    if array.size == 0:
        return f"np.empty({array.shape}, dtype=np.{array.dtype})"
    return f"np.array({_nested(array.tolist())}{suffix})"


def _nested(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_nested, value)) + "]"
    if isinstance(value, float) and not np.isfinite(value):
        return {"inf": "np.inf", "-inf": "-np.inf"}.get(str(value), "np.nan")
    return repr(value)
