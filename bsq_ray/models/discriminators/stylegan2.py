"""StyleGAN2's residual discriminator (Karras et al., CVPR 2020), implemented from the paper.

    images ─fromrgb─▶ [ conv ─ blur ─ conv/2 ] + [ blur/2 ─ 1x1 ]  …until 4 x 4 ─▶ minibatch stddev ─ conv ─ fc ─▶ logit

Shape suffixes: B images, C channels, H and W pixels, g images of a group, M groups.
"""

from __future__ import annotations

from math import log2, sqrt
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray.config.batch_split import stddev_group_size
from bsq_ray.models.ops.blur import blur
from bsq_ray.models.ops.conv_double_backward import convolution

LEAKY_RELU_SLOPE = 0.2
LEAKY_RELU_GAIN = sqrt(2)


class EqualizedConv(nn.Module):
    """Convolution with equalized learning rate (Karras et al., 2018).

    The weights are initialized with N(0, 1) and scaled by 1/sqrt(fan-in) in every forward pass.

    Args:
        downsample: halve height and width with a [1, 3, 3, 1] low-pass filter and stride 2.
        activate: add a bias and apply a leaky ReLU with a gain of sqrt(2).
        gain: additional factor on the output.
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
        """Map (B, C_in, H, W) to (B, C_out, H, W), or to (B, C_out, H/2, W/2) with `downsample`."""
        # leaky_relu(g x) = g leaky_relu(x), so the gain is applied to the small weight and bias, not to the images.
        gain = self.gain if self.bias is None else self.gain * LEAKY_RELU_GAIN
        weight = self.weight * (self.scale * gain)
        bias = None if self.bias is None else self.bias * gain
        if not self.downsample:
            x_BCHW = convolution(x_BCHW, weight, bias, padding=self.kernel_size // 2)
        elif self.kernel_size == 1:
            x_BCHW = convolution(blur(x_BCHW, stride=2, pad=1), weight, bias)
        else:
            x_BCHW = convolution(blur(x_BCHW, stride=1, pad=2), weight, bias, stride=2)
        return x_BCHW if bias is None else F.leaky_relu(x_BCHW, LEAKY_RELU_SLOPE, inplace=True)


class EqualizedLinear(nn.Module):
    """Linear layer with equalized learning rate, optionally followed by a leaky ReLU with a gain of sqrt(2)."""

    def __init__(self, in_features: int, out_features: int, activate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = 1 / sqrt(in_features)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features)."""
        x = F.linear(x, self.weight * self.scale, self.bias)
        return F.leaky_relu(x, LEAKY_RELU_SLOPE) * LEAKY_RELU_GAIN if self.activate else x


class StyleGAN2Block(nn.Module):
    """Residual block that halves height and width; a gain of sqrt(0.5) per branch preserves the variance."""

    def __init__(self, in_channels: int, out_channels: int, from_rgb: bool) -> None:
        super().__init__()
        self.fromrgb = EqualizedConv(3, in_channels, 1) if from_rgb else None
        self.conv0 = EqualizedConv(in_channels, in_channels, 3)
        self.conv1 = EqualizedConv(in_channels, out_channels, 3, downsample=True, gain=sqrt(0.5))
        self.skip = EqualizedConv(in_channels, out_channels, 1, downsample=True, activate=False, gain=sqrt(0.5))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C_in, H, W), or (B, 3, H, W) in the first block, to (B, C_out, H/2, W/2)."""
        if self.fromrgb is not None:
            x_BCHW = self.fromrgb(x_BCHW)
        return cast(Tensor, self.skip(x_BCHW) + self.conv1(self.conv0(x_BCHW)))


class StyleGAN2Epilogue(nn.Module):
    """Maps 4 x 4 features and their minibatch standard deviation to one logit per image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = EqualizedConv(channels + 1, channels, 3)
        self.fc = EqualizedLinear(channels * 16, channels, activate=True)
        self.out = EqualizedLinear(channels, 1, activate=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C + 1, 4, 4) to logits (B, 1)."""
        return cast(Tensor, self.out(self.fc(self.conv(x_BCHW).flatten(1))))


class StyleDiscriminator(nn.Module):
    """StyleGAN2's residual discriminator: one logit per image.

    Args:
        image_size: side of the images in pixels, a power of two.
        channel_base, channel_max: the number of channels at resolution r is min(channel_base / r, channel_max).
        max_group_size: see `append_minibatch_stddev`.
    """

    def __init__(self, image_size: int, channel_base: int, channel_max: int, max_group_size: int = 4) -> None:
        super().__init__()
        channels = style_channels(image_size, channel_base, channel_max)
        sizes = list(channels)
        self.image_size = image_size
        self.max_group_size = max_group_size
        self.block_names = [f"b{size}" for size in sizes[:-1]]
        for size in sizes[:-1]:
            block = StyleGAN2Block(channels[size], channels[size // 2], from_rgb=size == image_size)
            self.add_module(f"b{size}", block)
        self.b4 = StyleGAN2Epilogue(channels[4])

    def forward(self, *batches_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Return fp32 logits (B, 1) for each batch of images (B, 3, H, W) in [-1, 1]."""
        batch_sizes = [len(batch) for batch in batches_BCHW]
        x_BCHW = torch.cat(batches_BCHW).contiguous(memory_format=torch.channels_last)
        for name in self.block_names:
            x_BCHW = self.get_submodule(name)(x_BCHW)
        features_with_stddev = [
            append_minibatch_stddev(features, self.max_group_size) for features in x_BCHW.split(batch_sizes)
        ]
        return tuple(self.b4(torch.cat(features_with_stddev)).float().split(batch_sizes))


def style_channels(image_size: int, channel_base: int, channel_max: int) -> dict[int, int]:
    """Return the number of channels at each resolution, from the image size down to 4.

    Raises:
        ValueError: the image size is not a power of two of at least 8.
    """
    if image_size < 8 or image_size & (image_size - 1):
        raise ValueError(
            f"image_size {image_size} must be a power of two, at least 8, for the stylegan2 discriminators; "
            "choose another size, or loss.adversarial.discriminator=patchgan"
        )
    sizes = [2**power for power in range(int(log2(image_size)), 1, -1)]
    return {size: max(1, min(channel_base // size, channel_max)) for size in sizes}


def append_minibatch_stddev(x: Tensor, max_group_size: int = 4) -> Tensor:
    """Append a channel with the minibatch standard deviation, averaged over channels and pixels (Karras et al., 2018).

    Group i contains the images i, i + M, i + 2M, …. Each of R ranks has every R-th image of the batch, so the groups
    are the same for any number of ranks, as long as B / R has the same group size; `split_batch` checks that.

    Args:
        x: images (B, C, H, W) or clips (B, C, T, H, W).
        max_group_size: the group size is the largest divisor of B up to this.

    Returns:
        (B, C + 1, …)
    """
    batch_size, channels, *sizes = x.shape
    group_size = stddev_group_size(batch_size, max_group_size)
    grouped_gMC = x.float().reshape(group_size, -1, channels, *sizes)
    stddev_MC = (grouped_gMC.var(0, unbiased=False) + 1e-8).sqrt()
    stddev_B = stddev_MC.flatten(1).mean(1).repeat(group_size)
    stddev_B1 = stddev_B.view(-1, 1, *(1 for _ in sizes)).expand(-1, 1, *sizes)
    return torch.cat([x, stddev_B1.to(x.dtype)], 1)
