"""Arrays in C order, each a run of bytes in its file, read side by side: what .npz and .safetensors have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from drpo_core.audit.readers.base import Chunk, RolloutError, as_mask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drpo_core.audit.readers.base import Roles, Stored, Values

__all__ = ["Rectangular", "Run"]


class Run:
    """Reads an array front to back from the bytes of a file."""

    def __init__(self, stream: Any, name: str, dtype: str, *, bfloat16: bool = False) -> None:
        self.stream, self.name, self.bfloat16 = stream, name, bfloat16
        self.dtype = np.dtype(dtype)

    def take(self, count: int) -> Values:
        """Return the next `count` elements."""
        data = self.stream.read(count * self.dtype.itemsize)
        if len(data) != count * self.dtype.itemsize:
            msg = f"{self.name}: the file ends before its array does"
            raise RolloutError(msg)
        values: Values = np.frombuffer(data, self.dtype)
        if self.bfloat16:
            # bfloat16 is the upper half of a float32
            values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values


class OnePerSequence:
    """Reads one number a sequence and returns one a token."""

    def __init__(self, run: Run, width: int) -> None:
        self.run, self.width = run, width
        self.token = self.first = 0
        self.held = np.empty(0)

    def take(self, count: int) -> Values:
        """Return the numbers of the next `count` tokens."""
        rows = np.arange(self.token, self.token + count) // self.width
        still_needed = self.held[rows[0] - self.first :]
        missing = int(rows[-1]) + 1 - int(rows[0]) - len(still_needed)
        self.held = np.concatenate((still_needed, self.run.take(missing))) if missing else still_needed
        self.first, self.token = int(rows[0]), self.token + count
        return self.held[rows - self.first]


class Rectangular(ABC):
    """A file of rectangular arrays; a subclass describes them in `arrays` and opens them in `run`."""

    arrays: dict[str, Stored]
    problems: dict[str, str]

    @abstractmethod
    def run(self, name: str, stack: ExitStack) -> Run:
        """Open an array for reading front to back."""

    def chunks(self, roles: Roles, chunk_tokens: int) -> Iterator[Chunk]:
        """Yield the tokens, at most `chunk_tokens` at a time, whatever the length of a sequence."""
        shape = tuple(n or 0 for n in self.arrays[roles.log_prob].shape)
        size = math.prod(shape)
        with ExitStack() as stack:
            pi, mu = self.run(roles.log_prob, stack), self.run(roles.behavior_log_prob, stack)
            a = self.run(roles.advantages, stack)
            mask = None if roles.mask is None else self.run(roles.mask, stack)
            advantages = a if self.arrays[roles.advantages].shape == shape else OnePerSequence(a, shape[1])
            for start in range(0, size, chunk_tokens):
                count = min(chunk_tokens, size - start)

                def locate(i: int, start: int = start) -> tuple[int, ...]:
                    return tuple(int(n) for n in np.unravel_index(start + i, shape))

                yield Chunk.of(
                    (run.take(count) for run in (pi, mu, advantages)),
                    np.ones(count, np.bool_) if mask is None else as_mask(mask.take(count), mask.name, locate),
                    locate,
                )
