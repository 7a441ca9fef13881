"""Side information: the places where the encoder's rounding was in doubt, and what it chose.

    count (varint) · Rice parameter (1 byte) · for each place: gap to the one before, Rice-coded, and one bit of choice

Bits are packed most significant first; the last byte is filled with zeros.
"""

from __future__ import annotations

from math import log2

import numpy as np

_MAX_RICE_PARAMETER = 30


def write_side_info(positions: np.ndarray, round_up: np.ndarray) -> bytes:
    """Places (ascending, int64) and choices (bool) as bytes."""
    gaps = np.diff(positions, prepend=-1) - 1
    mean = float(gaps.mean()) if len(gaps) else 0.0
    rice_parameter = min(_MAX_RICE_PARAMETER, max(0, round(log2(mean * 0.7 + 1e-9)))) if mean else 0
    bits: list[int] = []
    for gap, choice in zip(gaps.tolist(), round_up.tolist(), strict=True):
        bits += [1] * (gap >> rice_parameter) + [0]
        bits += [gap >> n & 1 for n in range(rice_parameter - 1, -1, -1)]
        bits.append(int(choice))
    return write_varint(len(positions)) + bytes([rice_parameter]) + np.packbits(np.array(bits, np.uint8)).tobytes()


def read_side_info(data: bytes, limit: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Places, choices, and how many bytes they took.

    Args:
        limit: places are below it.

    Raises:
        ValueError: the bytes end too early or name places that do not exist.
    """
    num_positions, start = read_varint(data, 0)
    if start >= len(data):
        raise ValueError("the side information is cut off")
    rice_parameter = data[start]
    # Each place takes at least two bits, so a count that lies is noticed before anything is made of it.
    available = (len(data) - start - 1) * 8
    if (
        rice_parameter > _MAX_RICE_PARAMETER
        or num_positions * (2 + rice_parameter) > available
        or num_positions > limit
    ):
        raise ValueError("the side information is damaged")
    bits = np.unpackbits(np.frombuffer(data, np.uint8, offset=start + 1)).tolist()
    positions, round_up = np.empty(num_positions, np.int64), np.empty(num_positions, bool)
    bit_offset, position = 0, -1
    for n in range(num_positions):
        try:
            end = bits.index(0, bit_offset)
        except ValueError:
            raise ValueError("the side information is cut off") from None
        remainder_bits = bits[end + 1 : end + 1 + rice_parameter]
        if end + 1 + rice_parameter >= len(bits):
            raise ValueError("the side information is cut off")
        gap = end - bit_offset << rice_parameter | int("".join(map(str, remainder_bits)) or "0", 2)
        position += gap + 1
        if position >= limit:
            raise ValueError("the side information names a place that does not exist")
        positions[n], round_up[n] = position, bool(bits[end + 1 + rice_parameter])
        bit_offset = end + 2 + rice_parameter
    return positions, round_up, start + 1 + -(-bit_offset // 8)


def write_varint(value: int) -> bytes:
    """Seven bits a byte, least significant first; the highest bit says that more follow."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """The value and the place behind it.

    Raises:
        ValueError: the bytes end in it, or it has more than 63 bits.
    """
    value = 0
    for n in range(9):
        if offset + n >= len(data):
            raise ValueError("the side information is cut off in a number")
        value |= (data[offset + n] & 127) << 7 * n
        if data[offset + n] < 128:
            return value, offset + n + 1
    raise ValueError("the side information is damaged: a number is too long")
