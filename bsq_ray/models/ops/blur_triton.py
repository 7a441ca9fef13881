"""The low-pass filter of `blur` as one kernel that reads the images once; libraries take twenty times as long.

Images lie as (B, H, W, C). A program calculates a few pixels of a row for a block of channels, in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Pixels and channels of a program.
_BLOCK_WIDTH, _BLOCK_CHANNELS = 16, 128


def blur(x_BCHW: Tensor, stride: int, pad: int) -> Tensor:
    """(B, C, H, W) to (B, C, (H + 2 pad - 4) / stride + 1, …)."""
    height, width = ((size + 2 * pad - 4) // stride + 1 for size in x_BCHW.shape[2:])
    return _launch_kernel(_blur_kernel, x_BCHW, height, width, stride, pad)


def blur_transpose(y_BCHW: Tensor, stride: int, pad: int) -> Tensor:
    """The way back with a stride of 2 and a pad of 1: (B, C, H, W) to (B, C, 2H, 2W)."""
    assert (stride, pad) == (2, 1)
    height, width = (stride * size for size in y_BCHW.shape[2:])
    return _launch_kernel(_blur_transpose_kernel, y_BCHW, height, width, stride, pad)


def _launch_kernel(
    kernel: triton.JITFunction, x_BCHW: Tensor, height: int, width: int, stride: int, pad: int
) -> Tensor:
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    batch, channels, *sizes = x_BCHW.shape
    y_BCHW = torch.empty(
        (batch, channels, height, width), dtype=x_BCHW.dtype, device=x_BCHW.device, memory_format=torch.channels_last
    )
    grid = batch * height, triton.cdiv(width, _BLOCK_WIDTH), triton.cdiv(channels, _BLOCK_CHANNELS)
    with torch.cuda.device(x_BCHW.device):
        kernel[grid](x_BCHW, y_BCHW, *sizes, height, width, channels, stride, pad, _BLOCK_WIDTH, _BLOCK_CHANNELS)
    return y_BCHW


@triton.jit
def _blur_kernel(
    x: tl.tensor, y: tl.tensor, in_height: tl.tensor, in_width: tl.tensor, height: tl.tensor, width: tl.tensor,
    channels: tl.tensor, STRIDE: tl.constexpr, PAD: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row // height * in_height * in_width * channels
    v = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[:, None]
    c = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    total = tl.zeros((BLOCK_WIDTH, BLOCK_CHANNELS), tl.float32)
    for i in tl.static_range(4):
        in_row = row % height * STRIDE + i - PAD
        for j in tl.static_range(4):
            in_v = v * STRIDE + j - PAD
            in_bounds = (in_row >= 0) & (in_row < in_height) & (in_v >= 0) & (in_v < in_width) & (c < channels)
            pixels = tl.load(x + (in_row * in_width + in_v) * channels + c, mask=in_bounds, other=0.0)
            total += pixels.to(tl.float32) * ((3 if i == 1 or i == 2 else 1) * (3 if j == 1 or j == 2 else 1) / 64)
    tl.store(y + (row * width + v) * channels + c, total.to(y.dtype.element_ty), mask=(v < width) & (c < channels))


@triton.jit
def _blur_transpose_kernel(
    y: tl.tensor, x: tl.tensor, in_height: tl.tensor, in_width: tl.tensor, height: tl.tensor, width: tl.tensor,
    channels: tl.tensor, STRIDE: tl.constexpr, PAD: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y += row // height * in_height * in_width * channels
    u = row % height + PAD
    v = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[:, None] + PAD
    c = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    total = tl.zeros((BLOCK_WIDTH, BLOCK_CHANNELS), tl.float32)
    # Of the four taps in each direction every second one falls on a pixel: 0 and 2, or 1 and 3.
    for i in tl.static_range(4 // STRIDE):
        tap_u = u % STRIDE + STRIDE * i
        in_row = (u - tap_u) // STRIDE
        for j in tl.static_range(4 // STRIDE):
            tap_v = v % STRIDE + STRIDE * j
            in_v = (v - tap_v) // STRIDE
            weight = tl.where((tap_u == 1) | (tap_u == 2), 3, 1) * tl.where((tap_v == 1) | (tap_v == 2), 3, 1) / 64
            in_bounds = (u >= tap_u) & (in_row < in_height) & (v >= tap_v) & (in_v < in_width) & (c < channels)
            pixels = tl.load(y + (in_row * in_width + in_v) * channels + c, mask=in_bounds, other=0.0)
            total += pixels.to(tl.float32) * weight
    v -= PAD
    tl.store(x + (row * width + v) * channels + c, total.to(x.dtype.element_ty), mask=(v < width) & (c < channels))
