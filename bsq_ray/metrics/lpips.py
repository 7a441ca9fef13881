"""LPIPS as a metric."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bsq_ray.losses.perceptual import PerceptualLoss


class LPIPS:
    """Mean LPIPS (v0.1 heads) over images; lower is better.

    Args:
        network: "alex", which papers report, or "vgg", which most train with.
    """

    def __init__(self, network: Literal["alex", "vgg"] = "alex", device: torch.device | str = "cpu") -> None:
        self.name = "lpips" if network == "alex" else f"lpips_{network}"
        self._network, self._device = network, device
        self._sum = 0.0
        self._count = 0

    @torch.no_grad()
    def each(self, original_BCHW: Tensor, reconstruction_BCHW: Tensor) -> Tensor:
        """LPIPS of each pair of images in [-1, 1], (B,)."""
        distance_B: Tensor = _network(self._network, str(self._device))(reconstruction_BCHW, original_BCHW)
        return distance_B

    def update(self, original_BCHW: Tensor, reconstruction_BCHW: Tensor) -> Tensor:
        """Adds a batch and returns its values (B,)."""
        distance_B = self.each(original_BCHW, reconstruction_BCHW)
        self._sum += float(distance_B.double().sum())
        self._count += len(distance_B)
        return distance_B

    def state(self) -> dict[str, np.ndarray]:
        """What was added so far."""
        return {"sum": np.array(self._sum), "count": np.array(self._count)}

    def merge(self, state: dict[str, np.ndarray]) -> None:
        """Adds what another worker saw."""
        self._sum += float(state["sum"])
        self._count += int(state["count"])

    def compute(self) -> dict[str, float]:
        """lpips or lpips_vgg, the mean."""
        return {self.name: self._sum / self._count}


@cache
def _network(name: Literal["alex", "vgg"], device: str) -> PerceptualLoss:
    """One copy of each network in a process, whoever measures with it."""
    return PerceptualLoss(name).to(device)
