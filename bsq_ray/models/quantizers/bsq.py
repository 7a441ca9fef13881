"""Binary spherical quantization (paper section 3.2)."""

from __future__ import annotations

from torch import Tensor

from bsq_ray.models.quantizers.binary import BinaryQuantizer, ScalarT
from bsq_ray.models.quantizers.l2_normalize import l2_normalize


class BinarySphericalQuantizer(BinaryQuantizer):
    """u = v / |v|, code = sign(u) / sqrt(L).

    The gradient of the code with respect to u is 1 / sqrt(L) (straight-through); the Jacobian of the normalization
    maps it to v. The quantization error is below sqrt(2 - 2 / sqrt(L)), so no commitment loss is needed.
    """

    def code_scale(self, num_bits: ScalarT) -> ScalarT:
        """Return 1 / sqrt(num_bits), so that codes have unit length."""
        return num_bits**-0.5

    def project(self, v_BNC: Tensor) -> Tensor:
        """Project onto the unit sphere."""
        return l2_normalize(v_BNC)
