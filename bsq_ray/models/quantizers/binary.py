"""What BSQ and LFQ share: the sign of each coordinate, and the entropy penalty.

    u_BNC ─▶ sign ─▶ · scale ─▶ codes          penalty = weight · (γ0 · E[H] - γ · H(E)) / τ' + commit

τ' is the inverse temperature: a coordinate takes its positive code with probability sigmoid(4 · scale · τ' · u).
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor

from bsq_ray import config
from bsq_ray.losses.entropy import bit_statistics, bitwise_codebook_entropy, grouped_codebook_entropy
from bsq_ray.models.quantizers.quantizer import Quantized, Quantizer


class BinaryQuantizer(Quantizer):
    """Keeps the sign of each coordinate; `scale` is the magnitude of a code's coordinates."""

    def __init__(self, quantizer_config: config.BSQConfig | config.LFQConfig, scale: float) -> None:
        super().__init__()
        self.bits = self.channels = quantizer_config.bits
        self.entropy_config = quantizer_config.entropy
        self.commitment_weight = quantizer_config.commitment_weight
        self.scale = scale

    def dequantize(self, bits_BNL: Tensor) -> Tensor:
        """±scale for each bit."""
        # Twice as fast on a CPU as choosing between two numbers, and as exact.
        return bits_BNL.float().mul_(2 * self.scale).sub_(self.scale)

    def quantize_coordinates(self, u_BNC: Tensor) -> Quantized:
        """Quantises coordinates that are already on the sphere (BSQ) or free (LFQ)."""
        bits_BNL = u_BNC >= 0  # the paper's sign(0) = +1
        codes_BNC: Tensor = _SignSTE.apply(u_BNC, self.dequantize(bits_BNL), self.scale)
        penalty, stats = self._entropy_penalty(u_BNC)
        if self.commitment_weight:
            commitment_loss = (codes_BNC.detach() - u_BNC).square().sum(-1).mean()
            penalty = penalty + self.commitment_weight * commitment_loss
            stats["commit"] = commitment_loss.detach()
        return Quantized(codes_BNC, bits_BNL, penalty, stats)

    def _entropy_penalty(self, u_BNC: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        entropy_config = self.entropy_config
        steepness = 4 * self.scale * entropy_config.inverse_temperature
        u_NL = u_BNC.flatten(0, 1)
        per_sample_entropy, mean_L = bit_statistics(u_NL, steepness)
        if entropy_config.estimate == "analytical":
            codebook_entropy = bitwise_codebook_entropy(mean_L, entropy_config.across_workers)
        else:
            codebook_entropy = grouped_codebook_entropy(
                steepness * u_NL, entropy_config.group_size, entropy_config.across_workers
            )
        weight = entropy_config.weight / entropy_config.inverse_temperature
        stats = {
            "per_sample_entropy": per_sample_entropy.detach() / log(2),
            "codebook_entropy": codebook_entropy.detach() / log(2),
        }
        penalty = (weight * entropy_config.per_sample_weight) * per_sample_entropy - (
            weight * entropy_config.codebook_weight
        ) * codebook_entropy
        return penalty, stats


class _SignSTE(torch.autograd.Function):
    """The codes, with the straight-through gradient: that of u · scale."""

    @staticmethod
    def forward(ctx: Any, u_BNC: Tensor, codes_BNC: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return codes_BNC

    @staticmethod
    def backward(ctx: Any, gradient_BNC: Tensor) -> tuple[Tensor, None, None]:
        return gradient_BNC * ctx.scale, None, None
