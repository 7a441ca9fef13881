"""Integers of variable length: seven bits per byte, least significant first; the highest bit marks a continuation."""

from __future__ import annotations


def write_varint(value: int) -> bytes:
    """Serialize an integer that is not negative."""
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
            raise ValueError(f"the file is truncated: a number at byte {offset} has no end")
        value |= (data[offset + n] & 127) << 7 * n
        if data[offset + n] < 128:
            return value, offset + n + 1
    raise ValueError("the file is damaged: a number is too long")
