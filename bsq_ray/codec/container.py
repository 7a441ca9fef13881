"""The `.bsq` file: header, index of groups of tiles, payloads. docs/bsq-format.md specifies it byte by byte.

Whatever the bytes say is checked before anything is made of it, so a hostile file costs one error.

Shape suffixes: G groups, E 32-bit words of an index entry.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from bsq_ray.media.color import Color
from bsq_ray.media.limits import MAX_PIXELS

MAGIC, VERSION = b"BSQ1", 1
KIND_IMAGE, KIND_CLIP = 0, 1
CODING_RAW, CODING_PRIOR = 0, 1
_HEADER_STRUCT = struct.Struct("<4s4BIIH3B8s8s")
_VIDEO_STRUCT = struct.Struct("<IIIH4B")
_CRC_STRUCT = struct.Struct("<I")
# Tiles are padded: an image one pixel high may be a hundred times larger inside. No more than this, whatever is asked.
_MAX_PADDED_PIXELS = 2**28
_MAX_GROUP_SIZE = 4


@dataclass(frozen=True)
class VideoHeader:
    """What a file says of time.

    Attributes:
        frames: of the clip.
        gop: frames that are coded together (group of pictures); the last one is padded to as many.
        rate: frames per second.
        colour: of the source; an image's is always sRGB.
    """

    num_frames: int
    gop_size: int
    frame_rate: Fraction
    color: Color


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        coding: RAW (bits as they are) or PRIOR.
        tolerance: the decoder's logits may differ by 2^-tolerance.
        width, height: of the image, pixels.
        tile, patch: sides of a tile and of a token's patch, pixels.
        bits: of a token.
        group: tiles of a group in each direction.
        tokenizer, prior: first 8 bytes of the models' ids; the prior's are zeros in RAW files.
        clip: None for an image.
    """

    coding: int
    tolerance: int
    width: int
    height: int
    tile: int
    patch: int
    bits: int
    group: int
    tokenizer: bytes
    prior: bytes
    clip: VideoHeader | None = field(default=None, kw_only=True)

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.height // self.tile), -(-self.width // self.tile)

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one frame of a tile."""
        side = self.tile // self.patch
        return side * side

    @property
    def num_frames(self) -> int:
        """Frames; 1 for an image."""
        return self.clip.num_frames if self.clip else 1

    @property
    def gop_size(self) -> int:
        """Frames coded together; 1 for an image."""
        return self.clip.gop_size if self.clip else 1

    @property
    def num_gops(self) -> int:
        """Groups of pictures."""
        return -(-self.num_frames // self.gop_size)

    @property
    def groups_per_gop(self) -> int:
        """Groups of tiles of one group of pictures."""
        rows, columns = self.tile_grid
        return -(-rows // self.group) * -(-columns // self.group)

    def iter_groups(
        self, rows: range | None = None, columns: range | None = None
    ) -> Iterator[tuple[int, range, range]]:
        """Number in its group of pictures, rows and columns of tiles of each group that touches these tiles."""
        tile_rows, tile_columns = self.tile_grid
        rows, columns = rows or range(tile_rows), columns or range(tile_columns)
        groups_across = -(-tile_columns // self.group)
        for group_row in range(rows.start // self.group, -(-rows.stop // self.group)):
            for group_column in range(columns.start // self.group, -(-columns.stop // self.group)):
                top, left = group_row * self.group, group_column * self.group
                yield (
                    group_row * groups_across + group_column,
                    range(top, min(top + self.group, tile_rows)),
                    range(left, min(left + self.group, tile_columns)),
                )

    def pack(self) -> bytes:
        """The header's bytes."""
        kind = KIND_CLIP if self.clip else KIND_IMAGE
        packed = _HEADER_STRUCT.pack(
            MAGIC, VERSION, kind, self.coding, self.tolerance, self.width, self.height, self.tile, self.patch,
            self.bits, self.group, self.tokenizer, self.prior,
        )  # fmt: skip
        if self.clip is None:
            return packed
        frame_rate = self.clip.frame_rate
        timing = (self.clip.num_frames, frame_rate.numerator, frame_rate.denominator, self.clip.gop_size)
        return packed + _VIDEO_STRUCT.pack(*timing, *self.clip.color)

    def header_bound_crc(self, token_crc: int) -> int:
        """Ties the checksum of tokens to this header: under another one the same tokens do not pass."""
        return zlib.crc32(self.pack(), token_crc)


