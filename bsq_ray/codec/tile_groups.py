"""Groups of tiles: tokens to payloads with checksums, and back.

    tokens (tile, token, bit) ─raw, or entropy coded with the prior─▶ payload
                             └▶ checksum of each frame, bound to header and models when the file is written

Shape suffixes: B tiles of a group, N tokens of a tile (frames slowest), L bits of a token.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bsq_ray.codec.bitstream import BitstreamError, GroupBitstream, GroupBitstreamV1
from bsq_ray.codec.container import Container
from bsq_ray.codec.entropy_coding import TokenEncoder, decode_tokens
from bsq_ray.codec.header import Header
from bsq_ray.codec.side_info import SideInfoError
from bsq_ray.models.prior import Prior
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits

# Memory of the keys and values of groups decoded together.
_MAX_CACHE_BYTES = 2**31
_MAX_GROUP_SIZE = 4


@dataclass(frozen=True)
class EncodedGroup:
    """Payload of a group, CRC32 of the packed bits of each frame, and statistics in bits."""

    payload: bytes
    bits_crcs: list[int]
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
    encoder: TokenEncoder | None, bits_BNL: Tensor, num_frames: int, timings_s: dict[str, float]
) -> EncodedGroup:
    """Encode the tokens of a group; without an encoder as raw bits."""
    bits_crcs = [zlib.crc32(pack_tokens(part)) for part in bits_BNL.chunk(num_frames, 1)]
    if encoder is None:
        return EncodedGroup(pack_tokens(bits_BNL), bits_crcs, 0.0, 0)
    encoded = encoder.encode(bits_BNL, timings_s)
    return EncodedGroup(encoded.data, bits_crcs, encoded.cross_entropy_bits, encoded.side_info_bits)


def decode_groups(
    prior: Prior | None,
    container: Container,
    groups: Sequence[tuple[int, int]],
    num_frames: int,
    batch_size: int | None,
    timings_s: dict[str, float],
    check_cancelled: Callable[[], None],
) -> Iterator[tuple[int, Tensor]]:
    """Yield index in `groups` and bits (B, N, L) of each group in the file; N tokens of the first `num_frames` frames.

    Args:
        groups: index in the file and number of tiles of each group.
        num_frames: number of frames to decode.
        check_cancelled: called between passes; an exception raised by it stops the decoding.

    Raises:
        ValueError: a payload is damaged, or this machine's logits differ from the encoder's by more than the tolerance.
    """
    for indices in _passes(prior, container, groups):
        payloads, tile_counts, available = [], [], []
        for index in indices:
            payload = container.payload(groups[index][0])
            if payload is not None:
                payloads.append(payload)
                tile_counts.append(groups[index][1])
                available.append(index)
        if not available:
            continue
        num_tokens = num_frames * container.header.tokens_per_frame
        group_indices = [groups[index][0] for index in available]
        try:
            decoded = _decode_payloads(
                prior, container.header, payloads, tile_counts, num_tokens, batch_size, timings_s, check_cancelled,
                group_indices[0],
            )  # fmt: skip
            for group_index, bits_BNL in zip(group_indices, decoded, strict=True):
                for frame, part in enumerate(bits_BNL.chunk(num_frames, 1)):
                    if not container.has_tokens(group_index, frame, pack_tokens(part)):
                        raise ValueError(mismatch_message(container.header, group_index))
        except ValueError:
            if container.may_be_truncated(group_indices[0]):
                continue
            raise
        yield from zip(available, decoded, strict=True)


def _passes(prior: Prior | None, container: Container, groups: Sequence[tuple[int, int]]) -> Iterator[range]:
    """Yield indices in `groups` to decode together; a group that may be truncated is decoded alone."""
    groups_per_pass = max_groups_per_pass(prior, container.header)
    num_whole = len(groups) - (bool(groups) and container.may_be_truncated(groups[-1][0]))
    for start in range(0, num_whole, groups_per_pass):
        yield range(start, min(start + groups_per_pass, num_whole))
    if num_whole < len(groups):
        yield range(num_whole, len(groups))


def _decode_payloads(
    prior: Prior | None,
    header: Header,
    payloads: Sequence[bytes],
    tile_counts: Sequence[int],
    num_tokens: int,
    batch_size: int | None,
    timings_s: dict[str, float],
    check_cancelled: Callable[[], None],
    first_group: int,
) -> list[Tensor]:
    """Return the bits (B, N, L) of the first tokens of each group."""
    num_coded_tokens = header.gop_size * header.tokens_per_frame
    if prior is None:
        return [unpack_tokens(payloads[0], tile_counts[0], num_coded_tokens, header.bits)[:, :num_tokens]]
    bitstream_type = GroupBitstreamV1 if header.version == 1 else GroupBitstream
    try:
        return decode_tokens(
            prior, payloads, tile_counts, num_coded_tokens, num_tokens, batch_size, timings_s, check_cancelled,
            bitstream_type,
        )  # fmt: skip
    except (BitstreamError, SideInfoError) as error:
        raise ValueError(mismatch_message(header, first_group)) from error


def mismatch_message(header: Header, group_index: int) -> str:
    """Return the message of the error that a group's tokens do not match their checksum."""
    message = f"group {group_index} does not match its checksum: the file is damaged"
    if header.version > 1:
        message += " or truncated"
    if header.has_prior:
        message += ", or this machine's logits differ from the encoder's by more than the file allows"
    return message


def unpack_tokens(payload: bytes, num_tiles: int, num_tokens: int, bits: int) -> Tensor:
    """Return the bits (num_tiles, num_tokens, bits) of a payload without a prior.

    Raises:
        ValueError: the payload has another size.
    """
    num_bits = num_tiles * num_tokens * bits
    if len(payload) != -(-num_bits // 8):
        problem = "truncated" if len(payload) < -(-num_bits // 8) else "damaged"
        raise ValueError(
            f"the file is {problem}: a group has {len(payload)} bytes, its tokens need {-(-num_bits // 8)}"
        )
    packed = torch.from_numpy(np.frombuffer(payload, np.uint8).copy())
    return unpack_bits(packed, num_bits).view(num_tiles, num_tokens, bits)


def pack_tokens(bits: Tensor) -> bytes:
    """Pack bits of any shape into bytes; the last byte is padded with zeros."""
    packed: bytes = pack_bits(bits.flatten()).numpy().tobytes()
    return packed


def _cache_bytes_per_tile(prior: Prior) -> int:
    """Return the bytes of the keys and values of one tile."""
    model_config = prior.config
    return 2 * 4 * model_config.layers * model_config.width * model_config.sequence_length
