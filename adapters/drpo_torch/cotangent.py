"""The last step of a backward pass whose gradient was formed in the forward pass."""

from __future__ import annotations

import torch

from drpo_torch.namespace import is_transformed

__all__ = ["refuse_second_derivative", "scaled", "scaled_by_cotangent"]

_ROWS_AT_ONCE = 1 << 18


def scaled_by_cotangent(gradient: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    """Gradient times a 0-d cotangent, without a second array of its size if this is its last use."""
    return scaled(gradient, cotangent, gradient.dtype)


def scaled(
    gradient: torch.Tensor, cotangent: torch.Tensor, dtype: torch.dtype, *, unit: torch.Tensor | None = None
) -> torch.Tensor:
    """Gradient times a 0-d cotangent, in a dtype; without a second array of its size if this is its last use.

    `unit` is what a number of each row of the gradient counts for, powers of two. The product is taken in float32 at least
    and rounded once: the same bits whether the gradient is retained or handed over.
    """
    if is_transformed(cotangent):
        factor = cotangent if unit is None else unit[:, None] * cotangent
        return (gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * factor).to(dtype)
    retained = torch._C._autograd._get_current_graph_task_keep_graph()  # noqa: SLF001 -- the only way to know
    out = torch.empty_like(gradient) if retained else gradient
    on_cpu = type(cotangent) is torch.Tensor and cotangent.device.type == "cpu"
    if unit is not None:
        factors = unit * cotangent
        # torch converts all of a 16-bit tensor first to multiply it with a wider one: not at once, on a CPU
        rows = max(1, _ROWS_AT_ONCE // max(1, gradient.shape[-1])) if on_cpu else max(1, len(gradient))
        for part, factor, into in zip(gradient.split(rows), factors.split(rows), out.split(rows), strict=True):
            torch.mul(part, factor[:, None], out=into)
        return out.to(dtype)
    # reading a number would wait for a device, but costs nothing on the CPU (a fake tensor has none)
    if not retained and on_cpu and cotangent.item() == 1.0:
        return gradient.to(dtype)
    # the number of a CPU tensor of no axes is not rounded to the other's dtype; elsewhere it would be
    factor = cotangent if on_cpu else cotangent.reshape((1,) * gradient.ndim)
    return torch.mul(gradient, factor, out=out).to(dtype)


def refuse_second_derivative() -> None:
    """Raise in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled():
        msg = "drpo_torch: the second derivative of a policy loss is not implemented (create_graph, hessian)"
        raise RuntimeError(msg)
