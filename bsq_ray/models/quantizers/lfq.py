"""Lookup-free quantization (MAGVIT-v2), the paper's baseline: BSQ without the sphere."""

from __future__ import annotations

from torch import Tensor

from bsq_ray.models.quantizers.binary import BinaryQuantizer, ScalarT


class LookupFreeQuantizer(BinaryQuantizer):
    """code = sign(v), with gradient 1; the quantization error is unbounded."""

    def code_scale(self, num_bits: ScalarT) -> ScalarT:
        """Return 1 for any number of bits."""
        return num_bits**0.0

    def project(self, v_BNC: Tensor) -> Tensor:
        """Return the vectors: they are unconstrained."""
        return v_BNC
