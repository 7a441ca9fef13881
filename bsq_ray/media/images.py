"""Read and write still images: the only reader, for packing, training, evaluation, codec and service.

    file ─open_image─▶ header: format, size ─load_image─▶ RGB in sRGB, 8 bits per channel, upright, opaque

- Orientation: EXIF. Broken EXIF data are ignored.
- Colors: an embedded profile is converted to sRGB, once, see `color_profiles`.
- Depth: more than 8 bits are scaled by their type, see `bit_depth`.
- Transparent parts are blended with white.
- Animations (GIF, WebP, PNG, AVIF) are rejected. In other formats the first image counts: the photo of a JPEG with
  previews (MPO), the first page of a TIFF.
- Errors: whatever a decoder raises becomes one `DecodeError`.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, UnidentifiedImageError

from bsq_ray import storage
from bsq_ray.media import png_metadata
from bsq_ray.media.bit_depth import is_deep, to_eight_bits
from bsq_ray.media.color_profiles import to_srgb_colors
from bsq_ray.media.decode_error import (
    DecodeError,
    TooLargeError,
    UnknownFormatError,
    error_text,
    translate_decode_errors,
)
from bsq_ray.media.orientation import UPRIGHT, to_upright
from bsq_ray.runtime.wrong_files import describe_wrong_binary

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif",
    ".tiff", ".avif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# Formats that Pillow decodes without external programs, by Pillow's names. JPEG includes MPO.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")

_ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
_JPEG_FORMATS = ("JPEG", "MPO")
_EXIF_ORIENTATION = 0x0112
_MAX_BRAND_BYTES = 2**10


@translate_decode_errors()
def open_image(data: bytes) -> Image.Image:
    """Open an image file without decoding its pixels; format and size are known afterwards.

    Args:
        data: content of the file.

    Raises:
        UnknownFormatError: the file has none of `IMAGE_FORMATS`.
        TooLargeError: the image has more pixels than Pillow's limit, 178 million.
        DecodeError: the file is damaged, or an animation.
    """
    profile = None
    if data.startswith(png_metadata.SIGNATURE):
        data, profile = png_metadata.separate_metadata(data)
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise _open_error(data) from None
    except Image.DecompressionBombError:
        raise TooLargeError(f"the image has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels") from None
    if image.format in _ANIMATED_FORMATS and getattr(image, "n_frames", 1) > 1:
        raise DecodeError("it is an animation; convert it to a video, such as .mkv")
    if profile is not None:
        image.info["icc_profile"] = profile
    return image


def _open_error(data: bytes) -> DecodeError:
    """Return the reason why Pillow opens a file in none of the formats."""
    for name in IMAGE_FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        is_format = False
        try:
            is_format = factory is not None and accepts is not None and accepts(data[:16]) is True
            is_format = is_format and _has_signature(data, name)
            if is_format and factory is not None:
                factory(io.BytesIO(data), "")
        except Exception as error:
            # What Pillow expects of a header that is too short is no explanation.
            is_short = isinstance(error.__cause__ or error, (struct.error, IndexError))
            reason = "a part of its header is missing" if is_short else error_text(error)
            if is_format:
                return DecodeError(f"the {name} file is damaged, or of a kind that is not read: {reason}")
    description = describe_wrong_binary(data)
    return UnknownFormatError(f"not an image of a known format{description and f': it {description}'}")


def _has_signature(data: bytes, format_name: str) -> bool:
    """Return False for files of other formats with first bytes that Pillow accepts."""
    if format_name == "AVIF":
        # HEIC files have the same box with other brands, in multiples of four bytes behind a version.
        box = data[8 : min(int.from_bytes(data[:4], "big"), _MAX_BRAND_BYTES)]
        return any(box[start : start + 4] in (b"avif", b"avis") for start in range(0, len(box), 4))
    # Texts can start with the same letters.
    return format_name != "PPM" or data[2:3].isspace()


@translate_decode_errors()
def load_image(image: Image.Image, short_side: int | None = None) -> Image.Image:
    """Decode an opened image with `to_srgb`.

    Args:
        image: as `open_image` returns it.
        short_side: size to which the caller will shrink the image. A JPEG is then decoded at a fraction of its size,
            at least twice `short_side`, so that the following resize stays antialiased.

    Raises:
        DecodeError: the file is damaged.
    """
    if short_side is not None and image.format in _JPEG_FORMATS:
        factor = 2 * short_side / min(image.size)
        image.draft("RGB", (round(image.width * factor), round(image.height * factor)))
    return to_srgb(image)


def decode_image(data: bytes, short_side: int | None = None) -> Image.Image:
    """Decode an image file; see `open_image` and `load_image`.

    Raises:
        DecodeError: the file cannot be decoded; the message is the reason.
    """
    return load_image(open_image(data), short_side)


def read_image(url: str) -> Image.Image:
    """Read and decode an image file.

    Args:
        url: path or fsspec URL.

    Raises:
        ValueError: the file does not exist.
        DecodeError: the file cannot be decoded; the message names it.
    """
    data = storage.read_bytes(url)
    with translate_decode_errors(f"{url} cannot be read as an image: "):
        return decode_image(data)


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a loaded image, 1 to 8; 1 if it has none or its EXIF data are broken."""
    try:
        orientation = int(image.getexif().get(_EXIF_ORIENTATION, UPRIGHT))
    except Exception:
        return UPRIGHT
    return orientation if 1 <= orientation <= 8 else UPRIGHT


def is_opaque_rgb_or_gray(image: Image.Image) -> bool:
    """Return True for 8-bit RGB or gray without transparency."""
    return image.mode in ("RGB", "L") and "transparency" not in image.info


@translate_decode_errors()
def to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to upright, opaque RGB in sRGB with 8 bits per channel.

    The result has no metadata, so converting it again changes nothing.

    Raises:
        DecodeError: the image is damaged, or its values have no defined white.
    """
    image.load()
    # TIFF images are upright once they are loaded.
    orientation, profile = exif_orientation(image), image.info.get("icc_profile")
    if is_deep(image):
        image = to_eight_bits(image)
    color_mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(image.mode, "RGB")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    rgb = to_srgb_colors(image if image.mode == color_mode else image.convert(color_mode), profile)
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    if orientation != UPRIGHT:
        rgb = Image.fromarray(to_upright(np.asarray(rgb), orientation))
    rgb.info = {}
    return rgb


def encode_png(image: Image.Image, compress_level: int = 6) -> bytes:
    """Encode an image as PNG.

    Args:
        image: any mode that PNG stores.
        compress_level: zlib level, 0 (fastest) to 9 (smallest).
    """
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=compress_level)
    return file.getvalue()
