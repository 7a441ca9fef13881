"""Discriminators: StyleGAN2's residual one and PatchGAN, written from their published descriptions.

    images ─fromrgb─▶ [ conv ─ blur ─ conv/2 ] + [ blur/2 ─ 1x1 ]  …until 4 x 4 ─▶ batch deviation ─ conv ─ fc ─▶ logit

One call may carry several batches (real and reconstructed): the convolutions run on all of them at once, while batch
statistics stay inside each. Shape suffixes: B images, C channels, H and W pixels, g members of a group, M groups.
"""

from __future__ import annotations

from itertools import pairwise
from math import gcd, log2, sqrt
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.models.ops.blur import blur
from bsq_ray.models.ops.conv_double_backward import convolution

_LEAKY_RELU_SLOPE = 0.2
_LEAKY_RELU_GAIN = sqrt(2)
_STDDEV_GROUP_SIZE = 4


def build_discriminator(adversarial_config: config.AdversarialConfig, image_size: int, frames: int = 1) -> nn.Module:
    """The discriminator of a configuration: of images, or with stylegan2-3d of clips of `frames` frames.

    Raises:
        ValueError: StyleGAN2's needs an image size that is a power of two.
    """
    if adversarial_config.discriminator == "patchgan":
        return PatchDiscriminator(adversarial_config.channel_max)
    if adversarial_config.discriminator == "stylegan2-3d":
        from bsq_ray.models.discriminators.stylegan2_3d import ClipDiscriminator

        return ClipDiscriminator(image_size, frames, adversarial_config.channel_base, adversarial_config.channel_max)
    return StyleDiscriminator(image_size, adversarial_config.channel_base, adversarial_config.channel_max)


