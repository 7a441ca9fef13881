"""Side information: the positions where the rounding of a logit is ambiguous, and the encoder's choices.

    count (varint) · Rice parameter (1 byte) · for each position: Rice-coded gap to the previous one, and one choice bit

Bits are packed most significant first; the last byte is padded with zeros.
"""

from __future__ import annotations

from math import log2

import numpy as np

_MAX_RICE_PARAMETER = 30


def write_side_info(positions: np.ndarray, round_up: np.ndarray) -> bytes:
    """Serialize positions (ascending, int64) and choices (bool)."""
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
    """Parse positions, choices, and the number of bytes read.

    Args:
        limit: exclusive upper bound of the positions.

    Raises:
        ValueError: the bytes end too early or contain positions out of range.
    """
    num_positions, start = read_varint(data, 0)
    if start >= len(data):
        raise ValueError("the side information is truncated")
    rice_parameter = data[start]
    # Each position takes at least two bits, so a wrong count is found before memory is allocated for it.
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
            raise ValueError("the side information is truncated") from None
        remainder_bits = bits[end + 1 : end + 1 + rice_parameter]
        if end + 1 + rice_parameter >= len(bits):
            raise ValueError("the side information is truncated")
        gap = end - bit_offset << rice_parameter | int("".join(map(str, remainder_bits)) or "0", 2)
        position += gap + 1
        if position >= limit:
            raise ValueError("the side information is damaged: it contains a position out of range")
        positions[n], round_up[n] = position, bool(bits[end + 1 + rice_parameter])
        bit_offset = end + 2 + rice_parameter
    return positions, round_up, start + 1 + -(-bit_offset // 8)


def write_varint(value: int) -> bytes:
    """Serialize an integer in groups of seven bits, least significant first; the highest bit marks a continuation."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """Return the value at an offset, and the offset after it.

    Raises:
        ValueError: the bytes end inside the value, or it has more than 63 bits.
    """
    value = 0
    for n in range(9):
        if offset + n >= len(data):
            raise ValueError("the side information is truncated")
        value |= (data[offset + n] & 127) << 7 * n
        if data[offset + n] < 128:
            return value, offset + n + 1
    raise ValueError("the side information is damaged: a number is too long")
