"""Binary spherical quantisation (paper section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bsq_ray import config
from bsq_ray.models.quantizers.binary import BinaryQuantizer
from bsq_ray.models.quantizers.quantizer import Quantized


class BinarySphericalQuantizer(BinaryQuantizer):
    """u = v / |v|, code = sign(u) / sqrt(L).

    The gradient of the code with respect to u is 1 / sqrt(L) (straight-through), and the normalisation's Jacobian
    carries it on to v. The quantisation error is below sqrt(2 - 2 / sqrt(L)), so no commit loss is needed.
    """

    def __init__(self, quantizer_config: config.BSQConfig) -> None:
        super().__init__(quantizer_config, scale=quantizer_config.bits**-0.5)

    def quantize(self, v_BNC: Tensor) -> Quantized:
        """Projects on the sphere, then keeps the signs."""
        u_BNC: Tensor = _L2Normalize.apply(v_BNC)
        return self.quantize_coordinates(u_BNC)


class _L2Normalize(torch.autograd.Function):
    """u = v / |v| with du/dv = (1 - u uᵀ) / |v|; the null vector stays where it is."""

    @staticmethod
    def forward(ctx: Any, v_BNC: Tensor) -> Tensor:
        norm_BN1 = torch.linalg.vector_norm(v_BNC, dim=-1, keepdim=True).clamp_min_(1e-12)
        u_BNC = v_BNC / norm_BN1
        ctx.save_for_backward(u_BNC, norm_BN1)
        return u_BNC

    @staticmethod
    def backward(ctx: Any, gradient_BNC: Tensor) -> Tensor:
        u_BNC, norm_BN1 = ctx.saved_tensors
        radial_BN1 = (gradient_BNC * u_BNC).sum(-1, keepdim=True)
        return torch.addcmul(gradient_BNC, u_BNC, radial_BN1, value=-1).div_(norm_BN1)
