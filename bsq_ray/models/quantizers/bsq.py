"""Binary spherical quantisation (paper section 3.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bsq_ray import config
from bsq_ray.models.quantizers.base import Quantized
from bsq_ray.models.quantizers.binary import BinaryQuantizer


class BinarySphericalQuantizer(BinaryQuantizer):
    """u = v / |v|, code = sign(u) / sqrt(L).

    The gradient of the code with respect to u is 1 / sqrt(L) (straight-through), and the normalisation's Jacobian
    carries it on to v. The quantisation error is below sqrt(2 - 2 / sqrt(L)), so no commit loss is needed.
    """

    def __init__(self, section: config.BSQ) -> None:
        super().__init__(section, scale=section.bits**-0.5)

    def quantize(self, v_BNC: Tensor) -> Quantized:
        """Projects on the sphere, then keeps the signs."""
        return self.quantize_coordinates(F.normalize(v_BNC, dim=-1))
