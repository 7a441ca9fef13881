"""The `.bsq` file: header, index of groups of tiles, payload. docs/bsq-format.md specifies it byte by byte.

Whatever the bytes say is checked before anything is made of it, so a hostile file costs one error.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

MAGIC, VERSION = b"BSQ1", 1
RAW, PRIOR = 0, 1
_HEADER = struct.Struct("<4sBBIIHBBBB8s8s")
_ENTRY = struct.Struct("<II")
_CHECK = struct.Struct("<I")
# Four times the pixels of a 33-megapixel photograph.
MAX_PIXELS = 2**27


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        mode: RAW (bits as they are) or PRIOR.
        width, height: of the image, pixels.
        tile, patch: sides of a tile and of a token's patch, pixels.
        bits: of a token.
        group: tiles of a group in each direction.
        tolerance: the decoder's logits may differ by 2^-tolerance.
        tokenizer, prior: first 8 bytes of the models' ids; the prior's are zeros in RAW files.
    """

    mode: int
    width: int
    height: int
    tile: int
    patch: int
    bits: int
    group: int
    tolerance: int
    tokenizer: bytes
    prior: bytes

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.height // self.tile), -(-self.width // self.tile)

    @property
    def groups(self) -> list[tuple[range, range]]:
        """Rows and columns of tiles of each group, groups in raster order."""
        rows, columns = self.tiles
        return [
            (range(top, min(top + self.group, rows)), range(left, min(left + self.group, columns)))
            for top in range(0, rows, self.group)
            for left in range(0, columns, self.group)
        ]

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        side = self.tile // self.patch
        return side * side


@dataclass(frozen=True)
class Container:
    """A parsed file: the bytes of each group, None where the file was cut off before, and checksums of their tokens."""

    header: Header
    payloads: list[bytes | None]
    checks: list[int]


def write_container(header: Header, payloads: list[bytes], checks: list[int]) -> bytes:
    """The file."""
    assert len(payloads) == len(checks) == len(header.groups)
    head = _HEADER.pack(
        MAGIC, VERSION, header.mode, header.width, header.height, header.tile, header.patch, header.bits, header.group,
        header.tolerance, header.tokenizer, header.prior,
    )  # fmt: skip
    index = b"".join(_ENTRY.pack(len(data), check) for data, check in zip(payloads, checks, strict=True))
    return head + index + _CHECK.pack(zlib.crc32(head + index)) + b"".join(payloads)


def read_container(data: bytes, whole: bool = True, max_pixels: int = MAX_PIXELS) -> Container:
    """Parses a file.

    Args:
        whole: refuse a file whose payload is cut off; otherwise its missing groups are None.
        max_pixels: larger images are refused before anything is allocated.

    Raises:
        ValueError: not such a file, of a newer version, damaged, cut off, or too large.
    """
    header = read_header(data, max_pixels)
    groups = len(header.groups)
    start = _HEADER.size + groups * _ENTRY.size + _CHECK.size
    if len(data) < start:
        raise ValueError(f"the file is cut off: its index alone needs {start} bytes, there are {len(data)}")
    (check,) = _CHECK.unpack_from(data, start - _CHECK.size)
    if check != zlib.crc32(data[: start - _CHECK.size]):
        raise ValueError("the file is damaged: header and index do not match their checksum")
    payloads: list[bytes | None] = []
    checks, at = [], start
    for number in range(groups):
        size, token_check = _ENTRY.unpack_from(data, _HEADER.size + number * _ENTRY.size)
        payloads.append(data[at : at + size] if at + size <= len(data) else None)
        checks.append(token_check)
        at += size
    if len(data) > at:
        raise ValueError(f"the file is damaged: {len(data) - at} bytes follow its end")
    if whole and len(data) < at:
        raise ValueError(f"the file is cut off: {len(data)} of {at} bytes are there")
    return Container(header, payloads, checks)


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """The header alone.

    Raises:
        ValueError: as `read_container`, but for what follows the header.
    """
    if data[:4] != MAGIC:
        raise ValueError("not a .bsq file: it does not begin with BSQ1")
    if len(data) < _HEADER.size:
        raise ValueError(f"the file is cut off: it has {len(data)} bytes, the header alone has {_HEADER.size}")
    _, version, *fields = _HEADER.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"the file is of version {version} of the format; this program reads version {VERSION}")
    header = Header(*fields)
    if not header.width or not header.height or header.width * header.height > max_pixels:
        raise ValueError(
            f"the file claims {header.width} x {header.height} pixels; images of 1 to {max_pixels} pixels are read"
        )
    sound = (
        header.mode in (RAW, PRIOR)
        and header.patch
        and header.tile >= header.patch
        and header.tile % header.patch == 0
        and 1 <= header.bits <= 128
        and header.group
    )
    if not sound:
        raise ValueError("the file is damaged: its header names tiles, tokens or a mode that cannot be")
    return header
