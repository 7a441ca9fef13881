"""Structural similarity by pytorch-msssim, the package that papers on tokenizers use."""

from __future__ import annotations

from pytorch_msssim import ms_ssim, ssim
from torch import Tensor

# The 11 x 11 window must fit into the smallest of MS-SSIM's five scales.
MS_SSIM_SIDE = (11 - 1) * 2**4


def structural_similarity(original_BCHW: Tensor, reconstruction_BCHW: Tensor) -> dict[str, Tensor]:
    """Return `ssim` and `ms_ssim` of each image over RGB, (B,): Gaussian window 11 x 11, sigma 1.5, data range 255.

    Images are in [-1, 1]. Only valid positions count. `ms_ssim` is omitted unless both sides are above 160 pixels.
    """
    pair = [(images.float() + 1) * 127.5 for images in (original_BCHW, reconstruction_BCHW)]
    values = {"ssim": ssim(*pair, data_range=255, size_average=False)}
    if min(original_BCHW.shape[-2:]) > MS_SSIM_SIDE:
        values["ms_ssim"] = multi_scale_similarity(original_BCHW, reconstruction_BCHW)
    return values


def multi_scale_similarity(original_BCHW: Tensor, reconstruction_BCHW: Tensor) -> Tensor:
    """Return MS-SSIM of each image, (B,); both sides must be above 160 pixels."""
    pair = [(images.float() + 1) * 127.5 for images in (original_BCHW, reconstruction_BCHW)]
    value_B: Tensor = ms_ssim(*pair, data_range=255, size_average=False)
    return value_B
