"""Softmax statistics and gradients of logits, a few rows at a time in buffers that stay in the cache.

`torch.softmax` is the fastest exponential there is on a CPU, and its largest value is 1 / Σ e^(x − max x): the
log-normaliser follows from it, so nothing is exponentiated twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

__all__ = ["Normalizer", "Tempering", "Workspace", "eager", "gradient_of_logits", "normalize", "working_dtype"]

# what a logit this far below the largest adds underflows in any dtype; −inf times its probability 0 would be a NaN
_NEGLIGIBLE = -1000.0
_CPU_BYTES_PER_THREAD, _DEVICE_BYTES = 5 << 18, 64 << 20


class Normalizer(NamedTuple):
    """Per row: max x, log Σ e^(x − max x), the entropy in nats if it was asked for (``"jit"``: always).

    `total` is the sum of the softmax that was left, 1 to rounding.
    """

    maximum: torch.Tensor
    log_sum: torch.Tensor
    entropy: torch.Tensor | None
    total: torch.Tensor | None = None

    @property
    def log_normalizer(self) -> torch.Tensor:
        """Log Σ e^x."""
        return self.maximum + self.log_sum

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """The log-probs x − log Σ e^x, without rounding to the size of the logits."""
        return x - self.maximum - self.log_sum


class Tempering(NamedTuple):
    """From what a head gives, z, to the policy's logits x = cap·tanh(z/cap) / T."""

    temperature: float = 1.0
    softcap: float | None = None

    def __call__(self, z: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The logits x, in the working dtype; z itself if that is x already, else in `out` if given."""
        if self.temperature == 1.0 and self.softcap is None and z.dtype == working_dtype(z.dtype):
            return z
        x = torch.empty_like(z, dtype=working_dtype(z.dtype)) if out is None else out
        x.copy_(z)
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        return x.div_(self.temperature) if self.temperature != 1.0 else x

    def pull_back_(self, gradient: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """∂/∂z from ∂/∂x, in place."""
        if self.softcap is not None:
            tanh = (z.to(gradient.dtype) / self.softcap).tanh_()
            gradient.addcmul_(gradient, tanh.square_(), value=-1.0)
        return gradient.div_(self.temperature) if self.temperature != 1.0 else gradient


class Workspace:
    """Two buffers of a few rows, for x and its softmax."""

    def __init__(self, vocabulary: int, like: torch.Tensor) -> None:
        dtype = working_dtype(like.dtype)
        budget = _CPU_BYTES_PER_THREAD * torch.get_num_threads() if like.device.type == "cpu" else _DEVICE_BYTES
        self.rows = max(1, budget // max(1, vocabulary * dtype.itemsize))
        self.x, self.p = torch.empty((2, self.rows, vocabulary), dtype=dtype, device=like.device)

    def steps(self, count: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Slices that cover `count` rows, each with buffers of its shape."""
        for start in range(0, count, self.rows):
            step = slice(start, min(start + self.rows, count))
            yield step, self.x[: step.stop - start], self.p[: step.stop - start]


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Break the graph of `torch.compile` around a function whose work depends on values, such as those of a mask."""
    disabled: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for itself, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalize(
    logits: torch.Tensor, tempering: Tempering, work: Workspace, *, entropy: bool = False, out: torch.Tensor | None = None
) -> Normalizer:
    """Statistics of the softmax of each row of z (rows, V); the softmax itself goes to `out`, which may be z."""
    statistics = torch.empty((4, logits.shape[0]), dtype=work.x.dtype, device=logits.device)
    for step, buffer, p in work.steps(logits.shape[0]):
        x = tempering(logits[step], buffer)
        maximum = x.amax(-1, keepdim=True)
        if entropy:
            x = torch.sub(x, maximum, out=buffer)
        p = torch.softmax(x, -1, out=p if out is None else out[step])  # noqa: PLW2901 -- p is where to put it
        # torch adds up the exponentials one after the other: of 10⁵ of them the sum is off by 10⁻⁵, but this one is not
        total = p.sum(-1)
        log_sum = (total / p.amax(-1)).log_()
        statistics[0, step], statistics[1, step], statistics[3, step] = maximum[:, 0], log_sum, total
        if entropy:
            terms = torch.mul(p, x, out=buffer)
            mean = terms.sum(-1).div_(total)
            if mean.isnan().any():
                # 0 · −inf of an impossible token; a row that holds a NaN has one in its log_sum too
                mean = terms.nan_to_num_(nan=0.0).sum(-1).div_(total)
            torch.sub(log_sum, mean, out=statistics[2, step])
    return Normalizer(statistics[0], statistics[1], statistics[2] if entropy else None, statistics[3])


def gradient_of_logits(
    logits: torch.Tensor,
    tempering: Tempering,
    work: Workspace,
    *,
    index: torch.Tensor,
    at_index: torch.Tensor,
    scale: torch.Tensor,
    slope: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    normalized: bool = False,
    out: torch.Tensor,
) -> None:
    """∂/∂z of a function of softmaxes: p (scale − slope (x − max x)) + at_index at the column `index`.

    `rows` selects rows of z and of `out`, which may be z; every other array has one entry a selected row. With
    `normalized` z holds p already, to be divided by its `total` by way of `scale`.
    """
    for step, buffer, p in work.steps(len(scale)):
        z = logits[step] if rows is None else logits[rows[step]]
        if normalized:
            # in place, if it can be, and not by way of the buffer
            p = torch.mul(z, scale[step, None], out=p if rows is not None else out[step])  # noqa: PLW2901
        else:
            x = tempering(z, buffer)
            torch.softmax(x, -1, out=p)
            total = p.sum(-1, keepdim=True)
            share = scale[step, None] / total
            if slope is None:
                p.mul_(share)
            else:
                x = torch.sub(x, x.amax(-1, keepdim=True), out=buffer).clamp_(min=_NEGLIGIBLE)
                p.mul_(x.mul_(-slope[step, None] / total).add_(share))
        p.scatter_add_(-1, index[step, None], at_index[step, None])
        tempering.pull_back_(p, z)
        if rows is not None or not normalized:
            out[step if rows is None else rows[step]] = p
