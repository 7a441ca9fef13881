"""LPIPS as a metric."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from bsq_ray.losses.perceptual import PerceptualLoss


@torch.no_grad()
def lpips(original_BCHW: Tensor, reconstruction_BCHW: Tensor, network: Literal["alex", "vgg"] = "alex") -> Tensor:
    """LPIPS (v0.1 heads) of each pair of images in [-1, 1], (B,); lower is better.

    Args:
        network: "alex", which papers report, or "vgg", which most train with.
    """
    distance_B: Tensor = _load_network(network, str(original_BCHW.device))(reconstruction_BCHW, original_BCHW)
    return distance_B


@cache
def _load_network(name: Literal["alex", "vgg"], device: str) -> PerceptualLoss:
    """One copy of each network in a process, whoever measures with it."""
    return PerceptualLoss(name).to(device)
