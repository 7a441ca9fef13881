"""Interface of the quantizers: vectors to codes with a straight-through gradient, and bits to codes.

    v_BNC ──forward──▶ codes_BNC (straight-through gradient), bits_BNL, loss
    bits_BNL ──dequantize──▶ codes_BNC (the same values)

Shape suffixes: B batch, N tokens, C channels of a vector, L bits of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Quantized(NamedTuple):
    """A quantized batch. This is a tuple because ZeRO-3 registers hooks on tensors in tuples.

    Attributes:
        codes_BNC: input of the decoder, fp32, with the straight-through gradient.
        bits_BNL: bool; index 0 of L is the least significant bit.
        loss: weighted sum of the quantizer's penalties, fp32 scalar.
        stats: detached scalars for the log; entropies in bits.
    """

    codes_BNC: Tensor
    bits_BNL: Tensor
    loss: Tensor
    stats: dict[str, Tensor]


class KeptBits(NamedTuple):
    """Nested bits in training: each sample of a part of a batch keeps a number of leading bits of its tokens.

    Attributes:
        num_kept_B: int64; number of bits that each sample keeps, 1 to L.
        share_L: fp32; fraction of the samples of the whole batch that keep each bit.
    """

    num_kept_B: Tensor
    share_L: Tensor

    def mask(self) -> Tensor:
        """Return booleans (B, 1, L): whether a sample keeps a bit."""
        bit_L = torch.arange(len(self.share_L), device=self.share_L.device)
        return bit_L < self.num_kept_B[:, None, None]


class Quantizer(nn.Module, ABC):
    """Base class of the quantizers. All arithmetic is fp32, also under autocast.

    Attributes:
        bits: bits of a token (L).
        channels: channels of a vector (C).
        is_nested: whether the decoder was trained on every prefix of the bits, so that fewer bits can be decoded.
    """

    bits: int
    channels: int
    is_nested: bool = False

    def forward(
        self, v_BNC: Tensor, batch_statistics: Tensor | None = None, kept_bits: KeptBits | None = None
    ) -> Quantized:
        """Quantize vectors (B, N, C) of any float type.

        Args:
            batch_statistics: mean of `batch_statistics` over all parts, if the vectors are a part of a batch.
            kept_bits: bits to keep of each sample; None keeps all. The result still has all bits.
        """
        with torch.autocast(v_BNC.device.type, enabled=False):
            if kept_bits is not None:
                return self.quantize_nested(v_BNC.float(), kept_bits, batch_statistics)
            if batch_statistics is None:
                return self.quantize(v_BNC.float())
            return self.quantize_part(v_BNC.float(), batch_statistics)

    def batch_statistics(self, v_BNC: Tensor, kept_bits: KeptBits | None = None) -> Tensor | None:
        """Return means over the vectors that the loss is a nonlinear function of.

        A batch in parts has the loss and the gradient of the whole batch if every part is quantized with the mean of
        the parts' statistics. None: the loss is a mean over tokens, so parts need nothing of each other.
        """
        return None

    def quantize_nested(self, v_BNC: Tensor, kept_bits: KeptBits, batch_statistics: Tensor | None) -> Quantized:
        """Quantize with fewer bits of some samples.

        Raises:
            ValueError: the quantizer has no option `keep`.
        """
        raise ValueError(f"{type(self).__name__} has no nested bits; use quantizer bsq or lfq")

    def quantize_part(self, v_BNC: Tensor, batch_statistics: Tensor) -> Quantized:
        """Quantize a part of a batch; see `forward`."""
        return self.quantize(v_BNC)

    @abstractmethod
    def quantize(self, v_BNC: Tensor) -> Quantized:
        """Quantize fp32 vectors (B, N, C); called by `forward` with autocast off."""

    @abstractmethod
    def dequantize(self, bits_BNL: Tensor) -> Tensor:
        """Return the fp32 codes (B, N, C) of bits; equal to the codes that `forward` returned with them."""


def flip_signs(codes_BNC: Tensor, flipped_BNC: Tensor) -> Tensor:
    """Negate coordinates of binary codes, as if their bits were flipped; the gradient of the codes stays the same.

    Args:
        flipped_BNC: bool, True where a bit flips.
    """
    return straight_through(torch.where(flipped_BNC, -codes_BNC, codes_BNC), codes_BNC)


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return `value` exactly in the forward pass, with the gradient of `surrogate` in the backward pass."""
    return value.detach() + (surrogate - surrogate.detach())
