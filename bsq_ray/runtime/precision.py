"""What fp32 means on a GPU: 24 bits of every product.

PyTorch multiplies matrices so by itself, but convolutions in TF32, which keeps 11 bits of the factors: LPIPS, SSIM and
FID would depend on the hardware, and `training.engine.precision=fp32` would not be what it says.
"""

from __future__ import annotations

import torch


def strict_fp32() -> None:
    """From here on, this process multiplies fp32 numbers whole; on a CPU it always does."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
