"""Structural similarity, by the package that papers on tokenizers use (pytorch-msssim)."""

from __future__ import annotations

import numpy as np
from pytorch_msssim import ms_ssim, ssim
from torch import Tensor

# The smallest of MS-SSIM's five scales must hold the 11 x 11 window.
_MS_SSIM_SIDE = (11 - 1) * 2**4


class SSIM:
    """SSIM and MS-SSIM over RGB: Gaussian window 11 x 11, sigma 1.5, valid positions, data range 255.

    MS-SSIM needs sides above 160 pixels; below that it is left out of the result.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def update(self, original_BCHW: Tensor, reconstruction_BCHW: Tensor) -> None:
        """Adds a batch of images in [-1, 1]."""
        pair = [(images.float() + 1) * 127.5 for images in (original_BCHW, reconstruction_BCHW)]
        values = {"ssim": ssim(*pair, data_range=255, size_average=False)}
        if min(original_BCHW.shape[-2:]) > _MS_SSIM_SIDE:
            values["ms_ssim"] = ms_ssim(*pair, data_range=255, size_average=False)
        for name, value_B in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value_B.double().sum())
        self._count += len(original_BCHW)

    def state(self) -> dict[str, np.ndarray]:
        """What was added so far."""
        return {name: np.array(value) for name, value in self._sums.items()} | {"count": np.array(self._count)}

    def merge(self, state: dict[str, np.ndarray]) -> None:
        """Adds what another worker saw."""
        for name, value in state.items():
            if name != "count":
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._count += int(state["count"])

    def compute(self) -> dict[str, float]:
        """ssim, and ms_ssim where the images are large enough."""
        return {name: value / self._count for name, value in self._sums.items()}
