"""Conversion of bits to bytes and integers.

All arithmetic is on integers, because a float32 sum is inexact above 24 bits. The first bit of a token is the least
significant one, in integers and in bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans (…, L) into bytes (…, ceil(L / 8)); the last byte is padded with zeros."""
    length = bits.shape[-1]
    padded = F.pad(bits.to(torch.uint8), (0, -length % 8)).unflatten(-1, (-1, 8))
    return (padded << _bit_shifts(8, padded)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """Unpack bytes (…, ceil(length / 8)) to booleans (…, length).

    Raises:
        ValueError: the number of bytes is not ceil(length / 8).
    """
    if packed.shape[-1] != -(-length // 8):
        raise ValueError(
            f"{packed.shape[-1]} bytes cannot contain tokens of {length} bits; expected {-(-length // 8)} bytes"
        )
    return (packed.unsqueeze(-1) >> _bit_shifts(8, packed) & 1).flatten(-2)[..., :length].bool()


def bits_to_integers(bits_BNL: Tensor, sub_bits: int) -> Tensor:
    """Convert booleans (…, L) to int64 sub-tokens (…, S), each of `sub_bits` consecutive bits.

    Raises:
        ValueError: L is not a multiple of `sub_bits`, or `sub_bits` is not in 1 to 62.
    """
    _check_sub_bits(bits_BNL.shape[-1], sub_bits)
    return (bits_BNL.unflatten(-1, (-1, sub_bits)).long() << _bit_shifts(sub_bits, bits_BNL)).sum(-1)


def integers_to_bits(integers_BNS: Tensor, sub_bits: int) -> Tensor:
    """Invert `bits_to_integers`: int64 (…, S) to booleans (…, S * sub_bits).

    Raises:
        ValueError: `sub_bits` is not in 1 to 62.
    """
    _check_sub_bits(integers_BNS.shape[-1] * sub_bits, sub_bits)
    return (integers_BNS.unsqueeze(-1) >> _bit_shifts(sub_bits, integers_BNS) & 1).flatten(-2).bool()


def _bit_shifts(num_bits: int, like: Tensor) -> Tensor:
    return torch.arange(num_bits, device=like.device, dtype=torch.uint8 if like.dtype == torch.uint8 else torch.int64)


def _check_sub_bits(length: int, sub_bits: int) -> None:
    if not 1 <= sub_bits <= 62:
        raise ValueError(f"sub-tokens of {sub_bits} bits do not fit into an int64; use 1 to 62")
    if length % sub_bits:
        raise ValueError(f"tokens of {length} bits cannot be split into sub-tokens of {sub_bits} bits")
