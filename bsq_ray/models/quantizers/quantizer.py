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


class Quantizer(nn.Module, ABC):
    """Base class of the quantizers. All arithmetic is fp32, also under autocast.

    Attributes:
        bits: bits of a token (L).
        channels: channels of a vector (C).
    """

    bits: int
    channels: int

    def forward(self, v_BNC: Tensor, batch_statistics: Tensor | None = None) -> Quantized:
        """Quantize vectors (B, N, C) of any float type.

        Args:
            batch_statistics: mean of `batch_statistics` over all parts, if the vectors are a part of a batch.
        """
        with torch.autocast(v_BNC.device.type, enabled=False):
            if batch_statistics is None:
                return self.quantize(v_BNC.float())
            return self.quantize_part(v_BNC.float(), batch_statistics)

    def batch_statistics(self, v_BNC: Tensor) -> Tensor | None:
        """Return means over the vectors that the loss is a nonlinear function of.

        A batch in parts has the loss and the gradient of the whole batch if every part is quantized with the mean of
        the parts' statistics. None: the loss is a mean over tokens, so parts need nothing of each other.
        """
        return None

    def quantize_part(self, v_BNC: Tensor, batch_statistics: Tensor) -> Quantized:
        """Quantize a part of a batch; see `forward`."""
        return self.quantize(v_BNC)

    @abstractmethod
    def quantize(self, v_BNC: Tensor) -> Quantized:
        """Quantize fp32 vectors (B, N, C); called by `forward` with autocast off."""

    @abstractmethod
    def dequantize(self, bits_BNL: Tensor) -> Tensor:
        """Return the fp32 codes (B, N, C) of bits; equal to the codes that `forward` returned with them."""


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return `value` exactly in the forward pass, with the gradient of `surrogate` in the backward pass."""
    return value.detach() + (surrogate - surrogate.detach())
