"""Finite scalar quantisation (Mentzer et al., ICLR 2024): each channel is bounded and rounded to its levels."""

from __future__ import annotations

import torch
from torch import Tensor

from bsq_ray import config
from bsq_ray.models.quantizers.quantizer import Quantized, Quantizer, straight_through

# Keeps the bound just above the outermost level, so that it can be reached.
_MARGIN = 1e-3


class FiniteScalarQuantizer(Quantizer):
    """Channel c takes `levels[c]` evenly spaced values in [-1, 1]; there is no penalty.

    A channel's level is written in the fewest bits that hold it, least significant first.
    """

    levels_C: Tensor
    offset_C: Tensor
    half_C: Tensor
    shift_C: Tensor

    def __init__(self, quantizer_config: config.FSQConfig) -> None:
        super().__init__()
        levels_C = torch.tensor(quantizer_config.levels)
        self.bit_widths = [(n - 1).bit_length() for n in quantizer_config.levels]
        self.bits = quantizer_config.bits
        self.channels = len(quantizer_config.levels)
        # An even number of levels has none at zero; the shift keeps the initial outputs at zero.
        self.register_buffer("levels_C", levels_C, persistent=False)
        offset_C = torch.where(levels_C % 2 == 0, 0.5, 0.0)
        self.register_buffer("offset_C", offset_C, persistent=False)
        half_C = (levels_C - 1) * (1 + _MARGIN) / 2
        self.register_buffer("half_C", half_C, persistent=False)
        self.register_buffer("shift_C", torch.atanh(offset_C / half_C), persistent=False)

    def quantize(self, v_BNC: Tensor) -> Quantized:
        """Bounds each channel with a tanh and rounds it."""
        bounded_BNC = torch.tanh(v_BNC + self.shift_C) * self.half_C - self.offset_C
        center_C = self.levels_C // 2
        level_BNC = (bounded_BNC.detach().round().long() + center_C).clamp(min=0).minimum(self.levels_C - 1)
        codes_BNC = straight_through(self._levels_to_codes(level_BNC), bounded_BNC / center_C)
        return Quantized(codes_BNC, self._levels_to_bits(level_BNC), v_BNC.new_zeros(()), {})

    def dequantize(self, bits_BNL: Tensor) -> Tensor:
        """The values of the levels; bits beyond a channel's last level name the last level."""
        levels = []
        for bits_BNb in bits_BNL.split(self.bit_widths, dim=-1):
            shifts_b = torch.arange(bits_BNb.shape[-1], device=bits_BNL.device)
            levels.append((bits_BNb.long() << shifts_b).sum(-1))
        return self._levels_to_codes(torch.stack(levels, -1).minimum(self.levels_C - 1))

    def _levels_to_codes(self, level_BNC: Tensor) -> Tensor:
        center_C = self.levels_C // 2
        return (level_BNC - center_C) / center_C

    def _levels_to_bits(self, level_BNC: Tensor) -> Tensor:
        parts = []
        for level_BN, width in zip(level_BNC.unbind(-1), self.bit_widths, strict=True):
            shifts_b = torch.arange(width, device=level_BNC.device)
            parts.append((level_BN.unsqueeze(-1) >> shifts_b & 1).bool())
        return torch.cat(parts, -1)
