"""Full divergences as an operator that `torch.compile` keeps in one graph; its backward pass computes them once more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drpo_torch._checks import check_logits, check_shape, check_tensor
from drpo_torch.vocabulary.graph import Context
from drpo_torch.vocabulary.row_map import check_vocabulary_size
from drpo_torch.vocabulary.softmax import working_dtype
from drpo_torch.vocabulary.support import Support

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core.loss import Engine

__all__ = ["of_two_policies"]

_ARGUMENTS = (
    "Tensor logits, Tensor behavior_logits, float temperature, Tensor? temperatures, float? behavior_temperature, "
    "Tensor? behavior_temperatures, Tensor? support_ids, Tensor? support_offsets, Tensor? support_bits, int? vocabulary_size, "
    "str engine"
)


def of_two_policies(
    logits: torch.Tensor,
    behavior_logits: torch.Tensor,
    temperature: float | torch.Tensor,
    behavior_temperature: float | torch.Tensor | None,
    support: Support | None,
    vocabulary_size: int | None,
    engine: Engine,
) -> tuple[torch.Tensor, torch.Tensor]:
    """TV and KL, as `drpo_torch.full_divergences` gives them."""
    check_logits(logits)
    check_tensor("behavior_logits", behavior_logits, beside=logits)
    check_shape("behavior_logits", behavior_logits, logits.shape, "logits")
    check_vocabulary_size(vocabulary_size, logits.shape[-1])
    temperatures: list[Any] = []
    for given in (temperature, behavior_temperature):
        per_row = isinstance(given, torch.Tensor)
        temperatures += [None if given is None else 1.0 if per_row else float(given), given.detach() if per_row else None]  # type: ignore[union-attr]
    supports = (None, None, None) if support is None else (support.ids, support.offsets, support.bits)
    tv, kl = _full_divergences(logits, behavior_logits.detach(), *temperatures, *supports, vocabulary_size, engine)
    return tv, kl


def _called(arguments: tuple[Any, ...]) -> tuple[tuple[torch.Tensor, torch.Tensor], Callable[..., torch.Tensor]]:
    """TV and KL, and the gradient as a function of their cotangents."""
    from drpo_torch.vocabulary.divergences import FullDivergences, arguments_of_divergences  # noqa: PLC0415 -- each calls the other

    logits, behavior_logits, of_all, per_row, behavior_of_all, behavior_per_row, ids, offsets, bits, size, engine = arguments
    support = None if ids is None and bits is None else Support(ids, offsets, bits=bits)
    temperatures = of_all if per_row is None else per_row, behavior_of_all if behavior_per_row is None else behavior_per_row
    context, given = Context(), arguments_of_divergences(logits, behavior_logits, *temperatures, support, size, engine)
    found = FullDivergences.forward(context, *given)

    def pulled(*cotangents: torch.Tensor) -> torch.Tensor:
        gradient = FullDivergences.backward(context, *cotangents)[0]
        assert gradient is not None
        return gradient.reshape(logits.shape)

    return found, pulled


@torch.library.custom_op("drpo_torch::full_divergences", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def _full_divergences(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    return _called(arguments)[0]


@_full_divergences.register_fake
def _(logits: torch.Tensor, behavior_logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    like = logits.new_empty(logits.shape[:-1], dtype=working_dtype(logits.dtype, behavior_logits.dtype))
    return like, torch.empty_like(like)


@torch.library.custom_op(
    "drpo_torch::full_divergences_backward", mutates_args=(), schema=f"(Tensor of_tv, Tensor of_kl, {_ARGUMENTS}) -> Tensor"
)
def _full_divergences_backward(of_tv: torch.Tensor, of_kl: torch.Tensor, logits: torch.Tensor, *rest: Any) -> torch.Tensor:  # noqa: ANN401
    return _called((logits, *rest))[1](of_tv, of_kl)


@_full_divergences_backward.register_fake
def _(of_tv: torch.Tensor, of_kl: torch.Tensor, logits: torch.Tensor, *_: Any) -> torch.Tensor:  # noqa: ANN401, ARG001
    return torch.empty_like(logits)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:  # noqa: ANN401, ARG001
    ctx.save_for_backward(*(argument for argument in inputs if isinstance(argument, torch.Tensor)))
    ctx.given = [None if isinstance(argument, torch.Tensor) else (argument,) for argument in inputs]


def _pulled(ctx: Any, of_tv: torch.Tensor, of_kl: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
    saved = iter(ctx.saved_tensors)
    arguments = [next(saved) if kept is None else kept[0] for kept in ctx.given]
    return _full_divergences_backward(of_tv, of_kl, *arguments), *(None for _ in arguments[1:])


_full_divergences.register_autograd(_pulled, setup_context=_keep)
