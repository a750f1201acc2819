"""What autograd does with a gradient that was formed in the forward pass."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["has_memory", "is_transformed", "refuse_second_derivative", "scaled", "with_gradient"]

_ELEMENTS_AT_ONCE = 1 << 18


def with_gradient(log_prob: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The loss as a differentiable function of `log_prob`, with this gradient; the gradient is all that is kept.

    A loss of the shape of `log_prob` has its gradient element by element, a 0-d one has the gradient in all of them.
    """
    if torch.compiler.is_compiling() or not has_memory(log_prob, loss, gradient):
        differentiable, _ = _Transformable.apply(log_prob, loss, gradient)  # type: ignore[no-untyped-call]
    else:
        differentiable, _ = _InMemory.apply(log_prob, loss, gradient)  # type: ignore[no-untyped-call]
    return differentiable  # type: ignore[no-any-return]


def scaled(
    gradient: torch.Tensor, cotangent: torch.Tensor, dtype: torch.dtype, *, unit: torch.Tensor | None = None
) -> torch.Tensor:
    """Gradient times a 0-d cotangent, in `dtype`; without a second array of its size if this is the gradient's last use.

    The cotangent is never rounded to 16 bits, where a loss scaler's factor of 65,536 is infinite. The result is the same,
    bit for bit, whether or not the graph is kept. `unit` is what 1 in each row of a matrix stands for, in float32.
    """
    in_place = _is_last_use() and has_memory(gradient, cotangent)
    if unit is not None and has_memory(gradient, cotangent):
        return _scaled_by_row(gradient, unit * cotangent, torch.empty_like(gradient) if not in_place else gradient).to(dtype)
    if unit is not None:
        return (gradient.to(unit.dtype) * unit[:, None] * cotangent).to(dtype)
    # a CPU's 0-d tensor is not rounded to the dtype of what it is multiplied with; another device's would be
    factor = cotangent if cotangent.device.type == "cpu" else cotangent.reshape((1,) * gradient.ndim)
    if not in_place:
        return (gradient * factor).to(dtype)
    # reading a number makes a device wait, but costs nothing on the CPU
    if cotangent.device.type == "cpu" and cotangent.item() == 1.0:
        return gradient.to(dtype)
    return gradient.mul_(factor).to(dtype)


def refuse_second_derivative() -> None:
    """Raise in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(_SECOND_DERIVATIVE)


def is_transformed(tensor: torch.Tensor) -> bool:
    """True if a transform of torch.func, or torch.autograd.grad(is_grads_batched=True), looks through the tensor."""
    # there is no public test for either
    functorch = torch._C._functorch  # noqa: SLF001
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def has_memory(*tensors: torch.Tensor | None) -> bool:
    """Whether these are plain tensors: those of torch.func, make_fx and fake tensors have no memory of their own."""
    plain = (torch.Tensor, torch.nn.Parameter)
    return all(t is None or (type(t) in plain and not is_transformed(t)) for t in tensors)


def _scaled_by_row(gradient: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    # to multiply a 16-bit tensor with a wider one, a CPU first converts all that it is given
    rows = max(1, _ELEMENTS_AT_ONCE // max(1, gradient.shape[-1])) if gradient.device.type == "cpu" else max(1, len(gradient))
    for start in range(0, len(gradient), rows):
        part = slice(start, start + rows)
        torch.mul(gradient[part], factors[part, None], out=out[part])
    return out


_SECOND_DERIVATIVE = "drpo_torch: the second derivative of a policy loss is not implemented (create_graph, hessian)"


class _Transformable(torch.autograd.Function):
    """For `torch.compile` and `torch.func`: backward multiplies the gradient by the cotangent.

    The gradient is an output so that asking for its derivative arrives in `backward` instead of being lost.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(log_prob: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG004
        return loss.clone(), gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:  # noqa: ANN401
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:  # noqa: ANN401
        of_loss, of_gradient = cotangents
        # (Dynamo passes zeros for it, and AOTAutograd refuses double backward itself)
        if of_gradient is not None and not torch.compiler.is_compiling():
            raise RuntimeError(_SECOND_DERIVATIVE)
        (gradient,) = ctx.saved_tensors
        return None if of_loss is None else (of_loss * gradient).to(ctx.dtype), None, None


class _InMemory(torch.autograd.Function):
    """For plain tensors: with no second array in backward."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        log_prob: torch.Tensor,
        loss: torch.Tensor,
        gradient: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # what is kept is an output, so that asking for its derivative arrives in `backward`
        gradient = gradient.view_as(gradient)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient)
        ctx.dtype, ctx.total = log_prob.dtype, loss.ndim == 0
        # a tensor of its own, which may be changed in place
        return loss.clone(), gradient

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:  # noqa: ANN401
        of_loss, of_gradient = cotangents
        if of_gradient is not None:
            raise RuntimeError(_SECOND_DERIVATIVE)
        if of_loss is None:
            return None, None, None
        (gradient,) = ctx.saved_tensors
        if torch.is_grad_enabled() or not ctx.total:
            # with a graph of this backward pass, the derivative of the gradient leads back here
            return (of_loss * gradient).to(ctx.dtype), None, None
        return scaled(gradient.detach(), of_loss, ctx.dtype), None, None


def _is_last_use() -> bool:
    """Whether the backward pass that runs frees what it was given."""
    # there is no public test
    return not torch._C._autograd._get_current_graph_task_keep_graph()  # noqa: SLF001
