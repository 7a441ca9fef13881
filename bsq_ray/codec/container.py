"""The `.bsq` container: header, index of tile groups, payloads.

docs/reference/bsq-format.md specifies the format. Every field is checked before memory is allocated for it, so a
malicious file only raises an error.

Shape suffixes: G groups, E 32-bit words of an index entry.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from bsq_ray.codec.rect import Rect
from bsq_ray.media.color import ColorDescription
from bsq_ray.media.limits import MAX_PIXELS

MAGIC, VERSION = b"BSQ1", 1
KIND_IMAGE, KIND_CLIP = 0, 1
CODING_RAW, CODING_PRIOR = 0, 1
_HEADER_STRUCT = struct.Struct("<4s4BIIH3B8s8s")
_VIDEO_STRUCT = struct.Struct("<IIIH4B")
_CRC_STRUCT = struct.Struct("<I")
# Tiles are padded, so an image one pixel high can decode to a hundred times its pixels. Callers cannot change this.
_MAX_PADDED_PIXELS = 2**28
_MAX_GROUP_SIZE = 4


@dataclass(frozen=True)
class VideoHeader:
    """Timing and color of a clip.

    Attributes:
        num_frames: number of frames of the clip.
        gop_size: number of frames per group of pictures (GOP); the last GOP is padded to this size.
        frame_rate: frames per second.
        color: color space of the source; images are always sRGB.
    """

    num_frames: int
    gop_size: int
    frame_rate: Fraction
    color: ColorDescription


@dataclass(frozen=True)
class Header:
    """Header of a file.

    Attributes:
        coding: `CODING_RAW` (no entropy coding) or `CODING_PRIOR`.
        tolerance: the decoder's logits may differ from the encoder's by up to 2^-tolerance.
        width, height: size of the image in pixels.
        tile_size, patch_size: side of a tile and of a token's patch in pixels.
        bits: number of bits per token.
        group_size: side of a group in tiles.
        tokenizer, prior: first 8 bytes of the models' ids; the prior's are zero with `CODING_RAW`.
        clip: timing and color of a clip; None for an image.
    """

    coding: int
    tolerance: int
    width: int
    height: int
    tile_size: int
    patch_size: int
    bits: int
    group_size: int
    tokenizer: bytes
    prior: bytes
    clip: VideoHeader | None = field(default=None, kw_only=True)

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Number of rows and columns of tiles."""
        return -(-self.height // self.tile_size), -(-self.width // self.tile_size)

    @property
    def tokens_per_frame(self) -> int:
        """Number of tokens per frame of a tile."""
        side = self.tile_size // self.patch_size
        return side * side

    @property
    def num_frames(self) -> int:
        """Number of frames; 1 for an image."""
        return self.clip.num_frames if self.clip else 1

    @property
    def gop_size(self) -> int:
        """Number of frames per group of pictures; 1 for an image."""
        return self.clip.gop_size if self.clip else 1

    @property
    def num_gops(self) -> int:
        """Number of groups of pictures."""
        return -(-self.num_frames // self.gop_size)

    @property
    def groups_per_gop(self) -> int:
        """Number of tile groups per group of pictures."""
        rows, columns = self.tile_grid
        return -(-rows // self.group_size) * -(-columns // self.group_size)

    def iter_groups(self, tiles: Rect | None = None) -> Iterator[tuple[int, Rect]]:
        """Yield the tile groups that overlap `tiles`: index within the group of pictures, and the group's tiles."""
        all_tiles = Rect(0, 0, *self.tile_grid)
        groups_per_row = -(-all_tiles.right // self.group_size)
        for block in (tiles or all_tiles).cover(self.group_size).blocks(1):
            group_tiles = block.scale(self.group_size).intersect(all_tiles)
            yield block.top * groups_per_row + block.left, group_tiles

    def pack(self) -> bytes:
        """Serialize the header."""
        kind = KIND_CLIP if self.clip else KIND_IMAGE
        packed = _HEADER_STRUCT.pack(
            MAGIC, VERSION, kind, self.coding, self.tolerance, self.width, self.height, self.tile_size, self.patch_size,
            self.bits, self.group_size, self.tokenizer, self.prior,
        )  # fmt: skip
        if self.clip is None:
            return packed
        frame_rate = self.clip.frame_rate
        timing = (self.clip.num_frames, frame_rate.numerator, frame_rate.denominator, self.clip.gop_size)
        return packed + _VIDEO_STRUCT.pack(*timing, *self.clip.color)

    def header_bound_crc(self, token_crc: int) -> int:
        """Extend a checksum of tokens over this header, so that it does not match with any other header."""
        return zlib.crc32(self.pack(), token_crc)


@dataclass(frozen=True)
class Container:
    """A parsed `.bsq` file.

    Attributes:
        header: the header.
        data: the whole file.
        index_GE: int64; for each group the payload size, the payload checksum, and one token checksum per frame.
        offsets_G: int64; byte offset of each group's payload.
    """

    header: Header
    data: bytes
    index_GE: np.ndarray
    offsets_G: np.ndarray

    def payload(self, group_index: int) -> bytes | None:
        """Return the payload of a group, or None if the file is truncated before its end.

        Raises:
            ValueError: the payload does not match its checksum.
        """
        start, size = int(self.offsets_G[group_index]), int(self.index_GE[group_index, 0])
        if start + size > len(self.data):
            return None
        payload = self.data[start : start + size]
        if zlib.crc32(payload) != self.index_GE[group_index, 1]:
            raise ValueError(f"the file is damaged: group {group_index} does not match its checksum")
        return payload

    def token_crc(self, group_index: int, frame: int) -> int:
        """Return the checksum of the tokens of a frame of a group, bound to the header."""
        return int(self.index_GE[group_index, 2 + frame])

    @property
    def num_complete_groups(self) -> int:
        """Number of groups whose payload is complete."""
        return int((self.offsets_G + self.index_GE[:, 0] <= len(self.data)).sum())


def write_container(header: Header, payloads: list[bytes], token_crcs: list[list[int]]) -> bytes:
    """Serialize a `.bsq` file.

    Args:
        header: the header.
        payloads: bytes of each group, ordered by group of pictures, then row, then column.
        token_crcs: token checksums by group and frame, without the header.
    """
    assert len(payloads) == len(token_crcs) == header.num_gops * header.groups_per_gop
    index = b"".join(
        struct.pack(
            f"<{2 + header.gop_size}I", len(payload), zlib.crc32(payload), *map(header.header_bound_crc, frames)
        )
        for payload, frames in zip(payloads, token_crcs, strict=True)
    )
    header_and_index = header.pack() + index
    return header_and_index + _CRC_STRUCT.pack(zlib.crc32(header_and_index)) + b"".join(payloads)


def read_container(data: bytes, require_complete: bool = True, max_pixels: int = MAX_PIXELS) -> Container:
    """Parse a `.bsq` file.

    Args:
        data: the whole file.
        require_complete: reject a truncated file; if False, the payloads of missing groups are None.
        max_pixels: larger frames are rejected before memory is allocated.

    Raises:
        ValueError: the data is not a .bsq file, has an unsupported version, or is damaged, truncated or too large.
    """
    header = read_header(data, max_pixels)
    num_groups, words_per_entry, start = (
        header.num_gops * header.groups_per_gop,
        2 + header.gop_size,
        len(header.pack()),
    )
    end = start + num_groups * words_per_entry * 4
    if len(data) < end + _CRC_STRUCT.size:
        raise ValueError(
            f"the file is truncated: header and index need {end + _CRC_STRUCT.size} bytes, got {len(data)}"
        )
    (crc,) = _CRC_STRUCT.unpack_from(data, end)
    if crc != zlib.crc32(memoryview(data)[:end]):
        raise ValueError("the file is damaged: header and index do not match their checksum")
    index_GE = (
        np.frombuffer(data, "<u4", num_groups * words_per_entry, start)
        .reshape(num_groups, words_per_entry)
        .astype(np.int64)
    )
    ends_G = end + _CRC_STRUCT.size + np.cumsum(index_GE[:, 0])
    expected_size = int(ends_G[-1])
    if len(data) > expected_size:
        raise ValueError(f"the file is damaged: {len(data) - expected_size} bytes follow its end")
    if require_complete and len(data) < expected_size:
        raise ValueError(f"the file is truncated: got {len(data)} of {expected_size} bytes")
    return Container(header, data, index_GE, ends_G - index_GE[:, 0])


def read_image_container(data: bytes, require_complete: bool = True, max_pixels: int = MAX_PIXELS) -> Container:
    """Parse an image file like `read_container`; raise ValueError for a clip."""
    container = read_container(data, require_complete, max_pixels)
    if container.header.clip is not None:
        raise ValueError(f"the file contains a clip of {container.header.num_frames} frames, not an image")
    return container


def read_video_container(data: bytes, require_complete: bool = True, max_pixels: int = MAX_PIXELS) -> Container:
    """Parse a clip file like `read_container`; raise ValueError for an image."""
    container = read_container(data, require_complete, max_pixels)
    if container.header.clip is None:
        raise ValueError("the file contains an image, not a clip")
    return container


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Parse only the header.

    Raises:
        ValueError: the header is invalid; see `read_container`.
    """
    if data[:4] != MAGIC:
        raise ValueError("not a .bsq file: it does not start with BSQ1")
    if len(data) < _HEADER_STRUCT.size:
        raise ValueError(f"the file is truncated: the header needs {_HEADER_STRUCT.size} bytes, got {len(data)}")
    _, version, kind, *fields = _HEADER_STRUCT.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"the file has format version {version}; this version of bsq_ray reads version {VERSION}")
    if kind not in (KIND_IMAGE, KIND_CLIP):
        raise ValueError("the file is damaged: it is neither an image nor a clip")
    clip = None
    if kind == KIND_CLIP:
        if len(data) < _HEADER_STRUCT.size + _VIDEO_STRUCT.size:
            header_size = _HEADER_STRUCT.size + _VIDEO_STRUCT.size
            raise ValueError(f"the file is truncated: the header needs {header_size} bytes, got {len(data)}")
        frames, numerator, denominator, gop, *color = _VIDEO_STRUCT.unpack_from(data, _HEADER_STRUCT.size)
        if not (frames and numerator and denominator and gop):
            raise ValueError("the file is damaged: its header has a clip without frames or without a frame rate")
        clip = VideoHeader(frames, gop, Fraction(numerator, denominator), ColorDescription(*color))
        if (clip.frame_rate.numerator, clip.frame_rate.denominator) != (numerator, denominator):
            raise ValueError("the file is damaged: its frame rate is not in lowest terms")
    header = Header(*fields, clip=clip)
    validate_header(header, max_pixels)
    return header


def validate_header(header: Header, max_pixels: int = MAX_PIXELS) -> None:
    """Check the ranges of all fields and the memory that decoding needs.

    Raises:
        ValueError: a field is out of range, or the image or clip is too large.
    """
    if not header.width or not header.height or header.width * header.height > max_pixels:
        raise ValueError(
            f"the file claims {header.width} x {header.height} pixels; the limit is 1 to {max_pixels} pixels"
        )
    is_valid = (
        header.coding in (CODING_RAW, CODING_PRIOR)
        and header.tolerance <= 63
        and header.patch_size
        and header.tile_size >= header.patch_size
        and header.tile_size % header.patch_size == 0
        and 1 <= header.bits <= 128
        and 1 <= header.group_size <= _MAX_GROUP_SIZE
    )
    if not is_valid:
        raise ValueError("the file is damaged: its header has invalid tiles, tokens or coding")
    rows, columns = header.tile_grid
    if rows * columns * header.tile_size**2 > _MAX_PADDED_PIXELS:
        raise ValueError(
            f"{header.width} x {header.height} pixels need {rows} x {columns} tiles of {header.tile_size} pixels; the "
            f"limit is {_MAX_PADDED_PIXELS} pixels in all tiles"
        )
