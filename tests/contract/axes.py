"""The enumerations whose product is the matrix. The first member of each is the base that a failing cell is reduced to."""

from __future__ import annotations

import contextlib
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


class DType(StrEnum):
    """What an array may be made of."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"
    INT64 = "int64"
    INT32 = "int32"
    BOOL = "bool"


FLOATS = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16, DType.FLOAT64)
INTEGERS = (DType.INT64, DType.INT32)
HALVES = (DType.BFLOAT16, DType.FLOAT16)


class Given(StrEnum):
    """Whether an optional argument is passed."""

    ABSENT = "absent"
    GIVEN = "given"


class Library(StrEnum):
    """What the arrays of a call to the core belong to."""

    NUMPY = "numpy"
    READ_ONLY = "numpy-read-only"
    STRICT = "array-api-strict"
    TORCH = "torch"
    JAX = "jax"


class Engine(StrEnum):
    """Who runs the formula."""

    AUTO = "auto"
    ARRAYS = "arrays"
    COMPILED = "compiled"


class Device(StrEnum):
    """What the adapter of torch takes CPU tensors for; see `device`."""

    CPU = "cpu"
    GPU = "taken for a gpu"


class Shape(StrEnum):
    """How many tokens there are, and in how many axes."""

    PADDED = "(3, 4)"
    NUMBER = "()"
    PACKED = "(6,)"
    DEEP = "(2, 2, 3)"
    ONE = "(1,)"
    NO_TOKENS = "(2, 0)"
    NO_ROWS = "(0, 8)"
    LARGE = "(2, 9000)"  # more than the pieces and blocks in which engines work

    @property
    def leading(self) -> tuple[int, ...]:
        """The shape itself."""
        return tuple(int(n) for n in self.value.strip("()").split(",") if n.strip())


class Storage(StrEnum):
    """How an array lies in memory."""

    CONTIGUOUS = "contiguous"
    TRANSPOSED = "transposed"
    SLICED = "sliced"
    EXPANDED = "expanded"


class Masked(StrEnum):
    """Which tokens the mask leaves out."""

    SOME = "some masked"
    NONE = "none masked"
    ALL = "all masked"


class Regime(StrEnum):
    """Where the two policies are."""

    TYPICAL = "typical"
    ON_POLICY = "on-policy"
    CERTAIN = "certain"  # probabilities of 1, and one rounding below it
    DISTANT = "distant"  # log-ratios of tens of nats, logits of ±300
    IMPOSSIBLE = "impossible"  # probabilities of 0


class Ambient(StrEnum):
    """State of a library around the call."""

    PLAIN = "plain"
    NUMPY_RAISE = "numpy errstate raise"
    NO_GRAD = "no_grad"
    INFERENCE = "inference_mode"
    AUTOCAST_BFLOAT16 = "autocast bfloat16"
    AUTOCAST_FLOAT16 = "autocast float16"
    DEFAULT_DEVICE = "default device meta"
    DEFAULT_DTYPE = "default dtype float64"
    DETERMINISTIC = "deterministic"
    ANOMALY = "anomaly mode"
    NO_X64 = "x64 off"
    DEBUG_NANS = "debug_nans"

    @property
    def library(self) -> str | None:
        """Whose state it is."""
        if self is Ambient.PLAIN:
            return None
        return {Ambient.NUMPY_RAISE: "numpy", Ambient.NO_X64: "jax", Ambient.DEBUG_NANS: "jax"}.get(self, "torch")

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """The state, for as long as the block lasts."""
        with _CONTEXTS[self](), contextlib.ExitStack():
            yield


AUTOCAST = {Ambient.AUTOCAST_BFLOAT16: DType.BFLOAT16, Ambient.AUTOCAST_FLOAT16: DType.FLOAT16}


@contextlib.contextmanager
def _switched(setter: Any, value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


_CONTEXTS: dict[Ambient, Any] = {
    Ambient.PLAIN: contextlib.nullcontext,
    # underflow is what an exponential of a distant log-ratio is meant to do
    Ambient.NUMPY_RAISE: lambda: np.errstate(divide="raise", over="raise", invalid="raise"),
    Ambient.NO_GRAD: torch.no_grad,
    Ambient.INFERENCE: torch.inference_mode,
    Ambient.AUTOCAST_BFLOAT16: lambda: torch.autocast("cpu", torch.bfloat16),
    Ambient.AUTOCAST_FLOAT16: lambda: torch.autocast("cpu", torch.float16),
    Ambient.DEFAULT_DEVICE: lambda: _switched(torch.set_default_device, "meta", None),
    Ambient.DEFAULT_DTYPE: lambda: _switched(torch.set_default_dtype, torch.float64, torch.float32),
    Ambient.DETERMINISTIC: lambda: _switched(torch.use_deterministic_algorithms, True, False),
    Ambient.ANOMALY: lambda: torch.autograd.set_detect_anomaly(mode=True),
    Ambient.NO_X64: lambda: jax.enable_x64(False),
    Ambient.DEBUG_NANS: lambda: jax.debug_nans(True),
}


class Use(StrEnum):
    """What is done with the function and its result. See `uses`, which has one function for each."""

    FORWARD = "forward"
    BACKWARD = "backward"
    RETAINED = "retain_graph"
    ACCUMULATED = "gradient accumulation"
    SCALED = "loss scaled by 65536"
    CONSTANTS = "constants require grad"
    CHECKPOINT = "checkpoint"
    BATCHED = "is_grads_batched"
    CREATE_GRAPH = "create_graph"
    FUNC_GRAD = "func.grad"
    VMAP = "vmap"
    VMAP_ONE = "vmap over one argument"
    TWICE = "two calls of one tensor"
    COMPILE = "compile"
    JIT = "jit"
    JVP = "jvp"


TORCH_USES = (
    Use.BACKWARD,
    Use.FORWARD,
    Use.RETAINED,
    Use.ACCUMULATED,
    Use.SCALED,
    Use.CONSTANTS,
    Use.CHECKPOINT,
    Use.BATCHED,
    Use.TWICE,
    Use.CREATE_GRAPH,
    Use.FUNC_GRAD,
    Use.VMAP,
    Use.VMAP_ONE,
    Use.COMPILE,
)
JAX_USES = (Use.BACKWARD, Use.FORWARD, Use.JIT, Use.VMAP, Use.VMAP_ONE, Use.JVP, Use.CHECKPOINT)
CORE_USES = (Use.FORWARD, Use.BACKWARD, Use.JIT)


class Reduction(NamedTuple):
    """A reduction of the core by name, with what `functools.partial` binds to it."""

    name: str
    bound: tuple[tuple[str, float | str], ...] = ()

    @property
    def counts(self) -> bool:
        """Whether its denominator is a count, and no number that is bound to it."""
        return "normalizer" not in dict(self.bound)

    def __str__(self) -> str:
        """Name, and what is bound."""
        return self.name + "".join(f" {key}={value}" for key, value in self.bound)


BOUND_ARRAY = "array"
"""Stands for the world's array of that name, bound to a reduction."""

