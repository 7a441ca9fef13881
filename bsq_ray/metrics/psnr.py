"""Peak signal-to-noise ratio."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class PSNR:
    """10 log10(255² / MSE) of each image in dB, averaged over images; images are 8-bit values mapped to [-1, 1]."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def update(self, original_BCHW: Tensor, reconstruction_BCHW: Tensor) -> Tensor:
        """Adds a batch and returns its values (B,); identical images count as 100 dB."""
        error_B = ((original_BCHW - reconstruction_BCHW).double() * 127.5).square().mean((1, 2, 3))
        psnr_B = 10 * torch.log10(255**2 / error_B.clamp_min(255**2 * 1e-10))
        self._sum += float(psnr_B.sum())
        self._count += len(psnr_B)
        return psnr_B

    def state(self) -> dict[str, np.ndarray]:
        """What was added so far."""
        return {"sum": np.array(self._sum), "count": np.array(self._count)}

    def merge(self, state: dict[str, np.ndarray]) -> None:
        """Adds what another worker saw."""
        self._sum += float(state["sum"])
        self._count += int(state["count"])

    def compute(self) -> dict[str, float]:
        """psnr in dB."""
        return {"psnr": self._sum / self._count}