@dataclass(frozen=True)
class Container:
    """A parsed file; `index_GE` holds size, payload checksum and the frames' token checksums of each group."""

    header: Header
    data: bytes
    index_GE: np.ndarray
    offsets_G: np.ndarray

    def payload(self, group_index: int) -> bytes | None:
        """The bytes of a group, None where the file was cut off before.

        Raises:
            ValueError: they are damaged.
        """
        start, size = int(self.offsets_G[group_index]), int(self.index_GE[group_index, 0])
        if start + size > len(self.data):
            return None
        payload = self.data[start : start + size]
        if zlib.crc32(payload) != self.index_GE[group_index, 1]:
            raise ValueError(f"the file is damaged: group {group_index} does not match its checksum")
        return payload

    def token_crc(self, group_index: int, frame: int) -> int:
        """Checksum of the tokens of a frame of a group, bound to the header."""
        return int(self.index_GE[group_index, 2 + frame])

    @property
    def num_complete_groups(self) -> int:
        """Groups that are there completely."""
        return int((self.offsets_G + self.index_GE[:, 0] <= len(self.data)).sum())


def write_container(header: Header, payloads: list[bytes], token_crcs: list[list[int]]) -> bytes:
    """The file.

    Args:
        payloads: of every group, groups of pictures slowest, rows of groups before columns.
        checks: for each payload the checksum of each frame's tokens, not yet bound to the header.
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
    """Parses a file.

    Args:
        whole: refuse a file whose payload is cut off; otherwise its missing groups are None.
        max_pixels: larger frames are refused before anything is allocated.

    Raises:
        ValueError: not such a file, of a newer version, damaged, cut off, or too large.
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
            f"the file is cut off: its index alone needs {end + _CRC_STRUCT.size} bytes, there are {len(data)}"
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
        raise ValueError(f"the file is cut off: {len(data)} of {expected_size} bytes are there")
    return Container(header, data, index_GE, ends_G - index_GE[:, 0])


def read_image_container(data: bytes, require_complete: bool = True, max_pixels: int = MAX_PIXELS) -> Container:
    """As `read_container`, and refuses a clip."""
    container = read_container(data, require_complete, max_pixels)
    if container.header.clip is not None:
        raise ValueError(f"the file holds a clip of {container.header.num_frames} frames, not an image")
    return container


def read_video_container(data: bytes, require_complete: bool = True, max_pixels: int = MAX_PIXELS) -> Container:
    """As `read_container`, and refuses an image."""
    container = read_container(data, require_complete, max_pixels)
    if container.header.clip is None:
        raise ValueError("the file holds an image, not a clip")
    return container


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """The header alone.

    Raises:
        ValueError: as `read_container`, but for what follows the header.
    """
    if data[:4] != MAGIC:
        raise ValueError("not a .bsq file: it does not begin with BSQ1")
    if len(data) < _HEADER_STRUCT.size:
        raise ValueError(f"the file is cut off: it has {len(data)} bytes, the header alone has {_HEADER_STRUCT.size}")
    _, version, kind, *fields = _HEADER_STRUCT.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"the file is of version {version} of the format; this program reads version {VERSION}")
    if kind not in (KIND_IMAGE, KIND_CLIP):
        raise ValueError("the file is damaged: it is neither an image nor a clip")
    clip = None
    if kind == KIND_CLIP:
        if len(data) < _HEADER_STRUCT.size + _VIDEO_STRUCT.size:
            raise ValueError(f"the file is cut off: it has {len(data)} bytes, not even its header is whole")
        frames, numerator, denominator, gop, *color = _VIDEO_STRUCT.unpack_from(data, _HEADER_STRUCT.size)
        if not (frames and numerator and denominator and gop):
            raise ValueError("the file is damaged: its header names a clip without frames or without a rate")
        clip = VideoHeader(frames, gop, Fraction(numerator, denominator), Color(*color))
        if (clip.frame_rate.numerator, clip.frame_rate.denominator) != (numerator, denominator):
            raise ValueError("the file is damaged: its frame rate is not in lowest terms")
    header = Header(*fields, clip=clip)
    validate_header(header, max_pixels)
    return header


def validate_header(header: Header, max_pixels: int = MAX_PIXELS) -> None:
    """Refuses what cannot be, and what would take more memory than allowed.

    Raises:
        ValueError: the header is one of these.
    """
    if not header.width or not header.height or header.width * header.height > max_pixels:
        raise ValueError(
            f"the file claims {header.width} x {header.height} pixels; images of 1 to {max_pixels} pixels are read"
        )
    is_valid = (
        header.coding in (CODING_RAW, CODING_PRIOR)
        and header.tolerance <= 63
        and header.patch
        and header.tile >= header.patch
        and header.tile % header.patch == 0
        and 1 <= header.bits <= 128
        and 1 <= header.group <= _MAX_GROUP_SIZE
    )
    if not is_valid:
        raise ValueError("the file is damaged: its header names tiles, tokens or a coding that cannot be")
    rows, columns = header.tile_grid
    if rows * columns * header.tile**2 > _MAX_PADDED_PIXELS:
        raise ValueError(
            f"{header.width} x {header.height} pixels are {rows} x {columns} tiles of {header.tile} pixels; at most "
            f"{_MAX_PADDED_PIXELS} pixels in tiles are read"
        )
