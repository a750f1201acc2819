"""Notes of `drpo check` on stderr."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["note", "warnings_as_lines"]


def note(line: str) -> None:
    """Write a line that is no error to stderr."""
    sys.stderr.write(f"drpo check: note: {line}\n")


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Write each different warning once, as a line."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
        line = f"{category.__name__}: {' '.join(str(message).split())} ({Path(filename).name}, line {lineno})"
        if line not in seen:
            seen.add(line)
            note(line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
