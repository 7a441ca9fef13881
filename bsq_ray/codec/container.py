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

from bsq_ray.media.color import Colour

MAGIC, VERSION = b"BSQ1", 1
IMAGE, CLIP = 0, 1
RAW, PRIOR = 0, 1
_HEADER = struct.Struct("<4s4BIIH3B8s8s")
_CLIP = struct.Struct("<IIIH4B")
_CHECK = struct.Struct("<I")
# Four times the pixels of a 33-megapixel photograph.
MAX_PIXELS = 2**27
# Tiles are padded: an image one pixel high may be a hundred times larger inside. No more than this, whatever is asked.
_MAX_PADDED = 2**28
_MAX_GROUP = 4


@dataclass(frozen=True)
class Clip:
    """What a file says of time.

    Attributes:
        frames: of the clip.
        gop: frames that are coded together (group of pictures); the last one is padded to as many.
        rate: frames per second.
        colour: of the source; an image's is always sRGB.
    """

    frames: int
    gop: int
    rate: Fraction
    colour: Colour


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
    clip: Clip | None = field(default=None, kw_only=True)

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.height // self.tile), -(-self.width // self.tile)

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame of a tile."""
        side = self.tile // self.patch
        return side * side

    @property
    def frames(self) -> int:
        """Frames; 1 for an image."""
        return self.clip.frames if self.clip else 1

    @property
    def gop(self) -> int:
        """Frames coded together; 1 for an image."""
        return self.clip.gop if self.clip else 1

    @property
    def gops(self) -> int:
        """Groups of pictures."""
        return -(-self.frames // self.gop)

    @property
    def gop_groups(self) -> int:
        """Groups of tiles of one group of pictures."""
        rows, columns = self.tiles
        return -(-rows // self.group) * -(-columns // self.group)

    def groups(self, rows: range | None = None, columns: range | None = None) -> Iterator[tuple[int, range, range]]:
        """Number in its group of pictures, rows and columns of tiles of each group that touches these tiles."""
        tile_rows, tile_columns = self.tiles
        rows, columns = rows or range(tile_rows), columns or range(tile_columns)
        across = -(-tile_columns // self.group)
        for down in range(rows.start // self.group, -(-rows.stop // self.group)):
            for right in range(columns.start // self.group, -(-columns.stop // self.group)):
                top, left = down * self.group, right * self.group
                yield (
                    down * across + right,
                    range(top, min(top + self.group, tile_rows)),
                    range(left, min(left + self.group, tile_columns)),
                )

    def pack(self) -> bytes:
        """The header's bytes."""
        kind = CLIP if self.clip else IMAGE
        head = _HEADER.pack(
            MAGIC, VERSION, kind, self.coding, self.tolerance, self.width, self.height, self.tile, self.patch,
            self.bits, self.group, self.tokenizer, self.prior,
        )  # fmt: skip
        if self.clip is None:
            return head
        rate = self.clip.rate
        times = (self.clip.frames, rate.numerator, rate.denominator, self.clip.gop)
        return head + _CLIP.pack(*times, *self.clip.colour)

    def bind(self, check: int) -> int:
        """Ties the checksum of tokens to this header: under another one the same tokens do not pass."""
        return zlib.crc32(self.pack(), check)


@dataclass(frozen=True)
class Container:
    """A parsed file; `index_GE` holds size, payload checksum and the frames' token checksums of each group."""

    header: Header
    data: bytes
    index_GE: np.ndarray
    starts_G: np.ndarray

    def payload(self, number: int) -> bytes | None:
        """The bytes of a group, None where the file was cut off before.

        Raises:
            ValueError: they are damaged.
        """
        start, size = int(self.starts_G[number]), int(self.index_GE[number, 0])
        if start + size > len(self.data):
            return None
        payload = self.data[start : start + size]
        if zlib.crc32(payload) != self.index_GE[number, 1]:
            raise ValueError(f"the file is damaged: group {number} does not match its checksum")
        return payload

    def check(self, number: int, frame: int) -> int:
        """Checksum of the tokens of a frame of a group, bound to the header."""
        return int(self.index_GE[number, 2 + frame])

    @property
    def whole_groups(self) -> int:
        """Groups that are there completely."""
        return int((self.starts_G + self.index_GE[:, 0] <= len(self.data)).sum())


