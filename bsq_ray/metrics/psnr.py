"""Peak signal-to-noise ratio."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(original_BCHW: Tensor, reconstruction_BCHW: Tensor) -> Tensor:
    """Return 10 log10(255² / MSE) of each image in dB, (B,); identical images have 100 dB.

    Images are 8-bit values mapped to [-1, 1]. The error is computed in double precision.
    """
    error_B = ((original_BCHW - reconstruction_BCHW).double() * 127.5).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / error_B.clamp_min(255**2 * 1e-10))
