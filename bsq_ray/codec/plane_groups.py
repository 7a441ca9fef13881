"""Planes of groups of tiles: leading bits of tokens to payloads with checksums, and back.

    tokens (tile, token, bit) ─bits of the plane, raw or entropy coded with the prior─▶ payload, CRC32

Shape suffixes: B tiles of a group, N tokens of a tile (frames slowest), L bits of a token.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bsq_ray.codec.bitstream import BitstreamError
from bsq_ray.codec.container import Container
from bsq_ray.codec.entropy_coding import TokenEncoder
from bsq_ray.codec.plane_decoding import decode_planes
from bsq_ray.codec.plane_index import EncodedPlane, plane_ranges
from bsq_ray.codec.side_info import SideInfoError
from bsq_ray.codec.tile_groups import max_groups_per_pass, mismatch_message, pack_tokens, unpack_tokens
from bsq_ray.models.prior import Prior

# First bit of a plane, and the bit after its last one.
BitRange = tuple[int, int]


def encode_planes(
    encoder: TokenEncoder | None, ranges: Sequence[BitRange], bits_BNL: Tensor, timings_s: dict[str, float]
) -> dict[BitRange, EncodedPlane]:
    """Encode planes of a group; without an encoder as raw bits.

    Args:
        encoder: entropy coder with a prior in the order "plane".
        ranges: bits of each plane; they may overlap.
        bits_BNL: bool; all tokens of the group.
        timings_s: elapsed seconds are added to its entries.
    """
    packed = [pack_tokens(bits_BNL[..., start:stop]) for start, stop in ranges]
    crcs = map(zlib.crc32, packed)
    if encoder is None:
        return {r: EncodedPlane(data, crc, 0.0, 0) for r, data, crc in zip(ranges, packed, crcs, strict=True)}
    return {
        r: EncodedPlane(plane.data, crc, plane.cross_entropy_bits, plane.side_info_bits)
        for r, plane, crc in zip(ranges, encoder.encode_planes(bits_BNL, ranges, timings_s), crcs, strict=True)
    }


def decode_plane_groups(
    prior: Prior | None,
    container: Container,
    groups: Sequence[tuple[int, int]],
    batch_size: int | None,
    timings_s: dict[str, float],
    check_cancelled: Callable[[], None],
) -> Iterator[tuple[int, Tensor]]:
    """Yield index in `groups` and bits (B, N, L) of each group, with the bits of all whole planes.

    Args:
        groups: index in the file and number of tiles of each group.
        check_cancelled: called between passes; an exception raised by it stops the decoding.

    Raises:
        ValueError: a payload is damaged, or this machine's logits differ from the encoder's by more than the tolerance.
    """
    planes = container.planes
    assert planes is not None
    groups_per_pass = max_groups_per_pass(prior, container.header)
    for first in range(0, len(groups), groups_per_pass):
        check_cancelled()
        part = groups[first : first + groups_per_pass]
        if prior is None:
            decoded = [_unpack_planes(container, *group) for group in part]
        else:
            payloads_PG = [
                [planes.payload(plane, group_index) for group_index, _ in part]
                for plane in range(len(planes.plane_bits))
            ]
            try:
                decoded = decode_planes(
                    prior, payloads_PG, planes.plane_bits, [num_tiles for _, num_tiles in part],
                    container.header.tokens_per_tile, batch_size, timings_s, check_cancelled,
                )  # fmt: skip
            except (BitstreamError, SideInfoError) as error:
                raise ValueError(mismatch_message(container.header, part[0][0])) from error
        for index, bits_BNL in enumerate(decoded):
            _check_planes(container, part[index][0], bits_BNL)
            yield first + index, bits_BNL


def _unpack_planes(container: Container, group_index: int, num_tiles: int) -> Tensor:
    assert container.planes is not None
    num_tokens, planes = container.header.tokens_per_tile, container.planes
    parts = [
        unpack_tokens(planes.payload(plane, group_index), num_tiles, num_tokens, num_bits)
        for plane, num_bits in enumerate(planes.plane_bits)
    ]
    return torch.cat(parts, -1)


def _check_planes(container: Container, group_index: int, bits_BNL: Tensor) -> None:
    """Compare each plane of a group with its checksum.

    Raises:
        ValueError: a checksum differs.
    """
    assert container.planes is not None
    for plane, (start, stop) in enumerate(plane_ranges(container.planes.plane_bits)):
        if not container.planes.has_tokens(plane, group_index, pack_tokens(bits_BNL[..., start:stop])):
            raise ValueError(mismatch_message(container.header, group_index))
