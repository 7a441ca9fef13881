"""LPIPS as a training loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bsq_ray.models.lpips_network import LPIPSNetwork, NetworkName


class PerceptualLoss(nn.Module):
    """LPIPS distance between reconstructions and originals, with gradients for the reconstructions only.

    The network is frozen and stays in evaluation mode.

    Args:
        network: "vgg" (the paper's training loss) or "alex" (the usual metric).

    Raises:
        ValueError: the network's published weights are not available.
    """

    def __init__(self, network: NetworkName) -> None:
        super().__init__()
        self.lpips = LPIPSNetwork(network)

    def forward(self, reconstruction_BCHW: Tensor, original_BCHW: Tensor) -> Tensor:
        """Return the LPIPS distance of each pair of images in [-1, 1], fp32 (B,)."""
        with torch.no_grad():
            original_features = self.lpips.features(original_BCHW)
        return self.lpips.distance(self.lpips.features(reconstruction_BCHW), original_features)
