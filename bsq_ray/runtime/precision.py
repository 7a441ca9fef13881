"""Numeric precision of fp32 on a GPU.

PyTorch multiplies fp32 matrices with full precision by default. Its convolutions use TF32 (10 mantissa bits), so LPIPS,
SSIM and FID would depend on the hardware, and `training.engine.precision: fp32` would not be fp32.
"""

from __future__ import annotations

import torch


def enable_strict_fp32() -> None:
    """Compute fp32 products with full precision in this process from now on; no effect on a CPU."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
