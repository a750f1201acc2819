"""NumPy's .npz: a zip of .npy members, read through zipfile, because np.load would allocate whatever a header claims."""

from __future__ import annotations

import math
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from drpo_core.audit.readers.base import Stored
from drpo_core.audit.readers.rectangular import Rectangular, Run

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

__all__ = ["Npz"]

# deflate can't expand a byte into more bytes than this
MOST_DEFLATED = 1032


class Npz(Rectangular):
    """A .npz file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays, self.problems = {}, {}
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    name = info.filename.removesuffix(".npy")
                    self.arrays[name], problem = _describe(archive, info)
                    if problem:
                        self.problems[name] = problem

    def run(self, name: str, stack: ExitStack) -> Run:
        """Open a member, past its header."""
        archive = stack.enter_context(zipfile.ZipFile(self.path))
        stream = stack.enter_context(archive.open(f"{name}.npy"))
        return Run(stream, name, _npy_header(stream)[2].str)


def _describe(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[Stored, str]:
    """Return what a member's header says, and what is wrong with it, if anything."""
    problem = _why_not_inflate(info)
    if problem:
        return Stored((), "unreadable", 0), problem
    try:
        with archive.open(info) as stream:
            shape, fortran, dtype = _npy_header(stream)
            header = stream.tell()
    except (ValueError, EOFError, SyntaxError, RecursionError, MemoryError):
        return Stored((), "unreadable", 0), "not a .npy array of version 1.0"
    stored = Stored(shape, dtype.name, math.prod(shape))
    claimed = header + stored.size * dtype.itemsize
    if dtype.hasobject:
        problem = "an object array, which is a pickle and is never loaded"
    elif claimed != info.file_size:
        problem = f"its header claims {claimed} bytes, the file has {info.file_size}"
    elif fortran and len(shape) > 1:
        problem = "stored in Fortran order; save np.ascontiguousarray of it"
    return stored, problem


def _why_not_inflate(info: zipfile.ZipInfo) -> str:
    """Return why a member should not even be opened; empty if it may."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed in a way that .npz files are not"
    if info.file_size > MOST_DEFLATED * info.compress_size + 1024:
        return "claims to expand more than deflate can: a zip bomb"
    return ""


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, Fortran order and dtype. The header is parsed as a literal; nothing is evaluated."""
    # versions 2 and 3 exist for structured dtypes and let a header claim 4 GB
    if np.lib.format.read_magic(stream) != (1, 0):
        msg = "not version 1.0"
        raise ValueError(msg)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if any(n < 0 for n in shape):
        msg = "a negative size"
        raise ValueError(msg)
    return shape, fortran, dtype
