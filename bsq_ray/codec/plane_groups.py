"""Planes of groups of tiles: leading bits of tokens to payloads with checksums, and back.

    tokens (tile, token, bit) ─bits of the plane─▶ payload, CRC32

Shape suffixes: B tiles of a group, N tokens of a tile (frames slowest), L bits of a token.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bsq_ray.codec.container import Container
from bsq_ray.codec.plane_index import EncodedPlane, plane_ranges
from bsq_ray.codec.tile_groups import mismatch_message, pack_tokens, unpack_tokens

# First bit of a plane, and the bit after its last one.
BitRange = tuple[int, int]


def encode_planes(ranges: Sequence[BitRange], bits_BNL: Tensor) -> dict[BitRange, EncodedPlane]:
    """Encode planes of a group as raw bits.

    Args:
        ranges: bits of each plane; they may overlap.
        bits_BNL: bool; all tokens of the group.
    """
    planes = {}
    for start, stop in ranges:
        packed = pack_tokens(bits_BNL[..., start:stop])
        planes[start, stop] = EncodedPlane(packed, zlib.crc32(packed), 0.0, 0)
    return planes


def decode_plane_groups(
    container: Container, groups: Sequence[tuple[int, int]], check_cancelled: Callable[[], None]
) -> Iterator[tuple[int, Tensor]]:
    """Yield index in `groups` and bits (B, N, L) of each group, with the bits of all whole planes.

    Args:
        groups: index in the file and number of tiles of each group.
        check_cancelled: called before each group; an exception raised by it stops the decoding.

    Raises:
        ValueError: a payload is damaged.
    """
    planes = container.planes
    assert planes is not None
    for index, (group_index, num_tiles) in enumerate(groups):
        check_cancelled()
        parts = [
            unpack_tokens(planes.payload(plane, group_index), num_tiles, container.header.tokens_per_tile, stop - start)
            for plane, (start, stop) in enumerate(plane_ranges(planes.plane_bits))
        ]
        check_planes(container, group_index, parts)
        yield index, torch.cat(parts, -1)


def check_planes(container: Container, group_index: int, parts: Sequence[Tensor]) -> None:
    """Compare the bits of each plane of a group, (B, N, bits of the plane), with their checksums.

    Raises:
        ValueError: a checksum differs.
    """
    assert container.planes is not None
    for plane, bits_BNL in enumerate(parts):
        if not container.planes.has_tokens(plane, group_index, pack_tokens(bits_BNL)):
            raise ValueError(mismatch_message(container.header, group_index))
