"""Guards around torch's graphs, for functions whose work depends on values such as those of a mask."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from drpo_torch.autograd import is_transformed

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

__all__ = ["Context", "depends_on_values", "gradient_like", "may_be_overwritten", "refuse_transformed_cotangents", "rows_of"]


class Context(SimpleNamespace):
    """What a `torch.autograd.Function` keeps for its backward pass, inside an operator, where there is no autograd."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Keep tensors."""
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: torch.Tensor) -> None:
        """Nothing to do."""

    def set_materialize_grads(self, _: bool) -> None:  # noqa: FBT001 -- autograd's signature
        """Nothing to do."""


def depends_on_values(function: Callable[P, R]) -> Callable[P, R]:
    """Break the graph of `torch.compile` around a function."""
    disabled: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def refuse_transformed_cotangents(*cotangents: torch.Tensor | None) -> None:
    """Raise in a backward pass over several cotangents at once: which rows are needed differs between them."""
    if any(cotangent is not None and is_transformed(cotangent) for cotangent in cotangents):
        msg = (
            "drpo_torch: vectorised cotangents (is_grads_batched, jacobian(vectorize=True), vmap) are not implemented for "
            "log-probs and divergences from logits; pass one cotangent at a time"
        )
        raise RuntimeError(msg)


def gradient_like(matrix: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory for the gradient in a matrix, with contiguous rows if those of the matrix are."""
    # empty_like has its own idea of what overlapping memory is like
    return (
        torch.empty_like(matrix) if matrix.stride(-1) != 1 else torch.empty_like(matrix, memory_format=torch.contiguous_format)
    )


def may_be_overwritten(matrix: torch.Tensor) -> bool:
    """True if each element of a matrix has memory of its own, and nothing will read it again.

    Elements of an expanded matrix share memory. Hooks of saved tensors are active in a checkpoint, which computes from the
    same logits a second time.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # noqa: FBT003, SLF001 -- torch has no public name
        return False
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    if rows == 1:
        return columns == 1 or right > 0
    if columns == 1:
        return down > 0
    return (right > 0 and down > (columns - 1) * right) or (down > 0 and right > (rows - 1) * down)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor (…, n) as (rows, n), n being 0 too."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
