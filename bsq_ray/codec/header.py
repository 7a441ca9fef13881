"""The header of a `.bsq` file, and the properties of its models that the file does not repeat."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from bsq_ray.codec.rect import Rect
from bsq_ray.codec.varint import write_varint
from bsq_ray.media.color import ColorDescription
from bsq_ray.media.limits import MAX_PIXELS

MAGIC, VERSION = b"BSQ1", 2
CODING_RAW, CODING_PRIOR, CODING_PLANES = 0, 1, 2
# Bit of the number of planes that marks entropy coding with a prior.
_PLANES_PRIOR_FLAG = 128
# Sides of a group in tiles; the header contains the index.
GROUP_SIZES = (1, 2, 4)
# Tiles are padded, so an image one pixel high can decode to a hundred times its pixels. Callers cannot change this.
_MAX_PADDED_PIXELS = 2**28


@dataclass(frozen=True)
class TokenFormat:
    """The properties of tokens that the models of a file determine.

    Attributes:
        tile_size, patch_size: side of a tile and of a token's patch in pixels.
        bits: number of bits per token.
        tokenizer_id: id of the tokenizer, 32 bytes.
        prior_id: id of the prior, 32 bytes; empty without a prior.
    """

    tile_size: int
    patch_size: int
    bits: int
    tokenizer_id: bytes
    prior_id: bytes

    @property
    def model_key(self) -> bytes:
        """Two bytes by which a file names its models."""
        return _model_key(self.tokenizer_id, self.prior_id)

    def pack(self) -> bytes:
        """Serialize everything that checksums bind tokens to."""
        return struct.pack("<HBB", self.tile_size, self.patch_size, self.bits) + self.tokenizer_id + self.prior_id


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
        width, height: size of the image in pixels.
        coding: `CODING_RAW` (no entropy coding), `CODING_PRIOR`, or `CODING_PLANES` (nested bits, see `planes`).
        group_size: side of a group in tiles.
        model_key: see `TokenFormat`; empty in version 1.
        tokenizer, prior: first 8 bytes of the models' ids in version 1; the prior's are zero with `CODING_RAW`.
        tile_size, patch_size, bits: see `TokenFormat`; zero until the models are known.
        version: version of the format.
        clip: timing and color of a clip; None for an image.
        plane_bits: number of bits of a token in each plane, with `CODING_PLANES`.
        has_plane_prior: planes are entropy coded with a prior.
    """

    width: int
    height: int
    coding: int
    group_size: int
    model_key: bytes = b""
    tokenizer: bytes = b""
    prior: bytes = b""
    tile_size: int = 0
    patch_size: int = 0
    bits: int = 0
    version: int = VERSION
    clip: VideoHeader | None = field(default=None, kw_only=True)
    plane_bits: tuple[int, ...] = field(default=(), kw_only=True)
    has_plane_prior: bool = field(default=False, kw_only=True)

    @property
    def has_prior(self) -> bool:
        """Return whether the tokens are entropy coded with a prior."""
        return self.coding == CODING_PRIOR or self.has_plane_prior

    @property
    def tokens_per_tile(self) -> int:
        """Number of coded tokens per tile, of all frames of a group of pictures."""
        return self.gop_size * self.tokens_per_frame

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

    @property
    def num_groups(self) -> int:
        """Number of tile groups of the file."""
        return self.num_gops * self.groups_per_gop

    def iter_groups(self, tiles: Rect | None = None) -> Iterator[tuple[int, Rect]]:
        """Yield the tile groups that overlap `tiles`: index within the group of pictures, and the group's tiles."""
        all_tiles = Rect(0, 0, *self.tile_grid)
        groups_per_row = -(-all_tiles.right // self.group_size)
        for block in (tiles or all_tiles).cover(self.group_size).blocks(1):
            group_tiles = block.scale(self.group_size).intersect(all_tiles)
            yield block.top * groups_per_row + block.left, group_tiles

    def is_written_with(self, tokenizer_id: bytes, prior_id: bytes) -> bool:
        """Return whether these models, by their whole ids, wrote the file.

        Args:
            prior_id: empty without a prior.
        """
        if self.version == 1:
            return (self.tokenizer, self.prior) == (tokenizer_id[:8], prior_id[:8] or bytes(8))
        return self.model_key == _model_key(tokenizer_id, prior_id)

    @property
    def models_text(self) -> str:
        """Name of the models in error messages."""
        if self.version == 1:
            prior = f" and prior {self.prior.hex()}" if any(self.prior) else ""
            return f"tokenizer {self.tokenizer.hex()}{prior}"
        return f"the models with key {self.model_key.hex()}"

    def pack(self) -> bytes:
        """Serialize the header."""
        kind = 0 if self.clip is None else 1
        flags = VERSION | kind << 3 | self.coding << 4 | GROUP_SIZES.index(self.group_size) << 6
        packed = MAGIC + bytes([flags]) + write_varint(self.width - 1) + write_varint(self.height - 1)
        if self.clip is not None:
            rate = self.clip.frame_rate
            fields = self.clip.num_frames, self.clip.gop_size, rate.numerator, rate.denominator
            packed += b"".join(map(write_varint, fields)) + bytes(self.clip.color)
        packed += self.model_key
        if self.coding == CODING_PLANES:
            packed += bytes([len(self.plane_bits) | _PLANES_PRIOR_FLAG * self.has_plane_prior, *self.plane_bits])
        return packed


def read_planes(data: bytes, offset: int) -> tuple[tuple[int, ...], bool, int]:
    """Return the bits of each plane, whether they are coded with a prior, and the offset after them.

    Raises:
        ValueError: the data ends, or there is no plane or one without bits.
    """
    if offset >= len(data):
        raise ValueError("the file is truncated: it ends inside its header")
    count, has_prior = data[offset] & ~_PLANES_PRIOR_FLAG, bool(data[offset] & _PLANES_PRIOR_FLAG)
    plane_bits = tuple(data[offset + 1 : offset + 1 + count])
    if len(plane_bits) < count:
        raise ValueError("the file is truncated: it ends inside its header")
    if not count or min(plane_bits) < 1 or sum(plane_bits) > 128:
        raise ValueError("the file is damaged: its header has invalid planes")
    return plane_bits, has_prior, offset + 1 + count


def _model_key(tokenizer_id: bytes, prior_id: bytes) -> bytes:
    return hashlib.sha256(tokenizer_id + prior_id).digest()[:2]


def validate_header(header: Header, max_pixels: int = MAX_PIXELS) -> None:
    """Check the ranges of all fields and the memory that decoding needs.

    Raises:
        ValueError: a field is out of range, or the image or clip is too large.
    """
    if not header.width or not header.height or header.width * header.height > max_pixels:
        raise ValueError(
            f"the file claims {header.width} x {header.height} pixels; the limit is 1 to {max_pixels} pixels"
        )
    is_valid = header.coding in (CODING_RAW, CODING_PRIOR, CODING_PLANES) and 1 <= header.group_size <= GROUP_SIZES[-1]
    if header.tile_size or header.version == 1:
        is_valid = is_valid and bool(
            header.patch_size
            and header.tile_size >= header.patch_size
            and header.tile_size % header.patch_size == 0
            and 1 <= header.bits <= 128
            and sum(header.plane_bits) <= header.bits
        )
    if not is_valid:
        raise ValueError("the file is damaged: its header has invalid tiles, tokens or coding")
    if not header.tile_size:
        return
    rows, columns = header.tile_grid
    if rows * columns * header.tile_size**2 > _MAX_PADDED_PIXELS:
        raise ValueError(
            f"{header.width} x {header.height} pixels need {rows} x {columns} tiles of {header.tile_size} pixels; the "
            f"limit is {_MAX_PADDED_PIXELS} pixels in all tiles"
        )


def check_clip(clip: VideoHeader, numerator: int, denominator: int) -> None:
    """Check the fields of a clip against the frame rate as it stands in the file.

    Raises:
        ValueError: the frame rate is not in lowest terms.
    """
    if (clip.frame_rate.numerator, clip.frame_rate.denominator) != (numerator, denominator):
        raise ValueError("the file is damaged: its frame rate is not in lowest terms")
