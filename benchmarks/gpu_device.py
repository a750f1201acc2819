"""A GPU, or CPU tensors that the library takes for one's: sizes, clock, memory and graphs of a run of `gpu.py`."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from measure import elapsed

if TYPE_CHECKING:
    from collections.abc import Callable

    Function = Callable[[], object]

__all__ = ["Device", "Gpu", "Miniature", "Sizes"]

PACKAGES = ("torch", "triton", "liger-kernel", "verl")


class Sizes(NamedTuple):
    """Of what is checked and timed."""

    tokens: tuple[tuple[int, int], ...] = ((4096, 1024), (64, 1024))
    """Of the per-token losses."""
    rows: int = 8192
    vocabulary: int = 151_936
    hidden: int = 4096
    chunk: int = 2048
    """Tokens that a head takes at a time."""
    copied: int = 2**30
    """Bytes whose copy tells the bandwidth."""
    checked: int = 96
    checked_sequences: int = 16
    checked_vocabulary: int = 8229
    checked_hidden: int = 256
    far: int = 14_208
    """Rows of so many logits that an offset of 32 bits can't reach the last ones."""
    rounds: tuple[int, int] = (3, 41)
    """Of a case, at least and at most."""


class Device(Protocol):
    """Where tensors are, and how what is done with them is timed, measured and captured."""

    miniature: bool
    device: torch.device
    sizes: Sizes

    def seconds(self, function: Function) -> float:
        """How long a call takes."""

    def memory(self, function: Function) -> int:
        """Bytes of the peak during a call beyond what is in use before it."""

    def captured(self, function: Function) -> tuple[Function, Any]:
        """What does the call's work again, and where its results then are."""

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`torch.compile`."""

    def machine(self) -> dict[str, Any]:
        """What the figures depend on."""


class Gpu:
    """The current device of CUDA or ROCm."""

    miniature = False
    device = torch.device("cuda")

    def __init__(self) -> None:
        """As many rows as have room for the naive loss, which takes some 32 bytes a logit."""
        free, _ = torch.cuda.mem_get_info()
        most = int(0.6 * free) // (32 * Sizes().vocabulary)
        self.sizes = Sizes(rows=min(Sizes().rows, max(128, most // 128 * 128)))
        # what a call leaves in the cache is no help to the next one
        self._cache = torch.empty(2**28, dtype=torch.uint8, device=self.device)

    def seconds(self, function: Function) -> float:
        """Between two events on the device, which finds its cache full of something else."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cache.zero_()
        # else the device, busy with the above, would hide how long the host takes to launch
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end)

    def memory(self, function: Function) -> int:
        """By torch's allocator."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def captured(self, function: Function) -> tuple[Function, Any]:
        """A CUDA graph, after calls on another stream that warm up."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function()
        return graph.replay, results

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """By inductor, for each shape on its own."""
        return torch.compile(function, dynamic=False)

    def machine(self) -> dict[str, Any]:
        """The device, its driver and memory, and versions."""
        properties = torch.cuda.get_device_properties(self.device)
        found = {"device": properties.name, "memory": properties.total_memory, "driver": _driver()}
        return found | {"cuda": torch.version.cuda, "hip": torch.version.hip, "packages": _packages()}


class Miniature:
    """CPU tensors under Triton's interpreter: small sizes, no graphs, functions that are compiled to themselves."""

    miniature = True
    device = torch.device("cpu")
    sizes = Sizes(
        tokens=((2, 32),),
        rows=4,
        vocabulary=128,
        hidden=16,
        chunk=2,
        copied=2**12,
        checked=6,
        checked_sequences=1,
        checked_vocabulary=150,
        checked_hidden=16,
        far=9,
        rounds=(1, 1),
    )

    def __init__(self) -> None:
        """From now on the library takes the CPU for a GPU."""
        from drpo_torch import _host, engines  # noqa: PLC0415 -- what is patched

        from launches import tried  # noqa: PLC0415

        _host.HOST_DEVICES.clear()
        engines.TRITON_DEVICES.add("cpu")
        # trials by the interpreter take seconds, and have tests of their own
        self._stack = ExitStack()
        self._stack.enter_context(tried())

    def seconds(self, function: Function) -> float:
        """By the host's clock."""
        return elapsed(function)

    def memory(self, function: Function) -> int:
        """Not measured."""
        del function
        return 0

    def captured(self, function: Function) -> tuple[Function, Any]:
        """The function itself, which writes its results where they were."""
        results: Any = function()

        def replay() -> None:
            again: Any = function()
            for result, new in zip(results, again, strict=True):
                result.detach().copy_(new.detach())

        return replay, results

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself."""
        return function

    def machine(self) -> dict[str, Any]:
        """Versions."""
        return {"device": "CPU tensors, Triton's interpreter", "packages": _packages()}


def _driver() -> str | None:
    """As NVIDIA's own command says."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, check=False, capture_output=True, text=True).stdout.splitlines()
    return lines[0].strip() if lines else None


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {"torch": torch.__version__}
    for name in PACKAGES[1:]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
