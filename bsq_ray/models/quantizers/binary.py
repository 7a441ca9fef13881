"""Base of BSQ and LFQ: the sign of each coordinate, and the entropy penalty.

    u_BNC ─▶ sign ─▶ · scale ─▶ codes          penalty = weight · (γ0 · E[H] - γ · H(E)) / τ' + commit

τ' is the inverse temperature: a coordinate takes its positive code with probability sigmoid(4 · scale · τ' · u).
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from math import log
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bsq_ray import config
from bsq_ray.models.quantizers.entropy import (
    bit_statistics,
    bitwise_codebook_entropy,
    grouped_codebook_entropy,
    mean_group_probabilities,
    weighted_bit_statistics,
)
from bsq_ray.models.quantizers.quantizer import KeptBits, Quantized, Quantizer

# A number, or a floating-point tensor of numbers.
ScalarT = TypeVar("ScalarT", float, Tensor)


class BinaryQuantizer(Quantizer):
    """Keeps the sign of each coordinate; `code_scale` is the magnitude of the coordinates of a code.

    With nested bits a code has k leading coordinates of that magnitude, and zeros after them.
    """

    def __init__(self, quantizer_config: config.BSQConfig | config.LFQConfig) -> None:
        super().__init__()
        self.bits = self.channels = quantizer_config.bits
        self.entropy_config = quantizer_config.entropy
        self.commitment_weight = quantizer_config.commitment_weight
        self.is_nested = bool(quantizer_config.keep)
        self.scale = self.code_scale(self.bits)

    @abstractmethod
    def code_scale(self, num_bits: ScalarT) -> ScalarT:
        """Return the magnitude of the coordinates of codes, given their numbers of bits."""

    @abstractmethod
    def project(self, v_BNC: Tensor) -> Tensor:
        """Map vectors to the coordinates whose signs are kept: on the sphere (BSQ) or unconstrained (LFQ)."""

    def dequantize(self, bits_BNL: Tensor) -> Tensor:
        """Return fp32 codes (B, N, C) with ±scale for each bit; coordinates after the last bit are zero."""
        num_bits = bits_BNL.shape[-1]
        scale = self.code_scale(num_bits)
        # Twice as fast as torch.where on a CPU, and as exact.
        codes_BNL = bits_BNL.float().mul_(2 * scale).sub_(scale)
        return codes_BNL if num_bits == self.bits else F.pad(codes_BNL, (0, self.bits - num_bits))

    def quantize(self, v_BNC: Tensor) -> Quantized:
        """Keep the signs of the projected vectors; the codebook entropy is that of all workers' vectors together."""
        return self._quantize_coordinates(self.project(v_BNC), None)

    def quantize_part(self, v_BNC: Tensor, batch_statistics: Tensor) -> Quantized:
        """Quantize a part of a batch; the codebook entropy is that of the whole batch."""
        return self._quantize_coordinates(self.project(v_BNC), batch_statistics)

    def quantize_nested(self, v_BNC: Tensor, kept_bits: KeptBits, batch_statistics: Tensor | None) -> Quantized:
        """Keep the leading bits of each sample: codes and entropies are those of a quantizer with as many bits."""
        nested = self._nest(kept_bits)
        u_BNC = self.project(v_BNC * nested.mask_B1L)
        bits_BNL = v_BNC >= 0
        all_codes_BNC = torch.where(bits_BNL, nested.scale_B1L, -nested.scale_B1L)
        codes_BNC: Tensor = _SignSTE.apply(u_BNC, all_codes_BNC, nested.scale_B1L)
        return self._with_penalty(u_BNC, codes_BNC, bits_BNL, batch_statistics, nested)

    def batch_statistics(self, v_BNC: Tensor, kept_bits: KeptBits | None = None) -> Tensor:
        """Return the mean code probabilities of the vectors, from which the codebook entropy is computed."""
        entropy_config = self.entropy_config
        with torch.autocast(v_BNC.device.type, enabled=False):
            if kept_bits is not None:
                nested = self._nest(kept_bits)
                logits_NL, weights_NL = self._nested_logits(self.project(v_BNC.float() * nested.mask_B1L), nested)
                if entropy_config.estimate == "analytical":
                    return weighted_bit_statistics(logits_NL, weights_NL)[1]
                return mean_group_probabilities(logits_NL, entropy_config.group_size, weights_NL)
            u_NL = self.project(v_BNC.float()).flatten(0, 1)
            if entropy_config.estimate == "analytical":
                return bit_statistics(u_NL, self._steepness)[1]
            return mean_group_probabilities(self._steepness * u_NL, entropy_config.group_size)

    @property
    def _steepness(self) -> float:
        return 4 * self.scale * self.entropy_config.inverse_temperature

    def _quantize_coordinates(self, u_BNC: Tensor, batch_statistics: Tensor | None) -> Quantized:
        bits_BNL = u_BNC >= 0  # sign(0) = +1, as in the paper
        codes_BNC: Tensor = _SignSTE.apply(u_BNC, self.dequantize(bits_BNL), self.scale)
        return self._with_penalty(u_BNC, codes_BNC, bits_BNL, batch_statistics, None)

    def _with_penalty(
        self,
        u_BNC: Tensor,
        codes_BNC: Tensor,
        bits_BNL: Tensor,
        batch_statistics: Tensor | None,
        nested: _NestedCodes | None,
    ) -> Quantized:
        penalty, stats = self._entropy_penalty(u_BNC, batch_statistics, nested)
        if self.commitment_weight:
            commitment_loss = (codes_BNC.detach() - u_BNC).square().sum(-1).mean()
            penalty = penalty + self.commitment_weight * commitment_loss
            stats["commit"] = commitment_loss.detach()
        return Quantized(codes_BNC, bits_BNL, penalty, stats)

    def _entropy_penalty(
        self, u_BNC: Tensor, batch_statistics: Tensor | None, nested: _NestedCodes | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        entropy_config = self.entropy_config
        entropies = self._entropies if nested is None else partial(self._nested_entropies, nested)
        per_sample_entropy, codebook_entropy = entropies(u_BNC, batch_statistics)
        weight = entropy_config.weight / entropy_config.inverse_temperature
        stats = {
            "per_sample_entropy": per_sample_entropy.detach() / log(2),
            "codebook_entropy": codebook_entropy.detach() / log(2),
        }
        penalty = (weight * entropy_config.per_sample_weight) * per_sample_entropy - (
            weight * entropy_config.codebook_weight
        ) * codebook_entropy
        return penalty, stats

    def _entropies(self, u_BNC: Tensor, batch_statistics: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the per-sample entropy and the codebook entropy, in nats."""
        entropy_config = self.entropy_config
        u_NL = u_BNC.flatten(0, 1)
        per_sample_entropy, mean_L = bit_statistics(u_NL, self._steepness)
        if entropy_config.estimate == "analytical":
            return per_sample_entropy, bitwise_codebook_entropy(mean_L, entropy_config.across_workers, batch_statistics)
        return per_sample_entropy, grouped_codebook_entropy(
            self._steepness * u_NL, entropy_config.group_size, entropy_config.across_workers, batch_statistics
        )

    def _nested_entropies(
        self, nested: _NestedCodes, u_BNC: Tensor, batch_statistics: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return both entropies over the bits that each sample keeps.

        A bit's term of the codebook entropy is weighted by its share of the samples, like the per-sample entropies of
        the bit in their mean, so that the ratio of both is that without nested bits.
        """
        entropy_config = self.entropy_config
        logits_NL, weights_NL = self._nested_logits(u_BNC, nested)
        per_sample_entropy, mean_L = weighted_bit_statistics(logits_NL, weights_NL)
        if entropy_config.estimate == "analytical":
            return per_sample_entropy, bitwise_codebook_entropy(
                mean_L, entropy_config.across_workers, batch_statistics, nested.share_L
            )
        return per_sample_entropy, grouped_codebook_entropy(
            logits_NL,
            entropy_config.group_size,
            entropy_config.across_workers,
            batch_statistics,
            (weights_NL, nested.share_L),
        )

    def _nest(self, kept_bits: KeptBits) -> _NestedCodes:
        mask_B1L = kept_bits.mask()
        # In fp64 first, so that rounding to fp32 gives the codes of `dequantize`.
        scale_B = self.code_scale(kept_bits.num_kept_B.double()).to(kept_bits.share_L.dtype)
        return _NestedCodes(mask_B1L, scale_B[:, None, None] * mask_B1L, kept_bits.share_L)

    def _nested_logits(self, u_BNC: Tensor, nested: _NestedCodes) -> tuple[Tensor, Tensor]:
        """Return the logits (N, L) of all tokens, and the weights of `weighted_bit_statistics`."""
        steepness_B1L = 4 * self.entropy_config.inverse_temperature * nested.scale_B1L
        weights_B1L = nested.mask_B1L / nested.share_L.clamp_min(torch.finfo(torch.float32).tiny)
        return (steepness_B1L * u_BNC).flatten(0, 1), weights_B1L.expand_as(u_BNC).flatten(0, 1)


class _NestedCodes(NamedTuple):
    """Codes of samples that keep different numbers of bits.

    Attributes:
        mask_B1L: True for the bits that a sample keeps.
        scale_B1L: magnitude of the coordinates of a sample's code, 0 for the bits that it does not keep.
        share_L: see `KeptBits`.
    """

    mask_B1L: Tensor
    scale_B1L: Tensor
    share_L: Tensor


class _SignSTE(torch.autograd.Function):
    """Return the codes; the straight-through gradient is that of u · scale."""

    @staticmethod
    def forward(ctx: Any, u_BNC: Tensor, codes_BNC: Tensor, scale: float | Tensor) -> Tensor:
        ctx.scale = scale
        return codes_BNC

    @staticmethod
    def backward(ctx: Any, gradient_BNC: Tensor) -> tuple[Tensor, None, None]:
        return gradient_BNC * ctx.scale, None, None
