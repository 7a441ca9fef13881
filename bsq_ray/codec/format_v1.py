"""Read format version 1 of `.bsq` files, which is no longer written.

docs/reference/bsq-format.md specifies the differences. Payloads of version 1 start with byte-aligned side information
and end on 32-bit words of the range coder.

Shape suffixes: G groups, E 32-bit words of an index entry.
"""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction

import numpy as np

from bsq_ray.codec.header import Header, VideoHeader, check_clip, validate_header
from bsq_ray.codec.varint import read_varint
from bsq_ray.media.color import ColorDescription

_HEADER_STRUCT = struct.Struct("<4s4BIIH3B8s8s")
_VIDEO_STRUCT = struct.Struct("<IIIH4B")
_CRC_BYTES = 4
_MAX_TOLERANCE = 63
_MAX_RICE_PARAMETER = 30


def read_header(data: bytes, max_pixels: int) -> tuple[Header, int]:
    """Parse the header; return it and its size in bytes.

    Raises:
        ValueError: the header is invalid.
    """
    if len(data) < _HEADER_STRUCT.size:
        raise ValueError(f"the file is truncated: the header needs {_HEADER_STRUCT.size} bytes, got {len(data)}")
    _, _, kind, coding, tolerance, width, height, tile, patch, bits, group_size, tokenizer, prior = (
        _HEADER_STRUCT.unpack_from(data)
    )
    if kind > 1:
        raise ValueError("the file is damaged: it is neither an image nor a clip")
    clip, size = None, _HEADER_STRUCT.size
    if kind:
        size += _VIDEO_STRUCT.size
        if len(data) < size:
            raise ValueError(f"the file is truncated: the header needs {size} bytes, got {len(data)}")
        frames, numerator, denominator, gop, *color = _VIDEO_STRUCT.unpack_from(data, _HEADER_STRUCT.size)
        if not (frames and numerator and denominator and gop):
            raise ValueError("the file is damaged: its header has an invalid number of frames, frame rate or GOP size")
        clip = VideoHeader(frames, gop, Fraction(numerator, denominator), ColorDescription(*color))
        check_clip(clip, numerator, denominator)
    header = Header(
        width, height, coding, group_size, tokenizer=tokenizer, prior=prior, tile_size=tile, patch_size=patch,
        bits=bits, version=1, clip=clip,
    )  # fmt: skip
    validate_header(header, max_pixels)
    if tolerance > _MAX_TOLERANCE:
        raise ValueError("the file is damaged: its header has invalid tiles, tokens or coding")
    return header, size


def read_index(data: bytes, header: Header, start: int, require_complete: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the index entries (G, E) of the payloads and their offsets (G,) in the file, both int64.

    An entry contains the size of the payload in bytes, its CRC32, and the checksum of the tokens of each frame.

    Raises:
        ValueError: the index is truncated or damaged.
    """
    words_per_entry = 2 + header.gop_size
    end = start + header.num_groups * words_per_entry * 4
    if len(data) < end + _CRC_BYTES:
        raise ValueError(f"the file is truncated: header and index need {end + _CRC_BYTES} bytes, got {len(data)}")
    if int.from_bytes(data[end : end + _CRC_BYTES], "little") != zlib.crc32(memoryview(data)[:end]):
        raise ValueError("the file is damaged: header and index do not match their checksum")
    index_GE = np.frombuffer(data, "<u4", header.num_groups * words_per_entry, start)
    index_GE = index_GE.reshape(header.num_groups, words_per_entry).astype(np.int64)
    ends_G = end + _CRC_BYTES + np.cumsum(index_GE[:, 0])
    expected_size = int(ends_G[-1])
    if len(data) > expected_size:
        raise ValueError(f"the file is damaged: {len(data) - expected_size} bytes follow its end")
    if require_complete and len(data) < expected_size:
        raise ValueError(f"the file is truncated: got {len(data)} of {expected_size} bytes")
    return index_GE, ends_G - index_GE[:, 0]


def token_checksum(packed_bits: bytes, group_index: int, frame: int, header_bytes: bytes) -> int:
    """Return the CRC32 of the token bits of one frame of a group, of their position in the file, and of the header."""
    position = struct.pack("<IH", group_index, frame)
    return zlib.crc32(header_bytes, zlib.crc32(position, zlib.crc32(packed_bits)))


def read_side_info(data: bytes, num_nodes: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Parse side information.

    Args:
        data: side information, followed by the coded bits.
        num_nodes: exclusive upper bound of the positions.

    Returns:
        Positions (int64), rounding directions (bool, True is up), and the number of bytes read.

    Raises:
        ValueError: the bytes end too early or contain positions out of range.
    """
    num_positions, start = read_varint(data, 0)
    if start >= len(data):
        raise ValueError("the side information is truncated")
    rice_parameter = data[start]
    # Each position takes at least two bits, so a wrong count is detected before memory is allocated.
    available = (len(data) - start - 1) * 8
    if (
        rice_parameter > _MAX_RICE_PARAMETER
        or num_positions * (2 + rice_parameter) > available
        or num_positions > num_nodes
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
        if position >= num_nodes:
            raise ValueError("the side information is damaged: it contains a position out of range")
        positions[n], round_up[n] = position, bool(bits[end + 1 + rice_parameter])
        bit_offset = end + 2 + rice_parameter
    return positions, round_up, start + 1 + -(-bit_offset // 8)
