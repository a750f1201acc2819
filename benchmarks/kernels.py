"""Triton kernels as they were launched, compiled to machine code for GPUs that are not there.

Triton ships the assembler of each architecture, which says how many registers a thread has and how much of it did not fit
in them ("spills", which go through memory). Types, strides of 1 and alignments are those of the launch.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from contextlib import redirect_stdout
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.jit import create_function_from_signature

if TYPE_CHECKING:
    from collections.abc import Iterable

    from device import Recording

__all__ = ["ARCHITECTURES", "Compiled", "compiled"]

ARCHITECTURES = (80, 90, 100)
"""A100; H100 and H200; B200."""
WARP = 32
_ACCESSES = {"tt.load": "L", "tt.store": "S", "gpu.barrier": "B", "ttg.barrier": "B"}


class Compiled(NamedTuple):
    """Registers a thread, and bytes a thread stored and loaded where they do not suffice.

    `accesses`: a letter for each load (L), store (S) and barrier (B) of a program, in their order.
    """

    kernel: str
    architecture: str
    registers: int
    spills: int
    accesses: str


def compiled(recordings: Iterable[Recording], architectures: Iterable[int] = ARCHITECTURES) -> list[Compiled]:
    """Every kernel that was launched, in the order of first launches, once for each architecture; equal names are numbered."""
    launches: dict[Any, Any] = {}
    for recording in recordings:
        for kernel, arguments, options in recording.kernels:
            _, specialization, *_ = _bound(kernel, arguments, options, architecture=ARCHITECTURES[0])
            launches.setdefault((kernel.cache_key, str(specialization), str(options)), (kernel, arguments, options))
    found, names = [], Counter[str]()
    for kernel, arguments, options in launches.values():
        names[kernel.__name__] += 1
        name = kernel.__name__ if names[kernel.__name__] == 1 else f"{kernel.__name__} ({names[kernel.__name__]})"
        found += [_compiled(name, kernel, arguments, options, architecture) for architecture in architectures]
    return found


def _bound(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], architecture: int) -> tuple[Any, ...]:
    """What a launch finds out of its arguments: their values by name, types with what is special to them, and the rest."""
    backend = make_backend(GPUTarget("cuda", architecture, WARP))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return (*bind(*arguments, **{"debug": False} | options), backend)


def _compiled(name: str, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], architecture: int) -> Compiled:
    bound, specialization, rest, backend = _bound(kernel, arguments, options, architecture)
    pack = kernel._pack_args  # noqa: SLF001 -- what a launch calls
    parsed, signature, constants, attributes = pack(backend, {"debug": False} | options, bound, specialization, rest)
    source, said = ASTSource(kernel, signature, constants, attributes), io.StringIO()
    with TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope(), redirect_stdout(said):
        # an empty cache, because what was compiled before says nothing
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        made = compile_source(source, target=GPUTarget("cuda", architecture, WARP), options=parsed.__dict__)
    accesses = "".join(_ACCESSES[name] for name in re.findall("|".join(map(re.escape, _ACCESSES)), made.asm["ttgir"]))
    return Compiled(name, f"sm_{architecture}", *_of_log(said.getvalue()), accesses)


def _of_log(log: str) -> tuple[int, int]:
    """Registers and spills from what the assembler says of the one kernel."""
    registers, spills = re.findall(r"Used (\d+) registers", log), re.findall(r"(\d+) bytes spill", log)
    if len(registers) != 1 or len(spills) != 2:
        msg = f"what ptxas says of a kernel has changed:\n{log}"
        raise RuntimeError(msg)
    return int(registers[0]), sum(map(int, spills))
