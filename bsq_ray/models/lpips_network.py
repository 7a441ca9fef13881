"""LPIPS v0.1 (Zhang et al., CVPR 2018): the network of the perceptual loss and of the metric.

    image ─shift, scale─▶ trunk (AlexNet or VGG16) ─▶ 5 feature maps ─normalize over channels─▶ features
    features of two images ─squared difference─▶ mean over positions ─learned channel weights─▶ sum = distance

Shape suffixes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from bsq_ray.models.pretrained_weights import resolve_once

NetworkName = Literal["alex", "vgg"]
# Normalization of the published network, for images in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Convolutions of each of the five slices: output channels, kernel size, stride, padding. A slice ends with a ReLU.
_SLICES: dict[NetworkName, tuple[tuple[tuple[int, int, int, int], ...], ...]] = {
    "alex": (((64, 11, 4, 2),), ((192, 5, 1, 2),), ((384, 3, 1, 1),), ((256, 3, 1, 1),), ((256, 3, 1, 1),)),
    "vgg": tuple(
        ((channels, 3, 1, 1),) * depth
        for channels, depth in zip((64, 128, 256, 512, 512), (2, 2, 3, 3, 3), strict=True)
    ),
}
# Max pooling with stride 2: kernel size, and the slices that start with it.
_POOLS: dict[NetworkName, tuple[int, tuple[int, ...]]] = {"alex": (3, (1, 2)), "vgg": (2, (1, 2, 3, 4))}


class LPIPSNetwork(nn.Module):
    """Frozen network that measures the perceptual distance between images.

    Args:
        name: "vgg" (the usual training loss) or "alex" (the usual metric).

    Raises:
        ValueError: the published weights are not available.
    """

    def __init__(self, name: NetworkName) -> None:
        super().__init__()
        self.trunk = build_trunk(name)
        for index, weight_C in enumerate(_load_heads(name)):
            self.register_buffer(f"head{index}", weight_C)
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None])
        self.requires_grad_(False)
        self.eval()

    def features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return five fp32 feature maps (B, C, H, W) of images in [-1, 1], L2-normalized over the channels."""
        # Normalize in fp32: the squares of half-precision features overflow or lose precision.
        return [normalize_channels(map_BCHW.float()) for map_BCHW in self.feature_maps(images_BCHW)]

    def feature_maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return five feature maps (B, C, H, W) of images in [-1, 1], as the ReLUs return them, ≥ 0."""
        x_BCHW = (images_BCHW - self.get_buffer("shift")) / self.get_buffer("scale")
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        maps = []
        for trunk_slice in self.trunk:
            x_BCHW = trunk_slice(x_BCHW)
            maps.append(x_BCHW)
        return maps

    def distance(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """Return the LPIPS distance of each pair, fp32 (B,), from the features of both images."""
        distance_B = first[0].new_zeros(len(first[0]), dtype=torch.float32)
        for index, (first_BCHW, second_BCHW) in enumerate(zip(first, second, strict=True)):
            weight_C = self.get_buffer(f"head{index}")
            # A matrix product would be rounded to bf16 under autocast.
            distance_B = distance_B + ((first_BCHW - second_BCHW).square().mean((2, 3)) * weight_C).sum(1)
        return distance_B

    def forward(self, first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
        """Return the LPIPS distance of each pair of images in [-1, 1], fp32 (B,)."""
        return self.distance(self.features(first_BCHW), self.features(second_BCHW))


def normalize_channels(features_BCHW: Tensor) -> Tensor:
    """Divide the features (B, C, H, W) of each position by their L2 norm over the channels."""
    return features_BCHW / (features_BCHW.square().sum(1, keepdim=True).sqrt() + 1e-10)


def build_trunk(name: NetworkName) -> nn.ModuleList:
    """Build the five slices of a trunk with their ImageNet weights, in channels-last memory order.

    Raises:
        ValueError: the published weights are not available.
    """
    pool, pooled_slices = _POOLS[name]
    slices, channels = nn.ModuleList(), 3
    for index, convolutions in enumerate(_SLICES[name]):
        layers: list[nn.Module] = [nn.MaxPool2d(pool, 2)] if index in pooled_slices else []
        for out_channels, kernel, stride, padding in convolutions:
            layers += [nn.Conv2d(channels, out_channels, kernel, stride, padding), nn.ReLU(inplace=True)]
            channels = out_channels
        slices.append(nn.Sequential(*layers))
    weights = resolve_once(f"lpips-{name}").tensors
    trunk_convolutions = [module for module in slices.modules() if isinstance(module, nn.Conv2d)]
    assert 2 * len(trunk_convolutions) == len(weights)
    with torch.no_grad():
        for index, convolution in enumerate(trunk_convolutions):
            convolution.weight.data = weights[f"conv.{index}.weight"].clone(memory_format=torch.channels_last)
            cast(Tensor, convolution.bias).copy_(weights[f"conv.{index}.bias"])
    return slices


def _load_heads(name: NetworkName) -> list[Tensor]:
    """Read the learned channel weights (C,) of the five slices from the installed package `lpips`.

    The package itself is not imported, because it imports torchvision.

    Raises:
        ValueError: the package is not installed.
    """
    spec = find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the package lpips, which provides the weights, is not installed; run `pip install lpips`")
    path = Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / f"{name}.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"].flatten() for index in range(5)]
