"""StyleGAN2's low-pass filter, [1, 3, 3, 1] x [1, 3, 3, 1] / 64 on every channel, with derivatives of any order.

    x ─blur─▶ y          of the gradient penalty: blur, spread, and blur again
    x ◀─spread─ y        (the filter is linear: each is the other's gradient)

PyTorch's second derivative of a convolution in groups also makes the gradient of the filter, channel by channel, which
nobody asks for; it would be most of a step with the R1 penalty. On a GPU a kernel of our own filters (blur_gpu.py).
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_log = logging.getLogger(__name__)
_TAPS = (1 / 8, 3 / 8, 3 / 8, 1 / 8)
_Grad = tuple[Tensor, None, None]


def blur(x_BCHW: Tensor, stride: int, pad: int) -> Tensor:
    """Filters every channel: (B, C, H, W) to (B, C, (H + 2 pad - 4) / stride + 1, …); under autocast in its precision.

    Args:
        stride, pad: 1, 2: one row and column more; 2, 1: half the size.
    """
    if torch.is_autocast_enabled(x_BCHW.device.type):
        x_BCHW = x_BCHW.to(torch.get_autocast_dtype(x_BCHW.device.type))
    blurred: Tensor = _Blur.apply(x_BCHW, stride, pad)
    return blurred


class _Blur(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, stride: int, pad: int) -> Tensor:
        ctx.stride, ctx.pad = stride, pad
        return _apply_filter(x_BCHW, stride, pad)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> _Grad:
        return _BlurTranspose.apply(gradients[0], ctx.stride, ctx.pad), None, None


class _BlurTranspose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_BCHW: Tensor, stride: int, pad: int) -> Tensor:
        ctx.stride, ctx.pad = stride, pad
        if stride == 1:
            # The filter is symmetric, so this is the transposed convolution.
            return _apply_filter(y_BCHW, 1, 3 - pad)
        return _blur_transpose(y_BCHW, stride, pad)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> _Grad:
        return _Blur.apply(gradients[0], ctx.stride, ctx.pad), None, None


def _apply_filter(x_BCHW: Tensor, stride: int, pad: int) -> Tensor:
    if kernels := _kernels_for(x_BCHW):
        return kernels.filtered(x_BCHW, stride, pad)
    with torch.autocast(x_BCHW.device.type, enabled=False):
        return F.conv2d(x_BCHW, _taps(x_BCHW, x_BCHW.dtype), stride=stride, padding=pad, groups=x_BCHW.shape[1])


def _blur_transpose(y_BCHW: Tensor, stride: int, pad: int) -> Tensor:
    if kernels := _kernels_for(y_BCHW):
        return kernels.spread(y_BCHW, stride, pad)
    # On CPUs at least in fp32: they take several times as long for the same in bf16.
    dtype = y_BCHW.dtype if y_BCHW.is_cuda else torch.promote_types(y_BCHW.dtype, torch.float32)
    with torch.autocast(y_BCHW.device.type, enabled=False):
        x_BCHW = F.conv_transpose2d(
            y_BCHW.to(dtype), _taps(y_BCHW, dtype), stride=stride, padding=pad, groups=y_BCHW.shape[1]
        )
    return x_BCHW.to(y_BCHW.dtype)


def _kernels_for(x_BCHW: Tensor) -> ModuleType | None:
    return _load_kernels(x_BCHW.device) if x_BCHW.is_cuda and x_BCHW.dtype != torch.float64 else None


@cache
def _load_kernels(device: torch.device) -> ModuleType | None:
    """Our own for a GPU; None where Triton is not installed or cannot build them."""
    try:
        from bsq_ray.models.ops import blur_triton

        blur_triton.blur(torch.zeros(1, 1, 4, 4, device=device), 1, 2)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _log.warning("the discriminator's filter will take several times as long: no kernel for %s (%s)", device, error)
        return None
    return blur_triton


def _taps(like_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    return _filter(dtype, like_BCHW.device).expand(like_BCHW.shape[1], 1, -1, -1)


@cache
def _filter(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: a copy from the host would have a GPU's queue run empty."""
    with torch.inference_mode(False):
        taps = torch.tensor(_TAPS, dtype=dtype, device=device)
        return torch.outer(taps, taps)
