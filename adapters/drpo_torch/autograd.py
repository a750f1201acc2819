"""What autograd does with a gradient that was formed in the forward pass."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["has_memory", "refuse_second_derivative", "scaled", "with_gradient"]


def with_gradient(log_prob: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The loss as a differentiable function of `log_prob`, with this gradient; the gradient is all that is kept.

    A loss of the shape of `log_prob` has its gradient element by element, a 0-d one has the gradient in all of them.
    """
    if torch.compiler.is_compiling() or not has_memory(log_prob, loss, gradient):
        differentiable, _ = _Transformable.apply(log_prob, loss, gradient)  # type: ignore[no-untyped-call]
    else:
        differentiable, _ = _InMemory.apply(log_prob, loss, gradient)  # type: ignore[no-untyped-call]
    return differentiable  # type: ignore[no-any-return]


def scaled(gradient: torch.Tensor, cotangent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Gradient times a 0-d cotangent, in `dtype`; without a second array of its size if this is the gradient's last use.

    The cotangent is never rounded to 16 bits, where a loss scaler's factor of 65,536 is infinite. The result is the same,
    bit for bit, whether or not the graph is kept.
    """
    if not _is_last_use() or not has_memory(gradient, cotangent):
        return (gradient * cotangent).to(dtype)
    # reading a number makes a device wait, but costs nothing on the CPU
    if cotangent.device.type == "cpu" and cotangent.item() == 1.0:
        return gradient.to(dtype)
    return gradient.mul_(cotangent).to(dtype)


def refuse_second_derivative() -> None:
    """Raise in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(_SECOND_DERIVATIVE)


def has_memory(*tensors: torch.Tensor | None) -> bool:
    """Whether these are plain tensors: those of torch.func, make_fx and fake tensors have no memory of their own."""
    # there is no public test for the transforms of torch.func, nor for that of torch.autograd.grad(is_grads_batched=True)
    functorch = torch._C._functorch  # noqa: SLF001
    wrapped, batched = functorch.is_functorch_wrapped_tensor, functorch.is_legacy_batchedtensor
    plain = (torch.Tensor, torch.nn.Parameter)
    return all(t is None or (type(t) in plain and not wrapped(t) and not batched(t)) for t in tensors)


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
