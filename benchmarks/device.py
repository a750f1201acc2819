"""CPU tensors that say that they are a GPU's, and what a GPU would be given to do with them.

In a `Recording`, ``tensor.device`` is ``cuda`` and memory that is asked for there is the CPU's: so the library takes the path
that it takes on a GPU, whichever checks of the device lead there, and what it asks for is counted.

- A launch: an operation of torch that is dispatched, other than views, allocations and operations without a result to write.
  It counts as one, although some (sort, nonzero, products that are split) launch several kernels. A Triton kernel is one.
- A wait for the host: what needs a value (`item`, `bool`, `nonzero`, an index of truth values), and copies either way.

What is counted is therefore the least that a GPU is given. Tensors that a program makes on the CPU on purpose count as the
GPU's too. Backward passes are begun by `torch.autograd`, not by a tensor's method.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Recording"]

HOST, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
VIEWS = {"_unsafe_view", "_reshape_alias", "lift_fresh"}
"""That torch does not call views."""
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
ON_THE_HOST = {"scalar_tensor", "_local_scalar_dense"}
"""A number that goes along with a kernel's arguments, and a copy that no kernel makes."""
WAITS = {
    "_local_scalar_dense", "nonzero", "equal", "masked_select", "bincount", "_unique2", "unique_consecutive", "unique_dim",
}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
TO_THE_HOST = {"cpu", "tolist", "__array__"}
TO_THE_DEVICE = {"tensor", "as_tensor", "asarray"}


class Recording:
    """Launches, by the name of the operation or kernel, and waits, while it is entered.

    Triton kernels run where `Recording.execute` is true, by the interpreter; `kernels` are those that were launched, with
    their arguments.
    """

    def __init__(self, *, execute: bool) -> None:
        """Of nothing yet."""
        self.execute = execute
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.kernels: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.memory = Memory()

    def copy(self) -> Recording:
        """What it has counted by now."""
        found = Recording(execute=self.execute)
        found.launches, found.waits, found.kernels = self.launches.copy(), self.waits.copy(), [*self.kernels]
        return found

    def move(self, start: Recording, other: Recording) -> None:
        """Count for another recording, and not here, what was counted since the start, a copy of this one."""
        other.launches += self.launches - start.launches
        other.waits += self.waits - start.waits
        other.kernels += self.kernels[len(start.kernels) :]
        self.launches, self.waits = start.launches.copy(), start.waits.copy()
        del self.kernels[len(start.kernels) :]

    @contextmanager
    def entered(self) -> Iterator[Recording]:
        """Be a GPU meanwhile."""
        with ExitStack() as stack:
            for patch in self._patches():
                stack.enter_context(patch)
            stack.enter_context(_Operations(self))
            stack.enter_context(_Device(self))
            yield self

    def _patches(self) -> Iterator[Any]:
        from triton.runtime import interpreter, jit  # noqa: PLC0415 -- an extra

        def launched(launcher: Any, kernel: Any, run: Callable[[], Any], *arguments: Any, **options: Any) -> Any:
            del launcher
            self.launches[f"triton {kernel.__name__}"] += 1
            with _disable_current_modes(), torch._C.DisableTorchFunction():  # noqa: SLF001 -- torch has no public name
                self.kernels.append((kernel, arguments, options))
                return run() if self.execute else None

        interpreted, compiled = interpreter.GridExecutor.__call__, jit.JITFunction.run

        def interpret(executor: Any, *arguments: Any, **options: Any) -> Any:
            run = lambda: interpreted(executor, *arguments, **options)
            return launched(executor, executor.fn, run, *arguments, **options)

        def start(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            run = lambda: compiled(kernel, *arguments, grid=grid, warmup=warmup, **options)
            return launched(kernel, kernel, run, *arguments, **options)

        yield mock.patch.object(interpreter.GridExecutor, "__call__", interpret)
        yield mock.patch.object(jit.JITFunction, "run", start)
        # else backward passes, too, would run where the mode has been left
        yield mock.patch.object(torch.autograd, "has_torch_function", return_value=False)
        yield mock.patch.object(torch.cuda, "get_device_name", return_value="no GPU")
        yield mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False)


class Memory:
    """Bytes of the tensors that operations have made and that are still there, and the most that there were."""

    def __init__(self) -> None:
        """None yet."""
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def note(self, made: Iterable[torch.Tensor], given: Iterable[torch.Tensor]) -> None:
        """What an operation has made, less what it was given."""
        known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in given}
        self._live = {key: (reference, size) for key, (reference, size) in self._live.items() if not reference.expired()}
        for tensor in made:
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference.cdata not in known:
                self._live[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))


class _Device(TorchFunctionMode):
    """Says that tensors are the device's, and puts on the host what is asked for there."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__:
            return DEVICE
        kwargs = kwargs or {}
        if name in TO_THE_HOST or _downloads(name, args, kwargs) or _uploads(name, args, kwargs):
            self._recording.waits[name] += 1
        args, kwargs = tree_map(_on_host, (tuple(args), kwargs))
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = function.overloadpacket.__name__
        result = function(*args, **(kwargs or {}))
        if name in WAITS or (name in INDEXED and _has_truths(args[1])) or function.name() == "aten::repeat_interleave.Tensor":
            self._recording.waits[name] += 1
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._recording.memory.note(written, (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)))
        nothing = bool(written) and all(tensor.numel() == 0 for tensor in written)
        if not (function.is_view or nothing or name in VIEWS | ALLOCATIONS | ON_THE_HOST):
            self._recording.launches[name] += 1
        return result


def _on_host(value: Any) -> Any:
    return HOST if _is_device(value) else value


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.startswith(("cpu", "cuda")))


def _downloads(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return name == "to" and any(leaf in (HOST, "cpu") for leaf in tree_leaves((args[1:], kwargs)) if _is_device(leaf))


def _uploads(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether numbers of the host become a tensor of the device."""
    at = torch.device(kwargs.get("device") or HOST)
    return name in TO_THE_DEVICE and at.type == DEVICE.type and not isinstance(args[0], torch.Tensor)


def _has_truths(indices: Any) -> bool:
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
