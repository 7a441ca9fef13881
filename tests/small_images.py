"""Small image files with chosen depths, metadata and color profiles."""

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageCms


def encode(image, file_format, **options):
    """Return the content of an image file; `quality` is left out for lossless formats."""
    if file_format in ("TIFF", "PNG", "GIF", "BMP", "JPEG2000"):
        options.pop("quality", None)
        options.pop("subsampling", None)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def deviation(image, expected):
    """Return the largest difference of two images, in levels."""
    return np.abs(np.asarray(image, int) - np.asarray(expected, int)).max()


def gray_values(image):
    """Gray levels 0 to 255 of the image, float64 (H, W)."""
    return np.asarray(image.convert("L"), float)


def tiff(values, photometric=1):
    """Return an uncompressed TIFF of gray values as they are: integers of 16 or 32 bits, or floats."""
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    tags = {
        256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height,
        279: values.nbytes, 339: sample_format,
    }  # fmt: skip
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + values.tobytes()


def png_with_chunk(image, kind, content, after_pixels=False):
    """Return a PNG with one more chunk, before or after the pixels."""
    data = encode(image, "PNG")
    position = data.index(b"IEND" if after_pixels else b"IDAT") - 4
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:position] + chunk + data[position:]


def swapped_profile():
    """Return an sRGB profile that exchanges red and green."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"tmp1").replace(b"gXYZ", b"rXYZ").replace(b"tmp1", b"gXYZ")


def _exif(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def _entry(kind, count, value):
    return b"Exif\0\0II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, kind, count, value, 0)


# EXIF data that give no usable orientation.
BROKEN_EXIF = {
    "orientation 0": _exif(0),
    "orientation 9": _exif(9),
    "orientation 65535": _exif(65535),
    "text": b"Exif\0\0this is no EXIF",
    "empty": b"Exif\0\0",
    "truncated": _exif(6)[:-8],
    "orientation as text": _entry(2, 4, b"six\0"),
    "orientation as float": _entry(11, 1, struct.pack("<f", float("nan"))),
    "count of 4 billion": _entry(3, 0xFFFFFFFF, b"\x06\0\0\0"),
    "zero denominators": _entry(5, 1, b"\xff\xff\xff\xff"),
}


def damaged_avif(image):
    """Return an AVIF whose coded pixels are overwritten: its header is intact."""
    data = encode(image, "AVIF")
    position = data.index(b"mdat") + 4
    return data[:position] + b"\xff" * (len(data) - position)
