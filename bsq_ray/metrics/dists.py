"""DISTS as a metric: similarity of structure and texture (Ding et al., "Image Quality Assessment", TPAMI 2022).

    image in [0, 1] ─▶ VGG16 with L2 pooling ─▶ the image and 5 feature maps ─▶ mean and variance of each channel
    means of two images ─▶ texture similarity;  covariance, variances ─▶ structure similarity
    1 - sum over channels with learned weights = distance

It tolerates a texture that is replaced by a similar one, which LPIPS and PSNR penalize.

Shape suffixes: B images, C channels, G channels of a group, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray.models.lpips_network import build_trunk
from bsq_ray.models.pretrained_weights import resolve_once

# Smallest height and width of an image: each side of its last feature map then has two pixels, and so a variance.
MIN_SIDE = 17
# Channels of the image and of the five feature maps.
_CHANNELS = (3, 64, 128, 256, 512, 512)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Number of channels that are compared at once.
_GROUP = 16
# Constants of the published similarities, which keep constant channels finite.
_STABILIZER, _POOL_STABILIZER = 1e-6, 1e-12


@torch.no_grad()
def dists(original_BCHW: Tensor, reconstruction_BCHW: Tensor) -> Tensor:
    """Return the DISTS distance of each pair of images in [-1, 1], (B,); 0 for identical images, lower is better.

    Images are compared at their own size; some papers shrink them to 256 pixels first. A pair takes about a kilobyte
    of memory per pixel.

    Raises:
        ValueError: the published weights are not available.
    """
    network = load_network(str(original_BCHW.device))
    return network.distance(network.feature_maps(original_BCHW), network.feature_maps(reconstruction_BCHW))


@cache
def load_network(device: str) -> DISTSNetwork:
    """Return the process-wide copy of the network on a device.

    Raises:
        ValueError: the published weights are not available.
    """
    return DISTSNetwork().to(device)


class DISTSNetwork(nn.Module):
    """Frozen VGG16 with L2 pooling, and the learned weights of its channels.

    Raises:
        ValueError: the published weights are not available.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slices = build_trunk("vgg")
        for trunk_slice in list(self.slices)[1:]:
            assert isinstance(trunk_slice, nn.Sequential)
            trunk_slice[0] = _L2Pool()
        weights = resolve_once("dists").tensors
        total = weights["alpha"].sum() + weights["beta"].sum()
        self.register_buffer("texture_weights", weights["alpha"] / total)
        self.register_buffer("structure_weights", weights["beta"] / total)
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(_STD)[:, None, None])
        self.requires_grad_(False)
        self.eval()

    def feature_maps(self, images_BCHW: Tensor) -> Iterator[Tensor]:
        """Yield six fp32 feature maps (B, C, H, W) of images in [-1, 1], each when it is needed; the first in [0, 1].

        A list of them can be compared with several images.
        """
        x_BCHW = (images_BCHW.float() + 1) / 2
        yield x_BCHW
        x_BCHW = (x_BCHW - self.get_buffer("mean")) / self.get_buffer("std")
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        for trunk_slice in self.slices:
            x_BCHW = trunk_slice(x_BCHW)
            yield x_BCHW

    def distance(self, first: Iterable[Tensor], second: Iterable[Tensor]) -> Tensor:
        """Return the DISTS distance of each pair, fp32 (B,), from the feature maps of both images."""
        texture_weights = self.get_buffer("texture_weights").split(_CHANNELS)
        structure_weights = self.get_buffer("structure_weights").split(_CHANNELS)
        similarities = []
        for texture_C, structure_C, first_BCHW, second_BCHW in zip(
            texture_weights, structure_weights, first, second, strict=True
        ):
            # A few channels at a time: less memory and, in cache, a third less time.
            for texture_G, structure_G, first_BGHW, second_BGHW in zip(
                texture_C.split(_GROUP),
                structure_C.split(_GROUP),
                first_BCHW.split(_GROUP, 1),
                second_BCHW.split(_GROUP, 1),
                strict=True,
            ):
                texture_BG, structure_BG = _similarities(first_BGHW, second_BGHW)
                similarities.append((texture_BG * texture_G + structure_BG * structure_G).sum(1))
        # The rounding of identical images may be below 0.
        return (1 - torch.stack(similarities).sum(0)).clamp_min(0)


def _similarities(first_BCHW: Tensor, second_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the similarities of texture and of structure of each channel, (B, C), at most 1."""
    first_mean_BC11, second_mean_BC11 = (each.mean((2, 3), keepdim=True) for each in (first_BCHW, second_BCHW))
    first_BCHW, second_BCHW = first_BCHW - first_mean_BC11, second_BCHW - second_mean_BC11
    first_variance_BC, second_variance_BC = (each.square().mean((2, 3)) for each in (first_BCHW, second_BCHW))
    # The published code subtracts the means after the product, which cancels digits.
    covariance_BC = (first_BCHW * second_BCHW).mean((2, 3))
    first_mean_BC, second_mean_BC = first_mean_BC11.flatten(1), second_mean_BC11.flatten(1)
    texture_BC = (2 * first_mean_BC * second_mean_BC + _STABILIZER) / (
        first_mean_BC.square() + second_mean_BC.square() + _STABILIZER
    )
    structure_BC = (2 * covariance_BC + _STABILIZER) / (first_variance_BC + second_variance_BC + _STABILIZER)
    return texture_BC, structure_BC


class _L2Pool(nn.Module):
    """L2 pooling with stride 2: the root of the squares, blurred by a 3 x 3 Hann window."""

    def __init__(self) -> None:
        super().__init__()
        window_K = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("window", window_K[:, None] * window_K)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        channels = x_BCHW.shape[1]
        kernel_C1KK = self.get_buffer("window").expand(channels, 1, 3, 3)
        energy_BCHW = F.conv2d(x_BCHW.square(), kernel_C1KK, stride=2, padding=1, groups=channels)
        return (energy_BCHW + _POOL_STABILIZER).sqrt()
