"""Planes of nested bits in a `.bsq` file: leading bits of all tokens first, so that every beginning can be decoded.

    header │ sizes, CRC32 │ plane 0: group 0, group 1, … │ plane 1: group 0, group 1, … │ …

A plane contains some consecutive bits of every token. A file that ends early decodes to the planes before its end.

Shape suffixes: P planes, G groups.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from bsq_ray.codec.header import Header, TokenFormat
from bsq_ray.codec.varint import read_varint, write_varint

_CRC_BYTES = 4


@dataclass(frozen=True)
class EncodedPlane:
    """Payload of a plane of a group, the CRC32 of its packed bits, and statistics in bits."""

    payload: bytes
    bits_crc: int
    cross_entropy_bits: float
    side_info_bits: int


@dataclass(frozen=True)
class PlaneIndex:
    """Positions of the planes that a file contains as a whole.

    Attributes:
        data: the whole file.
        plane_bits: bits of a token in each whole plane.
        offsets_PG: int64; byte offset of the payload of each group in each whole plane.
        sizes_PG: int64; size of each payload.
        binding: bytes that the checksums of tokens extend over.
    """

    data: bytes
    plane_bits: tuple[int, ...]
    offsets_PG: np.ndarray
    sizes_PG: np.ndarray
    binding: bytes

    @property
    def num_bits(self) -> int:
        """Number of bits of a token in all whole planes."""
        return sum(self.plane_bits)

    @property
    def ends(self) -> list[int]:
        """Byte offset of the end of each whole plane."""
        return [int(end) for end in self.offsets_PG[:, -1] + self.sizes_PG[:, -1]]

    def payload(self, plane: int, group_index: int) -> bytes:
        """Return the payload of a group in a plane."""
        start = int(self.offsets_PG[plane, group_index])
        return self.data[start : start + int(self.sizes_PG[plane, group_index])]

    def has_tokens(self, plane: int, group_index: int, packed_bits: bytes) -> bool:
        """Return whether the bits of a plane of a group, packed into bytes, match their checksum."""
        start, size = int(self.offsets_PG[plane, group_index]), int(self.sizes_PG[plane, group_index])
        check = _plane_checksum(zlib.crc32(packed_bits), group_index, plane, size, self.binding)
        return self.data[start - _CRC_BYTES : start] == check


def plane_ranges(plane_bits: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first bit of each plane, and the bit after its last one."""
    stops = list(accumulate(plane_bits))
    return list(zip([0, *stops], stops, strict=False))


def write_planes(header: Header, token_format: TokenFormat, planes_PG: Sequence[Sequence[EncodedPlane]]) -> bytes:
    """Serialize a `.bsq` file with planes.

    Args:
        header: the header, with the bits of each plane.
        token_format: properties of the models, to which the checksums bind the tokens.
        planes_PG: planes of all groups, ordered by group of pictures, then row, then column.
    """
    assert len(planes_PG) == len(header.plane_bits)
    packed = header.pack()
    binding = packed + token_format.pack()
    start = packed + b"".join(write_varint(len(plane.payload)) for planes_G in planes_PG for plane in planes_G)
    parts = [start, zlib.crc32(start).to_bytes(_CRC_BYTES, "little")]
    for number, planes_G in enumerate(planes_PG):
        assert len(planes_G) == header.num_groups
        for group_index, plane in enumerate(planes_G):
            parts += [_plane_checksum(plane.bits_crc, group_index, number, len(plane.payload), binding), plane.payload]
    return b"".join(parts)


def read_plane_index(data: bytes, header: Header, start: int, binding: bytes) -> PlaneIndex:
    """Parse the sizes that follow the header at `start`, and find the planes before the end of the data.

    Raises:
        ValueError: the data ends before the end of its first plane, has bytes after its last plane, or is damaged.
    """
    num_planes, num_groups = len(header.plane_bits), header.num_groups
    num_sizes = num_planes * num_groups
    # Each size takes at least one byte, so a wrong number of groups is found before memory is allocated for it.
    if num_sizes + _CRC_BYTES > len(data) - start:
        needed = start + num_sizes + _CRC_BYTES
        raise ValueError(f"the file is truncated: header and index need at least {needed} bytes, got {len(data)}")
    sizes, end = [], start
    for _ in range(num_sizes):
        size, end = read_varint(data, end)
        sizes.append(size)
    check = data[end : end + _CRC_BYTES]
    if len(check) < _CRC_BYTES:
        raise ValueError(f"the file is truncated: header and index need {end + _CRC_BYTES} bytes, got {len(data)}")
    if check != zlib.crc32(memoryview(data)[:end]).to_bytes(_CRC_BYTES, "little") or sum(sizes) >= 2**62:
        raise ValueError("the file is damaged: header and index do not match their checksum")
    sizes_PG = np.array(sizes, np.int64).reshape(num_planes, num_groups)
    ends_PG = end + _CRC_BYTES + np.cumsum(sizes_PG + _CRC_BYTES).reshape(num_planes, num_groups)
    if ends_PG[-1, -1] < len(data):
        raise ValueError(f"the file is damaged: it has {len(data) - ends_PG[-1, -1]} bytes after its last plane")
    num_whole = int((ends_PG[:, -1] <= len(data)).sum())
    if not num_whole:
        raise ValueError(
            f"the file is truncated: its first {header.plane_bits[0]} bits per token need {ends_PG[0, -1]} bytes, got "
            f"{len(data)}"
        )
    whole = slice(num_whole)
    return PlaneIndex(data, header.plane_bits[whole], (ends_PG - sizes_PG)[whole], sizes_PG[whole], binding)


def _plane_checksum(bits_crc: int, group_index: int, plane: int, payload_size: int, binding: bytes) -> bytes:
    position = struct.pack("<IHI", group_index, plane, payload_size)
    return zlib.crc32(binding, zlib.crc32(position, bits_crc)).to_bytes(_CRC_BYTES, "little")
