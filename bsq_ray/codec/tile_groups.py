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
from bsq_ray.codec.entropy_coding import Undecodable, decode_tokens, encode_tokens
from bsq_ray.models.prior import Prior
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits

# Keys and values kept while groups are decoded together.
_CACHE_BYTES = 2**31
_GROUP = 4


@dataclass(frozen=True)
class CodedGroup:
    """A group's payload, the checksums of its frames, and what the payload consists of in bits."""

    payload: bytes
    checks: list[int]
    cross_entropy: float
    side: int


def group_size(prior: Prior | None) -> int:
    """Tiles of a group in each direction: few enough that their keys and values fit when it is decoded."""
    tiles = _GROUP
    while prior is not None and tiles > 1 and tiles * tiles * _cache_bytes(prior) > _CACHE_BYTES:
        tiles //= 2
    return tiles


def groups_at_once(prior: Prior | None, header: Header) -> int:
    """Groups that are decoded together: as many as their keys and values leave room for."""
    return 1 if prior is None else max(1, _CACHE_BYTES // (_cache_bytes(prior) * header.group**2))


def encode_group(
    prior: Prior | None,
    number: int,
    bits_BNL: Tensor,
    frames: int,
    tolerance: int,
    batch: int | None,
    seconds: dict[str, float],
) -> CodedGroup:
    """Codes the group with this number in the file."""
    checks = [_check(number, frame, part) for frame, part in enumerate(bits_BNL.chunk(frames, 1))]
    if prior is None:
        return CodedGroup(pack_bits(bits_BNL.flatten()).numpy().tobytes(), checks, 0.0, 0)
    coded = encode_tokens(prior, bits_BNL, 2.0**-tolerance, batch, seconds)
    return CodedGroup(coded.data, checks, coded.cross_entropy, coded.side)


def decode_groups(
    prior: Prior | None,
    container: Container,
    groups: Sequence[tuple[int, int]],
    frames: int,
    batch: int | None,
    seconds: dict[str, float],
    check: Callable[[], None],
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
    together = groups_at_once(prior, header)
    for start in range(0, len(groups), together):
        places = range(start, min(start + together, len(groups)))
        payloads, tiles, there = [], [], []
        for place in places:
            payload = container.payload(groups[place][0])
            if payload is not None:
                payloads.append(payload)
                tiles.append(groups[place][1])
                there.append(place)
        if not there:
            continue
        coded, wanted = (count * header.frame_tokens for count in (header.gop, frames))
        if prior is None:
            decoded = [_unpack(payloads[0], tiles[0], coded, header.bits)[:, :wanted]]
        else:
            try:
                decoded = decode_tokens(prior, payloads, tiles, coded, wanted, batch, seconds, check)
            except Undecodable as error:
                raise ValueError(_mismatch(header.tolerance)) from error
        for place, bits_BNL in zip(there, decoded, strict=True):
            _compare(container, groups[place][0], bits_BNL, frames, prior is not None)
            yield place, bits_BNL


def _compare(container: Container, number: int, bits_BNL: Tensor, frames: int, by_prior: bool) -> None:
    for frame, part in enumerate(bits_BNL.chunk(frames, 1)):
        if container.header.bind(_check(number, frame, part)) != container.check(number, frame):
            text = "the file is damaged: its tokens do not match their checksum"
            raise ValueError(_mismatch(container.header.tolerance) if by_prior else text)


def _mismatch(tolerance: int) -> str:
    return (
        "the decoded tokens do not match their checksum though the payload does: this machine's logits differ from the "
        f"encoder's by more than the 2^-{tolerance} that the file allows for, or the file was made to deceive"
    )


def _unpack(payload: bytes, tiles: int, tokens: int, bits: int) -> Tensor:
    count = tiles * tokens * bits
    if len(payload) != -(-count // 8):
        raise ValueError("the file is damaged: a group has not the length that its tokens need")
    packed = torch.from_numpy(np.frombuffer(payload, np.uint8).copy())
    return unpack_bits(packed, count).view(tiles, tokens, bits)


def _check(number: int, frame: int, bits_BNL: Tensor) -> int:
    packed = pack_bits(bits_BNL.flatten()).numpy().tobytes()
    return zlib.crc32(struct.pack("<IH", number, frame), zlib.crc32(packed))


def _cache_bytes(prior: Prior) -> int:
    """Bytes of the keys and values of one tile."""
    section = prior.config
    return 2 * 4 * section.layers * section.width * section.tokens
