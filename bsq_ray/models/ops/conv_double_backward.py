"""Convolutions with fast derivatives of any order, for the R1 penalty.

    convolution      x, w ─▶ y          <g, convolution(x, w)> is linear in x, w and g,
    input gradient   g, w ─▶ like x     so the derivatives of each of the three functions
    weight gradient  x, g ─▶ like w     are the other two.

PyTorch's double backward computes the weight gradient as a convolution with a kernel as large as the image. GPU
libraries are slow at this, and it would dominate the time of a step with the R1 penalty.

Shapes: x (B, I, …), w (O, I, k, …), y and g (B, O, …), with two or three trailing dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bsq_ray.runtime._torch_internals import needs_input_grad_now

_Grad = Tensor | None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
    """Convolve images (B, I, H, W) or clips (B, I, T, H, W) to (B, O, …), in the autocast dtype if enabled."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    y: Tensor = _Convolution.apply(x, weight, bias, stride, padding)
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.stride, ctx.padding = stride, padding
        return _conv(x, w, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[_Grad, _Grad, _Grad, None, None]:
        (g,), (x, w) = gradients, ctx.saved_tensors
        # The list has no entry for the bias if it is None, so append False.
        needs_x, needs_w, needs_bias = (*needs_input_grad_now(ctx), False)[:3]
        return (
            _ConvInputGrad.apply(g, w, x.shape, ctx.stride, ctx.padding) if needs_x else None,
            _ConvWeightGrad.apply(x, g, w.shape, ctx.stride, ctx.padding) if needs_w else None,
            g.sum([n for n in range(g.dim()) if n != 1]) if needs_bias else None,
            None,
            None,
        )


class _ConvInputGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, shape: torch.Size, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.stride, ctx.padding = stride, padding
        output_padding = [
            size - ((grad_size - 1) * stride - 2 * padding + kernel)
            for size, grad_size, kernel in zip(shape[2:], g.shape[2:], w.shape[2:], strict=True)
        ]
        return _conv(g, w, None, stride, padding, output_padding=output_padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[_Grad, _Grad, None, None, None]:
        (x,), (g, w) = gradients, ctx.saved_tensors
        needs_g, needs_w = needs_input_grad_now(ctx)
        return (
            _Convolution.apply(x, w, None, ctx.stride, ctx.padding) if needs_g else None,
            _ConvWeightGrad.apply(x, g, w.shape, ctx.stride, ctx.padding) if needs_w else None,
            None,
            None,
            None,
        )


class _ConvWeightGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, shape: torch.Size, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, g)
        ctx.stride, ctx.padding = stride, padding
        num_spatial_dims = x.dim() - 2
        # The weight argument is used only for its shape.
        weight_grad: Tensor = torch.ops.aten.convolution_backward(
            g, x, x.new_empty(shape), None, [stride] * num_spatial_dims, [padding] * num_spatial_dims,
            [1] * num_spatial_dims, False, [0] * num_spatial_dims, 1, [False, True, False],
        )[1]  # fmt: skip
        return weight_grad

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[_Grad, _Grad, None, None, None]:
        (w,), (x, g) = gradients, ctx.saved_tensors
        needs_x, needs_g = needs_input_grad_now(ctx)
        return (
            _ConvInputGrad.apply(g, w, x.shape, ctx.stride, ctx.padding) if needs_x else None,
            _Convolution.apply(x, w, None, ctx.stride, ctx.padding) if needs_g else None,
            None,
            None,
            None,
        )


def _conv(
    x: Tensor, w: Tensor, bias: Tensor | None, stride: int, padding: int, output_padding: list[int] | None = None
) -> Tensor:
    """Compute a convolution, or a transposed convolution if `output_padding` is given, with autocast disabled."""
    num_spatial_dims = x.dim() - 2
    with torch.autocast(x.device.type, enabled=False):
        return torch.convolution(
            x, w, bias, [stride] * num_spatial_dims, [padding] * num_spatial_dims, [1] * num_spatial_dims,
            output_padding is not None, output_padding or [0] * num_spatial_dims, 1,
        )  # fmt: skip
