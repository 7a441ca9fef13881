"""The `.bsq` container: header, lengths of tile groups, groups with their checksums.

docs/reference/bsq-format.md specifies the format. Every field is checked before memory is allocated for it, so a
malicious file only raises an error. Files are written in version 2; `format_v1.py` reads version 1.

Shape suffixes: G groups.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from bsq_ray.codec import format_v1
from bsq_ray.codec.header import (
    CODING_PLANES,
    GROUP_SIZES,
    MAGIC,
    VERSION,
    Header,
    TokenFormat,
    VideoHeader,
    check_clip,
    read_planes,
    validate_header,
)
from bsq_ray.codec.plane_index import PlaneIndex, read_plane_index
from bsq_ray.codec.varint import read_varint, write_varint
from bsq_ray.media.color import ColorDescription
from bsq_ray.media.limits import MAX_PIXELS
from bsq_ray.runtime.wrong_files import describe_wrong_binary

_CRC_BYTES = 4


@dataclass(frozen=True)
class Container:
    """A parsed `.bsq` file.

    Attributes:
        header: the header.
        data: the whole file.
        offsets_G: int64; byte offset of each group's payload.
        sizes_G: int64; size of each payload. The last one of version 2 ends with the file.
        binding: bytes that the checksums of tokens extend over.
        is_preview: the file may be truncated.
        index_v1: checksums of version 1; None for version 2.
        planes: positions of the planes of nested bits; None for other codings, whose groups have one payload each.
    """

    header: Header
    data: bytes
    offsets_G: np.ndarray
    sizes_G: np.ndarray
    binding: bytes
    is_preview: bool
    index_v1: np.ndarray | None = None
    planes: PlaneIndex | None = None

    @property
    def num_bits(self) -> int:
        """Number of bits per token that can be decoded: those of the planes before the end of the file."""
        return self.header.bits if self.planes is None else self.planes.num_bits

    def payload(self, group_index: int) -> bytes | None:
        """Return the payload of a group, or None if the file is truncated before its end.

        Raises:
            ValueError: the payload does not match its checksum, which only version 1 has.
        """
        start, size = int(self.offsets_G[group_index]), int(self.sizes_G[group_index])
        if size < 0 or start + size > len(self.data):
            return None
        payload = self.data[start : start + size]
        if self.index_v1 is not None and zlib.crc32(payload) != self.index_v1[group_index, 1]:
            raise ValueError(f"the file is damaged: group {group_index} does not match its checksum")
        return payload

    def has_tokens(self, group_index: int, frame: int, packed_bits: bytes) -> bool:
        """Return whether the bits of a frame of a group, packed into bytes, match their checksum."""
        if self.index_v1 is not None:
            check = format_v1.token_checksum(packed_bits, group_index, frame, self.binding)
            return check == int(self.index_v1[group_index, 2 + frame])
        gop_size, offset, size = self.header.gop_size, int(self.offsets_G[group_index]), int(self.sizes_G[group_index])
        start = offset + _CRC_BYTES * (frame - gop_size)
        check = _token_checksum(zlib.crc32(packed_bits), group_index, frame, size, self.binding)
        return self.data[start : start + _CRC_BYTES] == check.to_bytes(_CRC_BYTES, "little")

    def may_be_truncated(self, group_index: int) -> bool:
        """Return whether a preview cannot know if this group is complete: version 2 does not store its size."""
        return (
            self.is_preview and self.index_v1 is None and self.planes is None and group_index == len(self.sizes_G) - 1
        )

    @property
    def num_complete_groups(self) -> int:
        """Number of groups whose payload is complete; the end of the last group is only known by its checksum."""
        if self.planes is not None:
            return self.header.num_groups
        return int(((self.sizes_G >= 0) & (self.offsets_G + self.sizes_G <= len(self.data))).sum())


def _token_checksum(bits_crc: int, group_index: int, frame: int, payload_size: int, binding: bytes) -> int:
    position = struct.pack("<IHI", group_index, frame, payload_size)
    return zlib.crc32(binding, zlib.crc32(position, bits_crc))


def write_container(
    header: Header, token_format: TokenFormat, payloads: Sequence[bytes], bits_crcs: Sequence[Sequence[int]]
) -> bytes:
    """Serialize a `.bsq` file.

    Args:
        header: the header.
        token_format: properties of the models, to which the checksums bind the tokens.
        payloads: bytes of each group, ordered by group of pictures, then row, then column.
        bits_crcs: CRC32 of the packed bits, by group and frame.
    """
    assert len(payloads) == len(bits_crcs) == header.num_groups
    packed = header.pack()
    binding = packed + token_format.pack()
    start = packed
    if len(payloads) > 1:
        start += b"".join(write_varint(len(payload)) for payload in payloads[:-1])
        start += zlib.crc32(start).to_bytes(_CRC_BYTES, "little")
    parts = [start]
    for group_index, (payload, crcs) in enumerate(zip(payloads, bits_crcs, strict=True)):
        for frame, bits_crc in enumerate(crcs):
            check = _token_checksum(bits_crc, group_index, frame, len(payload), binding)
            parts.append(check.to_bytes(_CRC_BYTES, "little"))
        parts.append(payload)
    return b"".join(parts)


def read_container(
    data: bytes, token_format: TokenFormat, require_complete: bool = True, max_pixels: int = MAX_PIXELS
) -> Container:
    """Parse a `.bsq` file.

    Args:
        data: the whole file.
        token_format: properties of the models that decode the file.
        require_complete: reject a truncated file; if False, the payloads of missing groups are None.
        max_pixels: larger frames are rejected before memory is allocated.

    Raises:
        ValueError: the data is not a .bsq file, has an unsupported version, was written with other models, or is
            damaged, truncated or too large.
    """
    header, start = _read_header(data, max_pixels)
    _check_models(header, token_format)
    if header.version == 1:
        index_GE, offsets_G = format_v1.read_index(data, header, start, require_complete)
        return Container(header, data, offsets_G, index_GE[:, 0], data[:start], not require_complete, index_GE)
    header = replace(
        header, tile_size=token_format.tile_size, patch_size=token_format.patch_size, bits=token_format.bits
    )
    validate_header(header, max_pixels)
    binding = data[:start] + token_format.pack()
    if header.coding == CODING_PLANES:
        planes = read_plane_index(data, header, start, binding)
        none_G = np.empty(0, np.int64)
        return Container(header, data, none_G, none_G, binding, not require_complete, planes=planes)
    sizes, end = _read_sizes(data, header, start)
    check_bytes = _CRC_BYTES * header.gop_size
    starts_G = end + np.cumsum([0, *(size + check_bytes for size in sizes)], dtype=np.int64) + check_bytes
    last_size = len(data) - int(starts_G[-1])
    if require_complete and last_size < 0:
        raise ValueError(f"the file is truncated: its groups need more than {starts_G[-1]} bytes, got {len(data)}")
    sizes_G = np.array([*sizes, last_size], np.int64)
    return Container(header, data, starts_G, sizes_G, binding, not require_complete)


def _read_sizes(data: bytes, header: Header, start: int) -> tuple[list[int], int]:
    """Return the sizes of all payloads but the last, and the offset after them."""
    num_groups = header.num_groups
    if num_groups == 1:
        return [], start
    # Each size takes at least one byte, so a wrong number of groups is found before memory is allocated for it.
    if num_groups - 1 + _CRC_BYTES > len(data) - start:
        needed = start + num_groups - 1 + _CRC_BYTES
        raise ValueError(f"the file is truncated: header and index need at least {needed} bytes, got {len(data)}")
    sizes, end = [], start
    for _ in range(num_groups - 1):
        size, end = read_varint(data, end)
        sizes.append(size)
    crc = data[end : end + _CRC_BYTES]
    if len(crc) < _CRC_BYTES:
        raise ValueError(f"the file is truncated: header and index need {end + _CRC_BYTES} bytes, got {len(data)}")
    if crc != zlib.crc32(memoryview(data)[:end]).to_bytes(_CRC_BYTES, "little") or sum(sizes) >= 2**62:
        raise ValueError("the file is damaged: header and index do not match their checksum")
    return sizes, end + _CRC_BYTES


def _check_models(header: Header, token_format: TokenFormat) -> None:
    if header.has_prior and not token_format.prior_id:
        raise ValueError(f"the file was written with a prior ({header.models_text}); load the prior's model folder")
    if not header.has_prior and token_format.prior_id:
        raise ValueError("the file was written without a prior; load the tokenizer's model folder")
    if not header.is_written_with(token_format.tokenizer_id, token_format.prior_id):
        ids = f"tokenizer {token_format.tokenizer_id[:8].hex()}"
        if token_format.prior_id:
            ids += f" and prior {token_format.prior_id[:8].hex()}"
        raise ValueError(
            f"the file was written with {header.models_text}, but these are {ids} "
            f"(key {token_format.model_key.hex()}); load its models"
        )
    if header.version == 1 and (header.tile_size, header.patch_size, header.bits) != (
        token_format.tile_size, token_format.patch_size, token_format.bits
    ):  # fmt: skip
        raise ValueError("the file is damaged: its tiles, tokens or frames do not match its models")


def read_image_container(
    data: bytes, token_format: TokenFormat, require_complete: bool = True, max_pixels: int = MAX_PIXELS
) -> Container:
    """Parse an image file like `read_container`; raise ValueError for a clip."""
    container = read_container(data, token_format, require_complete, max_pixels)
    if container.header.clip is not None:
        raise ValueError(f"the file contains a clip of {container.header.num_frames} frames, not an image")
    return container


def read_video_container(
    data: bytes, token_format: TokenFormat, require_complete: bool = True, max_pixels: int = MAX_PIXELS
) -> Container:
    """Parse a clip file like `read_container`; raise ValueError for an image."""
    container = read_container(data, token_format, require_complete, max_pixels)
    if container.header.clip is None:
        raise ValueError("the file contains an image, not a clip")
    return container


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Parse only the header, without knowing the models.

    Raises:
        ValueError: the header is invalid; see `read_container`.
    """
    return _read_header(data, max_pixels)[0]


