"""Quantizers behind one interface: vectors in, straight-through codes and bits out."""

from __future__ import annotations

from bsq_ray import config
from bsq_ray.models.quantizers.binary import BinaryQuantizer
from bsq_ray.models.quantizers.bsq import BinarySphericalQuantizer
from bsq_ray.models.quantizers.fsq import FiniteScalarQuantizer
from bsq_ray.models.quantizers.lfq import LookupFreeQuantizer
from bsq_ray.models.quantizers.quantizer import KeptBits, Quantized, Quantizer, flip_signs
from bsq_ray.models.quantizers.vq import VectorQuantizer

__all__ = ["BinaryQuantizer", "KeptBits", "Quantized", "Quantizer", "build_quantizer", "flip_signs"]


def build_quantizer(
    quantizer_config: config.BSQConfig | config.LFQConfig | config.FSQConfig | config.VQConfig,
) -> Quantizer:
    """Build the configured quantizer."""
    if isinstance(quantizer_config, config.BSQConfig):
        return BinarySphericalQuantizer(quantizer_config)
    if isinstance(quantizer_config, config.LFQConfig):
        return LookupFreeQuantizer(quantizer_config)
    if isinstance(quantizer_config, config.FSQConfig):
        return FiniteScalarQuantizer(quantizer_config)
    return VectorQuantizer(quantizer_config)