class EqualizedConv(nn.Module):
    """A convolution whose N(0, 1) weights are scaled by 1/sqrt(fan in) at run time (Karras et al., 2018).

    Args:
        down: halve the size: [1, 3, 3, 1] low-pass filter, then stride 2.
        gain: factor on the output; with `activate` it multiplies the leaky ReLU's own gain of sqrt(2).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        downsample: bool = False,
        activate: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if activate else None
        self.downsample = downsample
        self.kernel_size = kernel_size
        self.scale = 1 / sqrt(in_channels * kernel_size**2)
        self.gain = gain

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Convolves; the size stays, or is halved."""
        # leaky_relu(g x) = g leaky_relu(x), so the gain rides on weight and bias, which are small, not on the images.
        gain = self.gain if self.bias is None else self.gain * _LEAKY_RELU_GAIN
        weight = self.weight * (self.scale * gain)
        bias = None if self.bias is None else self.bias * gain
        if not self.downsample:
            x_BCHW = convolution(x_BCHW, weight, bias, padding=self.kernel_size // 2)
        elif self.kernel_size == 1:
            x_BCHW = convolution(blur(x_BCHW, stride=2, pad=1), weight, bias)
        else:
            x_BCHW = convolution(blur(x_BCHW, stride=1, pad=2), weight, bias, stride=2)
        return x_BCHW if bias is None else F.leaky_relu(x_BCHW, _LEAKY_RELU_SLOPE, inplace=True)


class EqualizedLinear(nn.Module):
    """A linear layer with run-time weight scaling, optionally followed by the scaled leaky ReLU."""

    def __init__(self, in_features: int, out_features: int, activate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = 1 / sqrt(in_features)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) to (…, outputs)."""
        x = F.linear(x, self.weight * self.scale, self.bias)
        return F.leaky_relu(x, _LEAKY_RELU_SLOPE) * _LEAKY_RELU_GAIN if self.activate else x


class StyleBlock(nn.Module):
    """Residual block that halves the size; the sum keeps unit variance."""

    def __init__(self, in_channels: int, out_channels: int, from_rgb: bool) -> None:
        super().__init__()
        self.fromrgb = EqualizedConv(3, in_channels, 1) if from_rgb else None
        self.conv0 = EqualizedConv(in_channels, in_channels, 3)
        self.conv1 = EqualizedConv(in_channels, out_channels, 3, downsample=True, gain=sqrt(0.5))
        self.skip = EqualizedConv(in_channels, out_channels, 1, downsample=True, activate=False, gain=sqrt(0.5))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, inputs, H, W), or RGB in the first block, to (B, outputs, H/2, W/2)."""
        if self.fromrgb is not None:
            x_BCHW = self.fromrgb(x_BCHW)
        return cast(Tensor, self.skip(x_BCHW) + self.conv1(self.conv0(x_BCHW)))


class StyleEpilogue(nn.Module):
    """From 4 x 4 features and the deviation within the batch to one logit per image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = EqualizedConv(channels + 1, channels, 3)
        self.fc = EqualizedLinear(channels * 16, channels, activate=True)
        self.out = EqualizedLinear(channels, 1, activate=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C + 1, 4, 4) to (B, 1)."""
        return cast(Tensor, self.out(self.fc(self.conv(x_BCHW).flatten(1))))


class StyleDiscriminator(nn.Module):
    """StyleGAN2's residual discriminator (Karras et al., CVPR 2020).

    Args:
        image_size: side of the images, a power of two.
        channel_base, channel_max: channels at resolution r are channel_base / r, at most channel_max.
    """

    def __init__(self, image_size: int, channel_base: int, channel_max: int) -> None:
        super().__init__()
        channels = style_channels(image_size, channel_base, channel_max)
        sizes = list(channels)
        self.image_size = image_size
        self.block_names = [f"b{size}" for size in sizes[:-1]]
        for size in sizes[:-1]:
            block = StyleBlock(channels[size], channels[size // 2], from_rgb=size == image_size)
            self.add_module(f"b{size}", block)
        self.b4 = StyleEpilogue(channels[4])

    def forward(self, *batches_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, 1), fp32, of each batch of images in [-1, 1]."""
        batch_sizes = [len(batch) for batch in batches_BCHW]
        x_BCHW = torch.cat(batches_BCHW).contiguous(memory_format=torch.channels_last)
        for name in self.block_names:
            x_BCHW = self.get_submodule(name)(x_BCHW)
        with_stddev = [append_minibatch_stddev(part) for part in x_BCHW.split(batch_sizes)]
        return tuple(self.b4(torch.cat(with_stddev)).float().split(batch_sizes))


def style_channels(image_size: int, channel_base: int, channel_max: int) -> dict[int, int]:
    """Channels at each resolution, from the images down to 4 x 4.

    Raises:
        ValueError: the size cannot be halved down to 4.
    """
    if image_size < 8 or image_size & (image_size - 1):
        raise ValueError(
            f"the stylegan2 discriminators need image_size to be a power of two, at least 8, not {image_size}; "
            "or choose loss.adversarial.discriminator=patchgan"
        )
    sizes = [2**power for power in range(int(log2(image_size)), 1, -1)]
    return {size: max(1, min(channel_base // size, channel_max)) for size in sizes}


class PatchConv(nn.Conv2d):
    """PyTorch's layer by `bsq_ray.models.ops.conv_double_backward`."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, …)."""
        return convolution(x_BCHW, self.weight, self.bias, self.stride[0], int(self.padding[0]))


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., CVPR 2017): a logit for each patch. Group norm, so images do not see each other.

    Args:
        channel_max: channels double from 64 to 512, but stay at or below this.
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
        """Logits (B, 1, h, w), fp32, of each batch of images in [-1, 1]."""
        batch_sizes = [len(batch) for batch in batches_BCHW]
        x_BCHW = torch.cat(batches_BCHW).contiguous(memory_format=torch.channels_last)
        return tuple(self.layers(x_BCHW).float().split(batch_sizes))


def append_minibatch_stddev(x: Tensor) -> Tensor:
    """Appends a channel with the mean deviation within groups of images i, i + M, i + 2M, … (Karras et al., 2018).

    Workers hold every N-th image of a batch, so such groups are the same for any number of workers.

    Args:
        x: (B, C, …), images or clips.
    """
    batch, channels, *sizes = x.shape
    group_size = max(size for size in range(1, _STDDEV_GROUP_SIZE + 1) if batch % size == 0)
    grouped_gMC = x.float().reshape(group_size, -1, channels, *sizes)
    stddev_MC = (grouped_gMC.var(0, unbiased=False) + 1e-8).sqrt()
    stddev_B = stddev_MC.flatten(1).mean(1).repeat(group_size)
    stddev_B1 = stddev_B.view(-1, 1, *(1 for _ in sizes)).expand(-1, 1, *sizes)
    return torch.cat([x, stddev_B1.to(x.dtype)], 1)
