"""Lookup-free quantization (MAGVIT-v2), the paper's baseline: BSQ without the sphere."""

from __future__ import annotations

from torch import Tensor

from bsq_ray import config
from bsq_ray.models.quantizers.binary import BinaryQuantizer


class LookupFreeQuantizer(BinaryQuantizer):
    """code = sign(v), with gradient 1; the quantization error is unbounded."""

    def __init__(self, quantizer_config: config.LFQConfig) -> None:
        super().__init__(quantizer_config, scale=1.0)

    def project(self, v_BNC: Tensor) -> Tensor:
        """Return the vectors: they are unconstrained."""
        return v_BNC
