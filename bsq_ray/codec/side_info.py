"""Side information: the places where the encoder's rounding was in doubt, and what it chose.

    count (varint) · Rice parameter (1 byte) · for each place: gap to the one before, Rice-coded, and one bit of choice

Bits are packed most significant first; the last byte is filled with zeros.
"""

from __future__ import annotations

from math import log2

import numpy as np

_LARGEST_PARAMETER = 30


def write_side(places: np.ndarray, upper: np.ndarray) -> bytes:
    """Places (ascending, int64) and choices (bool) as bytes."""
    gaps = np.diff(places, prepend=-1) - 1
    mean = float(gaps.mean()) if len(gaps) else 0.0
    parameter = min(_LARGEST_PARAMETER, max(0, round(log2(mean * 0.7 + 1e-9)))) if mean else 0
    bits: list[int] = []
    for gap, choice in zip(gaps.tolist(), upper.tolist(), strict=True):
        bits += [1] * (gap >> parameter) + [0]
        bits += [gap >> n & 1 for n in range(parameter - 1, -1, -1)]
        bits.append(int(choice))
    return write_varint(len(places)) + bytes([parameter]) + np.packbits(np.array(bits, np.uint8)).tobytes()


def read_side(data: bytes, limit: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Places, choices, and how many bytes they took.

    Args:
        limit: places are below it.

    Raises:
        ValueError: the bytes end too early or name places that do not exist.
    """
    count, start = read_varint(data, 0)
    if start >= len(data):
        raise ValueError("the side information is cut off")
    parameter = data[start]
    # Each place takes at least two bits, so a count that lies is noticed before anything is made of it.
    available = (len(data) - start - 1) * 8
    if parameter > _LARGEST_PARAMETER or count * (2 + parameter) > available or count > limit:
        raise ValueError("the side information is damaged")
    bits = np.unpackbits(np.frombuffer(data, np.uint8, offset=start + 1)).tolist()
    places, upper = np.empty(count, np.int64), np.empty(count, bool)
    at, place = 0, -1
    for n in range(count):
        try:
            end = bits.index(0, at)
        except ValueError:
            raise ValueError("the side information is cut off") from None
        low = bits[end + 1 : end + 1 + parameter]
        if end + 1 + parameter >= len(bits):
            raise ValueError("the side information is cut off")
        gap = end - at << parameter | int("".join(map(str, low)) or "0", 2)
        place += gap + 1
        if place >= limit:
            raise ValueError("the side information names a place that does not exist")
        places[n], upper[n] = place, bool(bits[end + 1 + parameter])
        at = end + 2 + parameter
    return places, upper, start + 1 + -(-at // 8)


def write_varint(value: int) -> bytes:
    """Seven bits a byte, least significant first; the highest bit says that more follow."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The value and the place behind it.

    Raises:
        ValueError: the bytes end in it, or it has more than 63 bits.
    """
    value = 0
    for n in range(9):
        if at + n >= len(data):
            raise ValueError("the side information is cut off in a number")
        value |= (data[at + n] & 127) << 7 * n
        if data[at + n] < 128:
            return value, at + n + 1
    raise ValueError("the side information is damaged: a number is too long")
