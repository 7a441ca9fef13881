"""Clip discriminator: StyleGAN2's residual discriminator with convolutions over space and time.

    clips ─fromrgb─▶ [ conv ─ pool ─ conv ] + [ pool ─ 1x1x1 ] … to 4 x 4 ─▶ minibatch stddev ─ conv ─ fc ─▶ logit

Every block halves height and width. The last blocks also halve the number of frames, until it is odd. Downsampling is
average pooling, because StyleGAN2's longer filter is expensive in three dimensions.

Shape suffixes: B clips, C channels, T frames, H and W pixels.
"""

from __future__ import annotations

from itertools import pairwise
from math import sqrt
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray.models.discriminators.stylegan2 import (
    LEAKY_RELU_GAIN,
    LEAKY_RELU_SLOPE,
    EqualizedLinear,
    append_minibatch_stddev,
    style_channels,
)
from bsq_ray.models.ops.conv_double_backward import convolution


class EqualizedConv3d(nn.Module):
    """3-D convolution with equalized learning rate: N(0, 1) weights, scaled by 1/sqrt(fan_in) in the forward pass."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, activate: bool = True, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if activate else None
        self.kernel_size = kernel_size
        self.scale = gain / sqrt(in_channels * kernel_size**3)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Convolve (B, C_in, T, H, W) to (B, C_out, T, H, W); `activate` adds a leaky ReLU with gain sqrt(2)."""
        if self.bias is None:
            return convolution(x_BCTHW, self.weight * self.scale, padding=self.kernel_size // 2)
        x_BCTHW = convolution(
            x_BCTHW,
            self.weight * (self.scale * LEAKY_RELU_GAIN),
            self.bias * LEAKY_RELU_GAIN,
            padding=self.kernel_size // 2,
        )
        return F.leaky_relu(x_BCTHW, LEAKY_RELU_SLOPE, inplace=True)


class ClipBlock(nn.Module):
    """Residual block that halves height and width, and the number of frames if `downsample_time`."""

    def __init__(self, in_channels: int, out_channels: int, downsample_time: bool) -> None:
        super().__init__()
        self.conv0 = EqualizedConv3d(in_channels, in_channels, 3)
        self.conv1 = EqualizedConv3d(in_channels, out_channels, 3, gain=sqrt(0.5))
        self.skip = EqualizedConv3d(in_channels, out_channels, 1, activate=False, gain=sqrt(0.5))
        self.pool_size = (2 if downsample_time else 1, 2, 2)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Map (B, C_in, T, H, W) to (B, C_out, T or T/2, H/2, W/2)."""
        branch_BCTHW = self.conv1(F.avg_pool3d(self.conv0(x_BCTHW), self.pool_size))
        return cast(Tensor, self.skip(F.avg_pool3d(x_BCTHW, self.pool_size)) + branch_BCTHW)


class ClipDiscriminator(nn.Module):
    """StyleGAN2 discriminator for clips, with one logit per clip.

    Args:
        image_size: side of the frames in pixels, a power of two.
        frames: number of frames of every clip.
        channel_base, channel_max: the number of channels at resolution r is channel_base / r, at most channel_max.
        max_group_size: see `append_minibatch_stddev`.
    """

    def __init__(
        self, image_size: int, frames: int, channel_base: int, channel_max: int, max_group_size: int = 4
    ) -> None:
        super().__init__()
        channels = style_channels(image_size, channel_base, channel_max)
        widths = list(channels.values())
        self.frames = frames
        self.max_group_size = max_group_size
        self.fromrgb = EqualizedConv3d(3, widths[0], 1)
        self.blocks = nn.ModuleList()
        downsample_flags = temporal_downsampling(frames, len(widths) - 1)
        for (in_channels, out_channels), downsample_time in zip(pairwise(widths), downsample_flags, strict=True):
            self.blocks.append(ClipBlock(in_channels, out_channels, downsample_time))
            frames = frames // 2 if downsample_time else frames
        self.conv = EqualizedConv3d(widths[-1] + 1, widths[-1], 3)
        self.fc = EqualizedLinear(widths[-1] * frames * 16, widths[-1], activate=True)
        self.out = EqualizedLinear(widths[-1], 1, activate=False)

    def forward(self, *batches_BCTHW: Tensor) -> tuple[Tensor, ...]:
        """Return fp32 logits (B, 1) for each batch of clips (B, 3, T, H, W) in [-1, 1].

        Raises:
            ValueError: the number of frames differs from `frames`.
        """
        batch_sizes = [len(batch) for batch in batches_BCTHW]
        x_BCTHW = torch.cat(batches_BCTHW)
        if x_BCTHW.shape[2] != self.frames:
            raise ValueError(
                f"clips have {x_BCTHW.shape[2]} frames, but this stylegan2-3d discriminator expects {self.frames}"
            )
        x_BCTHW = self.fromrgb(x_BCTHW.contiguous(memory_format=torch.channels_last_3d))
        for block in self.blocks:
            x_BCTHW = block(x_BCTHW)
        parts = x_BCTHW.split(batch_sizes)
        x_BCTHW = torch.cat([append_minibatch_stddev(part, self.max_group_size) for part in parts])
        logits_B1 = self.out(self.fc(self.conv(x_BCTHW).flatten(1)))
        return tuple(logits_B1.float().split(batch_sizes))


def temporal_downsampling(frames: int, num_blocks: int) -> list[bool]:
    """Return for each block whether it halves the frames: the last blocks do, until the number is odd."""
    num_halvings = 0
    while num_halvings < num_blocks and frames % 2 ** (num_halvings + 1) == 0:
        num_halvings += 1
    return [index >= num_blocks - num_halvings for index in range(num_blocks)]
