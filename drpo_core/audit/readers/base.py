"""The interface of every format: a file has named arrays and gives its tokens in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Values = np.ndarray[Any, Any]

__all__ = ["CHUNK_TOKENS", "Chunk", "Roles", "RolloutError", "Source", "Stored", "as_mask"]

CHUNK_TOKENS = 1 << 16


class RolloutError(ValueError):
    """A file of rollouts is wrong, or what was asked of it; the message is one line."""


class Chunk(NamedTuple):
    """Some consecutive tokens: float64 arrays and a boolean mask, all of shape (tokens,)."""

    log_prob: Values
    behavior_log_prob: Values
    advantages: Values
    mask: Values
    locate: Callable[[int], tuple[int, ...]]
    """Index, in the file's arrays, of the chunk's i-th token."""

    @classmethod
    def of(cls, numbers: Iterable[Values], mask: Values, locate: Callable[[int], tuple[int, ...]]) -> Chunk:
        """Make a chunk of log π, log μ and A of any floating dtype."""
        log_prob, behavior_log_prob, advantages = (np.asarray(array, np.float64) for array in numbers)
        return cls(log_prob, behavior_log_prob, advantages, mask, locate)


class Stored(NamedTuple):
    """An array as its file describes it. A ragged list has None for its tokens axis."""

    shape: tuple[int | None, ...]
    dtype: str
    size: int

    def __str__(self) -> str:
        """Shape and dtype, for messages."""
        inner = ", ".join("…" if n is None else str(n) for n in self.shape)
        return f"({inner}{',' if len(self.shape) == 1 else ''}) {self.dtype}"


class Roles(NamedTuple):
    """Names of the arrays that hold log π, log μ, A and the mask."""

    log_prob: str
    behavior_log_prob: str
    advantages: str
    mask: str | None


class Source(Protocol):
    """A file of one format."""

    arrays: dict[str, Stored]
    problems: dict[str, str]
    """Arrays that can't be read, and why; they matter only if they are asked for."""

    def chunks(self, roles: Roles, chunk_tokens: int) -> Iterator[Chunk]:
        """Yield the tokens, at most `chunk_tokens` at a time."""
        ...


def as_mask(values: Values, name: str, locate: Callable[[int], tuple[int, ...]]) -> Values:
    """Convert 0 and 1 of any dtype to booleans, and refuse anything else."""
    if values.dtype == np.bool_:
        return values
    strange = (values != 0) & (values != 1)
    if np.any(strange):
        first = int(np.argmax(strange))
        msg = f"{name}: expected only 0 and 1 in a mask, got {values[first]} at index {locate(first)}"
        raise RolloutError(msg)
    return np.asarray(values != 0)
