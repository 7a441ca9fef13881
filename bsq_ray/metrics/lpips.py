"""LPIPS as a metric, with the AlexNet features that papers report."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bsq_ray.losses.perceptual import PerceptualLoss


class LPIPS:
    """Mean LPIPS (AlexNet, v0.1 heads) over images; lower is better."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.network = PerceptualLoss("alex").to(device)
        self._sum = 0.0
        self._count = 0

    @torch.no_grad()
    def each(self, original_BCHW: Tensor, reconstruction_BCHW: Tensor) -> Tensor:
        """LPIPS of each pair of images in [-1, 1], (B,)."""
        distance_B: Tensor = self.network(reconstruction_BCHW, original_BCHW)
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
        """lpips, the mean."""
        return {"lpips": self._sum / self._count}
