"""Groups of tiles: tokens to payloads with checksums, and back.

    tokens (tile, token, bit) ─raw, or entropy coded with the prior─▶ payload
                             └▶ checksum of each frame, bound to the header when the file is written

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

# Memory of the keys and values of groups decoded together.
_MAX_CACHE_BYTES = 2**31
_MAX_GROUP_SIZE = 4


@dataclass(frozen=True)
class EncodedGroup:
    """Payload of a group, token checksum of each frame, and statistics in bits."""

    payload: bytes
    token_crcs: list[int]
    cross_entropy_bits: float
    side_info_bits: int


def group_size(prior: Prior | None) -> int:
    """Return the tiles of a group in each direction, so that its keys and values fit into memory when decoding."""
    tiles = _MAX_GROUP_SIZE
    while prior is not None and tiles > 1 and tiles * tiles * _cache_bytes_per_tile(prior) > _MAX_CACHE_BYTES:
        tiles //= 2
    return tiles


def max_groups_per_pass(prior: Prior | None, header: Header) -> int:
    """Return how many groups to decode together, limited by the memory of their keys and values."""
    return 1 if prior is None else max(1, _MAX_CACHE_BYTES // (_cache_bytes_per_tile(prior) * header.group_size**2))


def encode_group(
    prior: Prior | None,
    group_index: int,
    bits_BNL: Tensor,
    num_frames: int,
    tolerance: int,
    batch_size: int | None,
    timings_s: dict[str, float],
) -> EncodedGroup:
    """Encode the tokens of the group with this index in the file."""
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
    """Yield index in `groups` and bits (B, N, L) of each group in the file; N tokens of the first `num_frames` frames.

    Args:
        groups: index in the file and number of tiles of each group.
        num_frames: number of frames to decode.
        check_deadline: called between passes; an exception raised by it stops the decoding.

    Raises:
        ValueError: a payload is damaged, or this machine's logits differ from the encoder's by more than the tolerance.
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
        "the decoded tokens do not match their checksum, but the payload does: this machine's logits differ from the "
        f"encoder's by more than the 2^-{tolerance} that the file allows, or the file was manipulated"
    )


def _unpack(payload: bytes, num_tiles: int, num_tokens: int, bits: int) -> Tensor:
    num_bits = num_tiles * num_tokens * bits
    if len(payload) != -(-num_bits // 8):
        raise ValueError(f"the file is damaged: a group has {len(payload)} bytes, its tokens need {-(-num_bits // 8)}")
    packed = torch.from_numpy(np.frombuffer(payload, np.uint8).copy())
    return unpack_bits(packed, num_bits).view(num_tiles, num_tokens, bits)


def _token_crc(group_index: int, frame: int, bits_BNL: Tensor) -> int:
    packed = pack_bits(bits_BNL.flatten()).numpy().tobytes()
    return zlib.crc32(struct.pack("<IH", group_index, frame), zlib.crc32(packed))


def _cache_bytes_per_tile(prior: Prior) -> int:
    """Return the bytes of the keys and values of one tile."""
    model_config = prior.config
    return 2 * 4 * model_config.layers * model_config.width * model_config.num_tokens
