"""Metadata of PNG files without the limits of Pillow, which make images of generators, scanners and editors unreadable.

Chunks without pixels are removed before Pillow sees them, because their damage or size would make it reject the image.
The exceptions are transparency, animation, and those that can contain the orientation. Color profiles are decompressed
here, up to a limit.
"""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
# Ancillary chunks that Pillow reads: transparency, orientation, animation.
_KEPT_CHUNKS = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
# Bit of the first letter of a type: the chunk can be ignored.
_ANCILLARY_BIT = 0x20
# Keywords of texts from which Pillow reads the orientation.
_ORIENTATION_KEYWORDS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_MAX_TEXT_BYTES = 2**18
_MAX_PROFILE_BYTES = 2**25
# Chunks that are decompressed in search of a valid profile; a file should have one.
_MAX_PROFILES = 4
# Length, type and checksum of a chunk.
_CHUNK_BYTES = 12


def separate_metadata(data: bytes) -> tuple[bytes, bytes | None]:
    """Return a PNG file without text, color profile and other metadata, and the color profile.

    Args:
        data: content of a file that starts with `SIGNATURE`; damage is left for the decoder.
    """
    kept, profile, num_profiles = [SIGNATURE], None, 0
    position = kept_from = len(SIGNATURE)
    while position + _CHUNK_BYTES <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + _CHUNK_BYTES + length
        if kind == b"iCCP" and profile is None and num_profiles < _MAX_PROFILES:
            profile = _decompress_profile(data[position + 8 : end - 4])
            num_profiles += 1
        if kind[0] & _ANCILLARY_BIT and not _is_kept(kind, data, position, end):
            kept.append(data[kept_from:position])
            kept_from = end
        position = end
    kept.append(data[kept_from:])
    return (data if len(kept) == 2 else b"".join(kept)), profile


def _is_kept(kind: bytes, data: bytes, start: int, end: int) -> bool:
    """Return True for a chunk that changes the pixels of display; a damaged orientation does not."""
    if kind in _TEXT_CHUNKS:
        # Other texts, which may be large, are not copied.
        is_orientation = data.startswith(_ORIENTATION_KEYWORDS, start + 8, end)
        return is_orientation and _can_have_orientation(kind, data[start + 8 : end - 4]) and _is_intact(data[start:end])
    return kind in _KEPT_CHUNKS and (kind != b"eXIf" or _is_intact(data[start:end]))


def _is_intact(chunk: bytes) -> bool:
    return len(chunk) >= _CHUNK_BYTES and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _can_have_orientation(kind: bytes, content: bytes) -> bool:
    keyword, _, rest = content.partition(b"\0")
    return keyword in _ORIENTATION_KEYWORDS and _text_bytes(kind, rest) < _MAX_TEXT_BYTES


def _text_bytes(kind: bytes, rest: bytes) -> int:
    """Return the size of a text, at most `_MAX_TEXT_BYTES` if it is compressed.

    Args:
        kind: type of the chunk.
        rest: its content after the keyword.
    """
    is_compressed, text = kind == b"zTXt", rest[1:]
    if kind == b"iTXt":
        # Flag and method of compression, language, translated keyword.
        is_compressed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    if not is_compressed:
        return len(text)
    try:
        return len(zlib.decompressobj().decompress(text, _MAX_TEXT_BYTES))
    except zlib.error:
        return 0


def _decompress_profile(content: bytes) -> bytes | None:
    """Return the profile in a chunk: name, zero byte, compression method 0, compressed profile."""
    _, separator, compressed = content.partition(b"\0")
    if not separator or compressed[:1] != b"\0":
        return None
    try:
        decompressor = zlib.decompressobj()
        profile = decompressor.decompress(compressed[1:], _MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    return profile if decompressor.eof else None
