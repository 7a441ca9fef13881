"""LPIPS as a metric."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from bsq_ray.config.image_sizes import LPIPS_MIN_SIDES as MIN_SIDE
from bsq_ray.models.lpips_network import LPIPSNetwork, NetworkName

__all__ = ["MIN_SIDE", "lpips"]


@torch.no_grad()
def lpips(original_BCHW: Tensor, reconstruction_BCHW: Tensor, network: NetworkName = "alex") -> Tensor:
    """Return the LPIPS distance (v0.1) of each pair of images in [-1, 1], (B,); lower is better.

    Args:
        network: "alex", which papers report, or "vgg", which most models train with.

    Raises:
        ValueError: the network's published weights are not available.
    """
    distance_B: Tensor = _load_network(network, str(original_BCHW.device))(reconstruction_BCHW, original_BCHW)
    return distance_B


@cache
def _load_network(name: NetworkName, device: str) -> LPIPSNetwork:
    """Return the process-wide copy of a network on a device."""
    return LPIPSNetwork(name).to(device)
