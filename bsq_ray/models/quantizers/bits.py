"""Bits to bytes and to integers and back, in integer arithmetic only (a float sum is wrong above 24 bits).

Bit 1 of a token is the least significant one, in integers and in bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_bits(bits: Tensor) -> Tensor:
    """Booleans (…, L) to bytes (…, ceil(L / 8)); the last byte is filled with zeros."""
    length = bits.shape[-1]
    padded = F.pad(bits.to(torch.uint8), (0, -length % 8)).unflatten(-1, (-1, 8))
    return (padded << _bit_shifts(8, padded)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """Bytes (…, ceil(length / 8)) to booleans (…, length).

    Raises:
        ValueError: the number of bytes does not hold exactly `length` bits.
    """
    if packed.shape[-1] != -(-length // 8):
        raise ValueError(f"{packed.shape[-1]} bytes do not hold tokens of {length} bits; {-(-length // 8)} do")
    return (packed.unsqueeze(-1) >> _bit_shifts(8, packed) & 1).flatten(-2)[..., :length].bool()


def bits_to_integers(bits_BNL: Tensor, sub_bits: int) -> Tensor:
    """Booleans (…, L) to int64 sub-tokens (…, S) of `sub_bits` consecutive bits each.

    Raises:
        ValueError: L is not a multiple of `sub_bits`, or an integer of so many bits does not exist.
    """
    _check_sub_bits(bits_BNL.shape[-1], sub_bits)
    return (bits_BNL.unflatten(-1, (-1, sub_bits)).long() << _bit_shifts(sub_bits, bits_BNL)).sum(-1)


def integers_to_bits(integers_BNS: Tensor, sub_bits: int) -> Tensor:
    """The inverse of `bits_to_integers`: int64 (…, S) to booleans (…, S · sub_bits)."""
    _check_sub_bits(integers_BNS.shape[-1] * sub_bits, sub_bits)
    return (integers_BNS.unsqueeze(-1) >> _bit_shifts(sub_bits, integers_BNS) & 1).flatten(-2).bool()


def _bit_shifts(num_bits: int, like: Tensor) -> Tensor:
    return torch.arange(num_bits, device=like.device, dtype=torch.uint8 if like.dtype == torch.uint8 else torch.int64)


def _check_sub_bits(length: int, sub_bits: int) -> None:
    if not 1 <= sub_bits <= 62:
        raise ValueError(f"sub-tokens of {sub_bits} bits do not fit an integer; use 1 to 62")
    if length % sub_bits:
        raise ValueError(f"tokens of {length} bits cannot be cut into sub-tokens of {sub_bits} bits")
