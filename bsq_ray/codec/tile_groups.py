"""Groups of tiles: their tokens to payloads with checksums, and back.

    tokens (tile, token, bit) ─▶ as they are, or by the prior ─▶ payload
                             └▶ a checksum of each frame, bound to the header when the file is written

Shape suffixes: B tiles of a group, N tokens of a tile (frames slowest), L bits of a token.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bsq_ray.codec.container import Container, Header
from bsq_ray.codec.entropy_coding import BitstreamError, decode_tokens, encode_tokens
from bsq_ray.models.prior import Prior
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits

# Keys and values kept while groups are decoded together.
_MAX_CACHE_BYTES = 2**31
_MAX_GROUP_SIZE = 4


@dataclass(frozen=True)
class EncodedGroup:
    """A group's payload, the checksums of its frames, and what the payload consists of in bits."""

    payload: bytes
    token_crcs: list[int]
    cross_entropy_bits: float
    side_info_bits: int


def group_size(prior: Prior | None) -> int:
    """Tiles of a group in each direction: few enough that their keys and values fit when it is decoded."""
    tiles = _MAX_GROUP_SIZE
    while prior is not None and tiles > 1 and tiles * tiles * _cache_bytes_per_tile(prior) > _MAX_CACHE_BYTES:
        tiles //= 2
    return tiles


def max_groups_per_pass(prior: Prior | None, header: Header) -> int:
    """Groups that are decoded together: as many as their keys and values leave room for."""
    return 1 if prior is None else max(1, _MAX_CACHE_BYTES // (_cache_bytes_per_tile(prior) * header.group**2))


def encode_group(
    prior: Prior | None,
    group_index: int,
    bits_BNL: Tensor,
    num_frames: int,
    tolerance: int,
    batch_size: int | None,
    timings_s: dict[str, float],
) -> EncodedGroup:
    """Codes the group with this number in the file."""
    token_crcs = [_token_crc(group_index, frame, part) for frame, part in enumerate(bits_BNL.chunk(num_frames, 1))]
    if prior is None:
        return EncodedGroup(pack_bits(bits_BNL.flatten()).numpy().tobytes(), token_crcs, 0.0, 0)
    encoded = encode_tokens(prior, bits_BNL, 2.0**-tolerance, batch_size, timings_s)
    return EncodedGroup(encoded.data, token_crcs, encoded.cross_entropy_bits, encoded.side_info_bits)


def decode_groups(
    prior: Prior | None,
    container: Container,
    groups: Sequence[tuple[int, int]],
    num_frames: int,
    batch_size: int | None,
    timings_s: dict[str, float],
    check_deadline: Callable[[], None],
) -> Iterator[tuple[int, Tensor]]:
    """The tokens of groups that are there, as (place in `groups`, bits (B, N, L)); N is that of the first `frames`.

    Args:
        groups: number in the file and tiles of each.
        frames: how many of the coded frames are wanted.
        check: called between parts of the work; what it raises ends it.

    Raises:
        ValueError: a payload is damaged, or this machine's logits differ from the encoder's by more than was allowed.
    """
    header = container.header
    groups_per_pass = max_groups_per_pass(prior, header)
    for start in range(0, len(groups), groups_per_pass):
        indices = range(start, min(start + groups_per_pass, len(groups)))
        payloads, tile_counts, available = [], [], []
        for index in indices:
            payload = container.payload(groups[index][0])
            if payload is not None:
                payloads.append(payload)
                tile_counts.append(groups[index][1])
                available.append(index)
        if not available:
            continue
        num_coded_tokens, num_tokens = (count * header.tokens_per_frame for count in (header.gop_size, num_frames))
        if prior is None:
            decoded = [_unpack(payloads[0], tile_counts[0], num_coded_tokens, header.bits)[:, :num_tokens]]
        else:
            try:
                decoded = decode_tokens(
                    prior, payloads, tile_counts, num_coded_tokens, num_tokens, batch_size, timings_s, check_deadline
                )
            except BitstreamError as error:
                raise ValueError(_mismatch_message(header.tolerance)) from error
        for index, bits_BNL in zip(available, decoded, strict=True):
            _verify_token_crcs(container, groups[index][0], bits_BNL, num_frames, prior is not None)
            yield index, bits_BNL


def _verify_token_crcs(
    container: Container, group_index: int, bits_BNL: Tensor, num_frames: int, uses_prior: bool
) -> None:
    for frame, part in enumerate(bits_BNL.chunk(num_frames, 1)):
        if container.header.header_bound_crc(_token_crc(group_index, frame, part)) != container.token_crc(
            group_index, frame
        ):
            message = "the file is damaged: its tokens do not match their checksum"
            raise ValueError(_mismatch_message(container.header.tolerance) if uses_prior else message)


def _mismatch_message(tolerance: int) -> str:
    return (
        "the decoded tokens do not match their checksum though the payload does: this machine's logits differ from the "
        f"encoder's by more than the 2^-{tolerance} that the file allows for, or the file was made to deceive"
    )


def _unpack(payload: bytes, num_tiles: int, num_tokens: int, bits: int) -> Tensor:
    num_bits = num_tiles * num_tokens * bits
    if len(payload) != -(-num_bits // 8):
        raise ValueError("the file is damaged: a group has not the length that its tokens need")
    packed = torch.from_numpy(np.frombuffer(payload, np.uint8).copy())
    return unpack_bits(packed, num_bits).view(num_tiles, num_tokens, bits)


def _token_crc(group_index: int, frame: int, bits_BNL: Tensor) -> int:
    packed = pack_bits(bits_BNL.flatten()).numpy().tobytes()
    return zlib.crc32(struct.pack("<IH", group_index, frame), zlib.crc32(packed))


def _cache_bytes_per_tile(prior: Prior) -> int:
    """Bytes of the keys and values of one tile."""
    model_config = prior.config
    return 2 * 4 * model_config.layers * model_config.width * model_config.num_tokens
