"""Look-up free quantisation (MAGVIT-v2), the paper's comparison: BSQ without the sphere."""

from __future__ import annotations

from torch import Tensor

from bsq_ray import config
from bsq_ray.models.quantizers.binary import BinaryQuantizer
from bsq_ray.models.quantizers.quantizer import Quantized


class LookupFreeQuantizer(BinaryQuantizer):
    """code = sign(v), with gradient 1; the quantisation error is not bounded."""

    def __init__(self, quantizer_config: config.LFQConfig) -> None:
        super().__init__(quantizer_config, scale=1.0)

    def quantize(self, v_BNC: Tensor) -> Quantized:
        """Keeps the signs of the free vector."""
        return self.quantize_coordinates(v_BNC)
