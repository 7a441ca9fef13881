"""The honest trivial codec at the same bits: each patch is its mean colour."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class MeanColorCodec:
    """Replaces each patch by its mean colour, with the bits of a token shared among red, green and blue.

    Each channel is quantised uniformly; bits that do not divide by three go to green first, then red.

    Args:
        patch: side of a patch, pixels.
        bits: bits of a patch; 3 to 48, more are not used.
    """

    def __init__(self, patch_size: int, bits: int) -> None:
        self.patch_size = patch_size
        usable = min(bits, 48)
        red, green, blue = (usable + 1) // 3, (usable + 2) // 3, usable // 3
        self.levels = torch.tensor([2.0**red - 1, 2.0**green - 1, 2.0**blue - 1]).clamp_min(0)

    def reconstruct(self, images_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] as the codec would give them back."""
        mean_BCHW = F.avg_pool2d((images_BCHW + 1) / 2, self.patch_size)
        levels_C11 = self.levels.to(images_BCHW)[:, None, None]
        quantized_BCHW = torch.where(
            levels_C11 > 0, (mean_BCHW * levels_C11).round() / levels_C11.clamp_min(1), torch.full_like(mean_BCHW, 0.5)
        )
        return F.interpolate(quantized_BCHW, scale_factor=self.patch_size, mode="nearest") * 2 - 1
