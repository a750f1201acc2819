"""The .safetensors format: the library checks the file, and the bytes are read from the offsets in its header.

The library's own slices are by row and can't hold bfloat16 in NumPy.
"""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING

import numpy as np

from drpo_core.audit.readers.base import RolloutError, Stored
from drpo_core.audit.readers.rectangular import Rectangular, Run

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

__all__ = ["SafeTensors"]

DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2",
}  # fmt: skip


class SafeTensors(Rectangular):
    """A .safetensors file."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - of the extra `cli`

        self.path, self.arrays, self.problems = path, {}, {}
        # opened here first: for a directory or a missing file OSError is clearer than the library's message
        with path.open("rb") as file:
            prefix = file.read(8)
        try:
            with safe_open(path, framework="np") as checked:
                for name in checked.offset_keys():
                    tensor = checked.get_slice(name)
                    shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
                    dtype = "bfloat16" if kind == "BF16" else np.dtype(DTYPES.get(kind, object)).name
                    self.arrays[name] = Stored(shape, dtype if kind in DTYPES else kind, math.prod(shape))
        except SafetensorError as error:
            msg = f"damaged, or not what its suffix says: {error}"
            raise RolloutError(msg) from error
        (header_size,) = struct.unpack("<Q", prefix)
        with path.open("rb") as file:
            file.seek(8)
            self.header = json.loads(file.read(header_size))
        self.start = 8 + header_size

    def run(self, name: str, stack: ExitStack) -> Run:
        """Open the file at a tensor."""
        kind, (begin, _) = self.header[name]["dtype"], self.header[name]["data_offsets"]
        file = stack.enter_context(self.path.open("rb"))
        file.seek(self.start + begin)
        return Run(file, name, DTYPES[kind], bfloat16=kind == "BF16")