REDUCTIONS = (
    Reduction("token_mean"),
    Reduction("sequence_mean_token_mean"),
    Reduction("sequence_mean_token_sum", (("horizon", 7.0),)),
    Reduction("token_mean", (("normalizer", 7.0),)),
    Reduction("sequence_mean_token_mean", (("token_weights", BOUND_ARRAY),)),
    Reduction("linear"),
)
"""Those of the core, with numbers and arrays bound, and a function of one's own by `linear_reduction`."""


class Number(StrEnum):
    """How a number is passed."""

    ABSENT = "absent"
    PLAIN = "number"
    SCALAR = "NumPy scalar"
    ARRAY = "0-d array"


class Measured(NamedTuple):
    """A divergence that a vocabulary-scale loss measures itself."""

    of: str  # "top_k", "full" or "head"
    kind: str

    def __str__(self) -> str:
        """What, and which divergence."""
        return f"{self.of} {self.kind}"


class Recorded(StrEnum):
    """From what of the sampler's policy a score-centring term is formed."""

    TOP_K = "top_k"
    FULL = "full"
    HEAD = "head"


class Supported(StrEnum):
    """How the support of truncated sampling is passed."""

    IDS = "ids and offsets"
    BITS = "bits"
    MASK = "from a mask"


class Divided(StrEnum):
    """How a vocabulary that ranks divide is passed; here one rank has all of it."""

    GROUP = "group"
    DTENSOR = "DTensor"


MEASURED = tuple(Measured(of, kind) for of, kind in (("top_k", "tv"), ("top_k", "kl"), ("full", "kl"), ("head", "tv")))
