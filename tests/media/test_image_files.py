"""Image files with metadata of any size, damaged metadata, and files that are no images.

Add a case: a row of `IGNORED_CHUNKS` (type and content of a PNG chunk), `UNKNOWN_FILES` (content, reason) or
`UNREADABLE_FILES` (function that makes the file, message).
"""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from small_images import deviation, encode, gray_values, png_with_chunk, swapped_profile, tiff

from bsq_ray.media import png_metadata
from bsq_ray.media.decode_error import DecodeError, UnknownFormatError
from bsq_ray.media.images import decode_image


@pytest.fixture(scope="module")
def small(photos):
    """Photo of 48 x 32 pixels."""
    return photos[0].resize((48, 32))


# --- metadata of PNG files


def text_chunk(kind, keyword, text):
    compressed = zlib.compress(text)
    content = {b"tEXt": b"\0" + text, b"zTXt": b"\0\0" + compressed, b"iTXt": b"\0\1\0\0\0" + compressed}[kind]
    return kind, keyword + content


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
@pytest.mark.parametrize("after_pixels", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("keyword", [b"workflow", b"XML:com.adobe.xmp"])
def test_decode_image_png_with_large_text_is_read(small, kind, after_pixels, keyword):
    """Large texts, as image generators write them, do not make a file unreadable."""
    chunk = text_chunk(kind, keyword, b"{prompt} " * 350_000)
    assert deviation(decode_image(png_with_chunk(small, *chunk, after_pixels)), small) == 0


def damaged_chunk(image, kind, content):
    """Return a PNG with one more chunk, whose checksum is wrong."""
    data = png_with_chunk(image, kind, content)
    end = data.index(kind) + 4 + len(content)
    return data[:end] + b"\0\0\0\0" + data[end + 4 :]


# Ancillary chunks whose damage does not change the pixels: type and content.
IGNORED_CHUNKS = {
    "resolution": (b"pHYs", struct.pack(">IIB", 3780, 3780, 1)),
    "time": (b"tIME", bytes(7)),
    "gamma": (b"gAMA", struct.pack(">I", 45455)),
    "private": (b"prVt", b"of some program"),
    "orientation": (b"eXIf", b"II*\0" + bytes(20)),
    "text": (b"tEXt", b"a\0b"),
    "orientation as text": (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0tiff:Orientation="3"'),
}


@pytest.mark.parametrize(("kind", "content"), IGNORED_CHUNKS.values(), ids=IGNORED_CHUNKS)
def test_decode_image_png_with_damaged_metadata_is_read(small, kind, content):
    """Chunks with a wrong checksum, or too short, do not make the pixels unreadable."""
    assert deviation(decode_image(damaged_chunk(small, kind, content)), small) == 0
    assert deviation(decode_image(png_with_chunk(small, kind, b"")), small) == 0


def test_decode_image_png_with_large_profile_is_converted(small):
    """A profile above Pillow's limit of 1 MB is read."""
    profile = swapped_profile()
    profile = struct.pack(">I", len(profile) + 2**21) + profile[4:] + bytes(2**21)
    stored = Image.merge("RGB", [small.getchannel(channel) for channel in "GRB"])
    data = png_with_chunk(stored, b"iCCP", b"large\0\0" + zlib.compress(profile))
    assert deviation(decode_image(data), small) <= 3


def test_separate_metadata_uses_the_first_valid_profile(small):
    """Further profiles, which a file should not have, are not decompressed."""
    data = encode(small, "PNG")
    for content in (b"second\0\0" + zlib.compress(b"second"), b"first\0\0" + zlib.compress(b"first"), b"damaged\0\0x"):
        chunk = struct.pack(">I", len(content)) + b"iCCP" + content + struct.pack(">I", zlib.crc32(b"iCCP" + content))
        data = data[:33] + chunk + data[33:]
    assert png_metadata.separate_metadata(data)[1] == b"first"


@pytest.mark.parametrize("kind", [b"prVt", b"tEXt"])
def test_separate_metadata_does_not_copy_large_chunks(small, kind):
    data = png_with_chunk(small, kind, b"x\0" + bytes(2**24))
    tracemalloc.start()
    png_metadata.separate_metadata(data)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**20


def test_decode_image_png_text_with_orientation_is_applied(small):
    """XMP in a text chunk contains the orientation."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="3"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    assert deviation(decode_image(encode(small, "PNG", pnginfo=info)), small.rotate(180)) == 0


# --- files that cannot be read


UNKNOWN_FILES = {
    "empty": (b"", ": it is empty"),
    "text": (b"this is text", ": it is a text: this is text"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", ""),
    "one byte of a PPM": (b"P", ""),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
        ": it is a Git LFS pointer",
    ),
    "web page": (b"<!DOCTYPE html><html>" + b"x" * 900, ": it is a web page"),
    "HEIC": (b"\0\0\0\x1cftypheic" + bytes(40), "$"),
    "HEIC, general brand": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40), "$"),
    "HEIC, several images": (b"\0\0\0\x18ftypmsf1\0\0\0\0mif1heic" + b"avif" * 9, "$"),
    "text that starts as Pillow's own format": (b"Python is a language", ": it is a text: Python is"),
    "text that starts as a map of floats": (b"Pfoo", ": it is a text: Pfoo"),
}


@pytest.mark.parametrize(("data", "reason"), UNKNOWN_FILES.values(), ids=UNKNOWN_FILES)
def test_decode_image_unknown_data_raises(data, reason):
    """Data of no format that is read raise an error; PostScript would start a program."""
    with pytest.raises(UnknownFormatError, match=f"not an image of a known format{reason}"):
        decode_image(data)


# Files of a known format that Pillow does not open, and a part of the message.
UNREADABLE_FILES = {
    "PNG, damaged color key": (lambda image: damaged_chunk(image, b"tRNS", bytes(6)), "PNG.*bad header checksum"),
    "PNG, signature only": (lambda image: encode(image, "PNG")[:8], "PNG file is damaged.*header is missing"),
    "JPEG, three bytes": (lambda image: encode(image, "JPEG")[:3], "JPEG file is damaged"),
    "GIF, six bytes": (lambda image: encode(image, "GIF")[:6], "GIF.*a part of its header is missing"),
    "AVIF, header only": (lambda image: encode(image, "AVIF")[:60], "AVIF file is damaged"),
    "AVIF, general brand": (lambda image: b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif" + bytes(40), "AVIF file is damaged"),
    "PPM, magic number": (lambda image: b"P6\n", "EOF while reading header"),
    "TIFF of 64-bit floats": (lambda image: tiff(gray_values(image)), "TIFF.*not read: unknown pixel mode"),
    "TIFF of 16-bit floats": (lambda image: tiff(gray_values(image).astype(np.float16)), "unknown pixel mode"),
    "JPEG of 12 bits": (lambda image: with_precision(encode(image, "JPEG"), 12), "JPEG.*cannot handle 12-bit"),
}


@pytest.mark.parametrize(("make_file", "message"), UNREADABLE_FILES.values(), ids=UNREADABLE_FILES)
def test_decode_image_unreadable_file_names_format(small, make_file, message):
    """A file of a known format is never one of an unknown format."""
    with pytest.raises(DecodeError, match=message) as raised:
        decode_image(make_file(small))
    assert not isinstance(raised.value, UnknownFormatError)


def with_precision(jpeg, bits):
    """Return a JPEG with another number of bits in its frame header."""
    position = jpeg.index(b"\xff\xc0") + 4
    return jpeg[:position] + bytes([bits]) + jpeg[position + 1 :]
