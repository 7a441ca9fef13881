"""What every quantiser is: vectors to codes with a straight-through gradient, codes to bits and back.

    v_BNC ──forward──▶ codes_BNC (gradient as if nothing was rounded), bits_BNL, penalty
    bits_BNL ──codes──▶ codes_BNC (the same values)

Shape suffixes: B batch, N tokens, C channels the encoder projects to, L bits of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Quantized(NamedTuple):
    """The result of quantising a batch. A tuple, because ZeRO-3 hooks onto tensors that it finds in tuples.

    Attributes:
        codes_BNC: what the decoder sees, fp32, with the straight-through gradient.
        bits_BNL: bool; dimension 1 is the least significant bit.
        loss: the quantiser's whole weighted penalty, fp32 scalar.
        stats: detached scalars for the log; entropies in bits.
    """

    codes_BNC: Tensor
    bits_BNL: Tensor
    loss: Tensor
    stats: dict[str, Tensor]


class Quantizer(nn.Module, ABC):
    """Base of the quantisers. All arithmetic is fp32, also under autocast.

    Attributes:
        bits: bits of a token (L).
        channels: channels the encoder must project to (C).
    """

    bits: int
    channels: int

    def forward(self, v_BNC: Tensor) -> Quantized:
        """Quantises (B, N, C) vectors of any float type."""
        with torch.autocast(v_BNC.device.type, enabled=False):
            return self.quantize(v_BNC.float())

    @abstractmethod
    def quantize(self, v_BNC: Tensor) -> Quantized:
        """`forward` without autocast, on fp32 vectors."""

    @abstractmethod
    def dequantize(self, bits_BNL: Tensor) -> Tensor:
        """The fp32 codes that these bits name: exactly the values `forward` returned with them."""


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` in the forward pass, to the last digit, and the gradient of `surrogate` in the backward pass."""
    return value.detach() + (surrogate - surrogate.detach())
