"""Number formats of the trainer and of the inference engine; formats without CPU kernels are emulated.

A linear layer in FP8 or int8 rounds both operands to the format: weights with a scale for each output channel, activations
with a scale for each token. It sums exact products in float32 and rounds the output to bfloat16, as serving engines do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

FP8, FP8_GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
VALUES = {dtype: torch.arange(256, dtype=torch.uint8).view(dtype).float() for dtype in (FP8, FP8_GRADIENT)}
"""The value of each of a format's 256 codes. A look-up is seven times as fast as the conversion of torch's CPU kernel."""
LARGEST_INT8 = 127.0


def round_to_fp8(x: torch.Tensor, dtype: torch.dtype = FP8) -> torch.Tensor:
    """Round to the nearest values of an FP8 format, with each row's largest value scaled to the format's largest."""
    scale = _scale(x, torch.finfo(dtype).max)
    codes = (x.float() / scale).to(dtype).view(torch.uint8).int()
    return VALUES[dtype].index_select(0, codes.flatten()).view(x.shape) * scale


def round_to_int8(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest of 255 equidistant values, symmetric around 0, with a scale for each row."""
    scale = _scale(x, LARGEST_INT8)
    return (x.float() / scale).round() * scale


def _scale(x: torch.Tensor, largest: float) -> torch.Tensor:
    return x.detach().float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest


class _StraightThrough(torch.autograd.Function):
    """FP8 end to end: operands are rounded in the forward pass, the output's gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - torch's context
        x, weight = round_to_fp8(x), round_to_fp8(weight)
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        gradient = round_to_fp8(gradient, FP8_GRADIENT)
        return (gradient @ weight).sum_to_size(x.shape), (gradient.mT @ x).sum_to_size(weight.shape)


class Float32:
    """The trainer of the BF16 and FP8-rollout settings: float32 throughout."""

    dtype = torch.float32

    def prepare(self, name: str, parameter: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - the others look at it
        """The parameter in the format of the forward pass."""
        return parameter

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product x Wᵀ of x (tokens, in) and W (out, in), or with each of several W (experts, out, in)."""
        return x @ weight.mT


class TrainFP8(Float32):
    """The trainer of FP8 end to end: float32 master weights, FP8 linear layers forward (e4m3) and backward (e5m2)."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product x Wᵀ of rounded operands."""
        return _StraightThrough.apply(x, weight)  # type: ignore[no-any-return,no-untyped-call]


class BFloat16(Float32):
    """An engine in bfloat16: weights, activations and logits."""

    dtype = torch.bfloat16

    def prepare(self, name: str, parameter: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """The parameter in bfloat16."""
        return parameter.detach().bfloat16()


class _Quantised(BFloat16, ABC):
    def prepare(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter, rounded if it is a layer's matrix; embedding, norms and head stay in bfloat16."""
        return self.round(parameter.detach()) if is_linear(name) else super().prepare(name, parameter)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product x Wᵀ of rounded operands, summed in float32, rounded to bfloat16."""
        return (self.round(x) @ weight.mT).bfloat16()

    @abstractmethod
    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Round to the values of the format."""


class EngineFP8(_Quantised):
    """An engine with FP8 (e4m3) linear layers."""

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Round to FP8."""
        return round_to_fp8(x)


class EngineInt8(_Quantised):
    """An engine with int8 linear layers."""

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Round to int8."""
        return round_to_int8(x)


TRAINERS = {"float32": Float32(), "fp8": TrainFP8()}
ENGINES = {"float32": Float32(), "bfloat16": BFloat16(), "fp8": EngineFP8(), "int8": EngineInt8()}


def is_linear(name: str) -> bool:
    """True for the matrices of a layer, which FP8 and int8 round. Routers are excluded, as is usual."""
    return name.rpartition(".")[2] in {"qkv", "out", "up", "down"}