def _read_header(data: bytes, max_pixels: int) -> tuple[Header, int]:
    """Return the header and its size in bytes."""
    if data[:4] != MAGIC:
        description = describe_wrong_binary(data) or "does not start with BSQ1"
        raise ValueError(f"not a .bsq file: it {description}")
    if len(data) < 5:
        raise ValueError("the file is truncated: it ends inside its header")
    flags = data[4]
    if flags == 1:
        return format_v1.read_header(data, max_pixels)
    if flags & 7 != VERSION:
        raise ValueError(f"the file has format version {flags}; this version of bsq_ray reads versions 1 and {VERSION}")
    if flags >> 6 >= len(GROUP_SIZES):
        raise ValueError("the file is damaged: its header has invalid tiles, tokens or coding")
    width, offset = read_varint(data, 5)
    height, offset = read_varint(data, offset)
    clip = None
    if flags >> 3 & 1:
        clip, offset = _read_clip(data, offset)
    key = data[offset : offset + 2]
    if len(key) < 2:
        raise ValueError("the file is truncated: it ends inside its header")
    group_size, coding, offset = GROUP_SIZES[flags >> 6], flags >> 4 & 3, offset + 2
    plane_bits: tuple[int, ...] = ()
    has_plane_prior = False
    if coding == CODING_PLANES:
        plane_bits, has_plane_prior, offset = read_planes(data, offset)
    header = Header(
        width + 1, height + 1, coding, group_size, key, clip=clip, plane_bits=plane_bits,
        has_plane_prior=has_plane_prior,
    )  # fmt: skip
    validate_header(header, max_pixels)
    return header, offset


def _read_clip(data: bytes, offset: int) -> tuple[VideoHeader, int]:
    fields = []
    for _ in range(4):
        value, offset = read_varint(data, offset)
        fields.append(value)
    num_frames, gop_size, numerator, denominator = fields
    color = data[offset : offset + 4]
    if len(color) < 4:
        raise ValueError("the file is truncated: it ends inside its header")
    if not all(fields) or max(fields) >= 2**32 or gop_size >= 2**16:
        raise ValueError("the file is damaged: its header has an invalid number of frames, frame rate or GOP size")
    clip = VideoHeader(num_frames, gop_size, Fraction(numerator, denominator), ColorDescription(*color))
    check_clip(clip, numerator, denominator)
    return clip, offset + 4
