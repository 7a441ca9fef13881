"""Read and write still images: decoding, orientation, modes, color profiles and formats in one place.

file ─open_image─▶ header: format, size ─load_rgb─▶ RGB, 8 bits per channel, upright, opaque
                                        └to_srgb─▶ the same, converted from an embedded profile to sRGB
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from bsq_ray import storage

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
# Errors that Pillow raises on damaged, truncated or hostile files.
DECODE_ERRORS = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError, EOFError)

_EXIF_ORIENTATION, _EXIF_UPRIGHT = 0x0112, 1


def decode_error_text(error: Exception) -> str:
    """Return a short reason for one of `DECODE_ERRORS`."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return " ".join(str(error).split())[:160] or type(error).__name__


def open_image(data: bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Open an image file without decoding its pixels; format and size are known afterwards.

    Args:
        data: content of the file.
        formats: Pillow's names of the accepted formats; None accepts every format that Pillow reads.

    Raises:
        one of DECODE_ERRORS: the file is not an image.
    """
    return Image.open(io.BytesIO(data), formats=formats)


def load_rgb(image: Image.Image, short_side: int | None = None) -> Image.Image:
    """Decode an opened image to RGB with `to_rgb`.

    Args:
        image: as `open_image` returns it.
        short_side: size to which the caller will shrink the image. A JPEG is then decoded at a fraction of its size,
            at least twice `short_side`, so that the following resize stays antialiased.

    Raises:
        one of DECODE_ERRORS: the file is damaged.
    """
    if short_side is not None and image.format == "JPEG":
        factor = 2 * short_side / min(image.size)
        image.draft("RGB", (round(image.width * factor), round(image.height * factor)))
    return to_rgb(image)


def decode_image(data: bytes, short_side: int | None = None) -> Image.Image:
    """Decode an image file to RGB; see `open_image` and `load_rgb`.

    Raises:
        one of DECODE_ERRORS: the file is damaged or not an image.
    """
    return load_rgb(open_image(data), short_side)


def read_image(url: str) -> Image.Image:
    """Read and decode an image file.

    Args:
        url: path or fsspec URL.

    Raises:
        ValueError: the file is missing or not an image; the message names it.
    """
    data = storage.read_bytes(url)
    try:
        return decode_image(data)
    except DECODE_ERRORS as error:
        raise ValueError(f"{url} cannot be read as an image: {decode_error_text(error)}") from error


def is_upright(image: Image.Image) -> bool:
    """Return True if the EXIF orientation does not rotate or mirror the image."""
    return image.getexif().get(_EXIF_ORIENTATION, _EXIF_UPRIGHT) == _EXIF_UPRIGHT


def is_opaque_rgb_or_gray(image: Image.Image) -> bool:
    """Return True for 8-bit RGB or gray without transparency."""
    return image.mode in ("RGB", "L") and "transparency" not in image.info


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to upright RGB with 8 bits per channel; transparent parts become white."""
    image.load()
    if not is_upright(image):
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values_HW = np.asarray(image, np.float32)
        full_scale = 65535 if values_HW.max() > 255 else 255
        gray_HW = (values_HW / full_scale * 255).clip(0, 255).astype(np.uint8)
        return Image.fromarray(gray_HW).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert to RGB with `to_rgb`, and from the embedded color profile to sRGB."""
    profile, mode = image.info.get("icc_profile"), image.mode
    rgb = to_rgb(image)
    if not profile or mode not in ("RGB", "RGBA", "P"):
        return rgb
    try:
        source_profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source_profile.profile.xcolor_space.strip() != "RGB":
            return rgb
        converted = ImageCms.profileToProfile(rgb, source_profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        # An unreadable profile gives no information about the colors.
        return rgb
    assert converted is not None
    return converted


def encode_png(image: Image.Image, compress_level: int = 6) -> bytes:
    """Encode an image as PNG.

    Args:
        image: any mode that PNG stores.
        compress_level: zlib level, 0 (fastest) to 9 (smallest).
    """
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=compress_level)
    return file.getvalue()
