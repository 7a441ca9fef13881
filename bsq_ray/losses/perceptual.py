"""LPIPS and the texture loss on its features, as training losses.

Shape suffixes: B images, C channels, H and W pixels, P positions of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from bsq_ray.models.lpips_network import LPIPSNetwork, NetworkName, normalize_channels


class PerceptualLoss(nn.Module):
    """LPIPS distance between reconstructions and originals, with gradients for the reconstructions only.

    The networks are frozen and stay in evaluation mode.

    Args:
        networks: "vgg" (the paper's training loss), "alex" (the usual metric), or both, whose distances are averaged.

    Raises:
        ValueError: a network's published weights are not available.
    """

    def __init__(self, *networks: NetworkName) -> None:
        super().__init__()
        self.networks = nn.ModuleList(map(LPIPSNetwork, networks))

    def forward(self, reconstruction_BCHW: Tensor, original_BCHW: Tensor) -> Tensor:
        """Return the LPIPS distance of each pair of images in [-1, 1], fp32 (B,)."""
        distances = []
        for network in self._lpips_networks():
            with torch.no_grad():
                original_features = network.features(original_BCHW)
            distances.append(network.distance(network.features(reconstruction_BCHW), original_features))
        return torch.stack(distances).mean(0)

    def with_texture(self, reconstruction_BCHW: Tensor, original_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the LPIPS distance and the Gram-matrix distance of each pair, both fp32 (B,), from the same features.

        See `gram_distance`. The network runs once per image, as in `forward`.
        """
        distances, gram_distances = [], []
        for network in self._lpips_networks():
            with torch.no_grad():
                original_maps = [map_BCHW.float() for map_BCHW in network.feature_maps(original_BCHW)]
            maps = [map_BCHW.float() for map_BCHW in network.feature_maps(reconstruction_BCHW)]
            features = [normalize_channels(map_BCHW) for map_BCHW in maps]
            original_features = [normalize_channels(map_BCHW) for map_BCHW in original_maps]
            distances.append(network.distance(features, original_features))
            gram_distances.append(gram_distance(maps, original_maps))
        return torch.stack(distances).mean(0), torch.stack(gram_distances).mean(0)

    def _lpips_networks(self) -> list[LPIPSNetwork]:
        return [cast(LPIPSNetwork, network) for network in self.networks]


def gram_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the distance between the textures of each pair of images, (B,): Σ mean (G(first) - G(second))².

    G = F Fᵀ / (C·H·W) is the Gram matrix (C, C) of a feature map F (C, H·W): the correlations of its channels,
    whatever their position (Gatys et al., "A Neural Algorithm of Artistic Style", 2015). The mean is over the elements
    of the matrix, the sum over the feature maps.

    Args:
        first, second: feature maps (B, C, H, W) of both images, fp32 or fp64, as many of each.
    """
    distance_B = first[0].new_zeros(len(first[0]))
    for first_BCHW, second_BCHW in zip(first, second, strict=True):
        difference_BCC = _gram_matrix(first_BCHW) - _gram_matrix(second_BCHW)
        distance_B = distance_B + difference_BCC.square().mean((1, 2))
    return distance_B


def _gram_matrix(map_BCHW: Tensor) -> Tensor:
    """Return F Fᵀ / (C·H·W), (B, C, C)."""
    # Autocast would round the product to bf16.
    with torch.autocast(map_BCHW.device.type, enabled=False):
        map_BCP = map_BCHW.flatten(2)
        return map_BCP @ map_BCP.mT / map_BCHW[0].numel()
