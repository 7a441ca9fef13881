"""PatchGAN (Isola et al., CVPR 2017), written from its published description.

    images ─▶ [ conv 4x4, stride 2 ─ norm ─ leaky ReLU ] x 3 ─▶ conv 4x4 ─ norm ─ leaky ReLU ─▶ conv 4x4 ─▶ logit map

Shape suffixes: B images, C channels, H and W pixels, h and w rows and columns of the logit map.
"""

from __future__ import annotations

from itertools import pairwise
from math import gcd

import torch
from torch import Tensor, nn

from bsq_ray.models.ops.conv_double_backward import convolution

_LEAKY_RELU_SLOPE = 0.2


class PatchConv(nn.Conv2d):
    """`nn.Conv2d` computed by `bsq_ray.models.ops.conv_double_backward`."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Convolve (B, C_in, H, W) to (B, C_out, H', W')."""
        return convolution(x_BCHW, self.weight, self.bias, self.stride[0], int(self.padding[0]))


class PatchDiscriminator(nn.Module):
    """One logit for each patch of an image. Group norm keeps the images of a batch independent.

    Args:
        channel_max: upper bound of the channels, which double from 64 to 512.
    """

    def __init__(self, channel_max: int) -> None:
        super().__init__()
        widths = [min(width, channel_max) for width in (64, 128, 256, 512)]
        layers: list[nn.Module] = [PatchConv(3, widths[0], 4, 2, 1), nn.LeakyReLU(_LEAKY_RELU_SLOPE)]
        for index, (in_channels, out_channels) in enumerate(pairwise(widths)):
            stride = 2 if index < 2 else 1
            layers += [
                PatchConv(in_channels, out_channels, 4, stride, 1, bias=False),
                nn.GroupNorm(gcd(out_channels, 32), out_channels),
                nn.LeakyReLU(_LEAKY_RELU_SLOPE),
            ]
        layers.append(PatchConv(widths[-1], 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, *batches_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Return fp32 logits (B, 1, h, w) for each batch of images (B, 3, H, W) in [-1, 1]."""
        batch_sizes = [len(batch) for batch in batches_BCHW]
        x_BCHW = torch.cat(batches_BCHW).contiguous(memory_format=torch.channels_last)
        return tuple(self.layers(x_BCHW).float().split(batch_sizes))