def write_container(header: Header, payloads: list[bytes], checks: list[list[int]]) -> bytes:
    """The file.

    Args:
        payloads: of every group, groups of pictures slowest, rows of groups before columns.
        checks: for each payload the checksum of each frame's tokens, not yet bound to the header.
    """
    assert len(payloads) == len(checks) == header.gops * header.gop_groups
    index = b"".join(
        struct.pack(f"<{2 + header.gop}I", len(payload), zlib.crc32(payload), *map(header.bind, frames))
        for payload, frames in zip(payloads, checks, strict=True)
    )
    front = header.pack() + index
    return front + _CHECK.pack(zlib.crc32(front)) + b"".join(payloads)


def read_container(data: bytes, whole: bool = True, max_pixels: int = MAX_PIXELS) -> Container:
    """Parses a file.

    Args:
        whole: refuse a file whose payload is cut off; otherwise its missing groups are None.
        max_pixels: larger frames are refused before anything is allocated.

    Raises:
        ValueError: not such a file, of a newer version, damaged, cut off, or too large.
    """
    header = read_header(data, max_pixels)
    groups, words, start = header.gops * header.gop_groups, 2 + header.gop, len(header.pack())
    end = start + groups * words * 4
    if len(data) < end + _CHECK.size:
        raise ValueError(f"the file is cut off: its index alone needs {end + _CHECK.size} bytes, there are {len(data)}")
    (check,) = _CHECK.unpack_from(data, end)
    if check != zlib.crc32(memoryview(data)[:end]):
        raise ValueError("the file is damaged: header and index do not match their checksum")
    index_GE = np.frombuffer(data, "<u4", groups * words, start).reshape(groups, words).astype(np.int64)
    ends_G = end + _CHECK.size + np.cumsum(index_GE[:, 0])
    last = int(ends_G[-1])
    if len(data) > last:
        raise ValueError(f"the file is damaged: {len(data) - last} bytes follow its end")
    if whole and len(data) < last:
        raise ValueError(f"the file is cut off: {len(data)} of {last} bytes are there")
    return Container(header, data, index_GE, ends_G - index_GE[:, 0])


def read_image(data: bytes, whole: bool = True, max_pixels: int = MAX_PIXELS) -> Container:
    """As `read_container`, and refuses a clip."""
    container = read_container(data, whole, max_pixels)
    if container.header.clip is not None:
        raise ValueError(f"the file holds a clip of {container.header.frames} frames, not an image")
    return container


def read_clip(data: bytes, whole: bool = True, max_pixels: int = MAX_PIXELS) -> Container:
    """As `read_container`, and refuses an image."""
    container = read_container(data, whole, max_pixels)
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
    if len(data) < _HEADER.size:
        raise ValueError(f"the file is cut off: it has {len(data)} bytes, the header alone has {_HEADER.size}")
    _, version, kind, *fields = _HEADER.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"the file is of version {version} of the format; this program reads version {VERSION}")
    if kind not in (IMAGE, CLIP):
        raise ValueError("the file is damaged: it is neither an image nor a clip")
    clip = None
    if kind == CLIP:
        if len(data) < _HEADER.size + _CLIP.size:
            raise ValueError(f"the file is cut off: it has {len(data)} bytes, not even its header is whole")
        frames, numerator, denominator, gop, *colour = _CLIP.unpack_from(data, _HEADER.size)
        if not (frames and numerator and denominator and gop):
            raise ValueError("the file is damaged: its header names a clip without frames or without a rate")
        clip = Clip(frames, gop, Fraction(numerator, denominator), Colour(*colour))
        if (clip.rate.numerator, clip.rate.denominator) != (numerator, denominator):
            raise ValueError("the file is damaged: its frame rate is not in lowest terms")
    header = Header(*fields, clip=clip)
    check_header(header, max_pixels)
    return header


def check_header(header: Header, max_pixels: int = MAX_PIXELS) -> None:
    """Refuses what cannot be, and what would take more memory than allowed.

    Raises:
        ValueError: the header is one of these.
    """
    if not header.width or not header.height or header.width * header.height > max_pixels:
        raise ValueError(
            f"the file claims {header.width} x {header.height} pixels; images of 1 to {max_pixels} pixels are read"
        )
    sound = (
        header.coding in (RAW, PRIOR)
        and header.tolerance <= 63
        and header.patch
        and header.tile >= header.patch
        and header.tile % header.patch == 0
        and 1 <= header.bits <= 128
        and 1 <= header.group <= _MAX_GROUP
    )
    if not sound:
        raise ValueError("the file is damaged: its header names tiles, tokens or a coding that cannot be")
    rows, columns = header.tiles
    if rows * columns * header.tile**2 > _MAX_PADDED:
        raise ValueError(
            f"{header.width} x {header.height} pixels are {rows} x {columns} tiles of {header.tile} pixels; at most "
            f"{_MAX_PADDED} pixels in tiles are read"
        )
