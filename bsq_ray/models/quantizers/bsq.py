"""Binary spherical quantization (paper section 3.2)."""

from __future__ import annotations

from torch import Tensor

from bsq_ray import config
from bsq_ray.models.quantizers.binary import BinaryQuantizer
from bsq_ray.models.quantizers.l2_normalize import l2_normalize


class BinarySphericalQuantizer(BinaryQuantizer):
    """u = v / |v|, code = sign(u) / sqrt(L).

    The gradient of the code with respect to u is 1 / sqrt(L) (straight-through); the Jacobian of the normalization
    maps it to v. The quantization error is below sqrt(2 - 2 / sqrt(L)), so no commitment loss is needed.
    """

    def __init__(self, quantizer_config: config.BSQConfig) -> None:
        super().__init__(quantizer_config, scale=quantizer_config.bits**-0.5)

    def project(self, v_BNC: Tensor) -> Tensor:
        """Project onto the unit sphere."""
        return l2_normalize(v_BNC)
