"""Image files that strangers send: recognised, bounded and decoded; and pixels back to files.

The file itself says what it is; only formats that Pillow decodes without outside programs are tried.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from bsq_ray.data.transforms import DECODE_ERRORS, decode_error_text, to_rgb
from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.media.video_io import VIDEO_FORMAT_NAMES

# Between frames of a drawn clip: tokens do not tell the rate of the videos they were learnt from.
_FRAME_DURATION_MS = 40
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")


def read_uploaded_image(data: bytes, max_pixels: int, short_side: int | None = None) -> Image.Image:
    """Decodes an image file to RGB.

    Args:
        max_pixels: images with more are refused from their header, before anything is decoded.
        short_side: a JPEG may be decoded at a fraction of its size, as `bsq_ray.data.transforms.decode_image` does.

    Raises:
        Refused: 415 not an image, 413 too many pixels, 422 damaged.
    """
    try:
        # Pillow warns of large images and raises on larger ones; the limit here comes first.
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except DECODE_ERRORS as error:
        if isinstance(error, Image.DecompressionBombError):
            raise ApiError(413, f"the image has more than the {max_pixels} pixels that are taken") from None
        raise ApiError(
            415, f"the body is not an image or video: {', '.join(IMAGE_FORMATS)}, {VIDEO_FORMAT_NAMES} are read"
        ) from None
    if image.width * image.height > max_pixels:
        raise ApiError(
            413, f"the image has {image.width} x {image.height} pixels; at most {max_pixels} are taken, shrink it first"
        )
    try:
        if short_side is not None and image.format == "JPEG":
            factor = 2 * short_side / min(image.size)
            image.draft("RGB", (round(image.width * factor), round(image.height * factor)))
        return to_rgb(image)
    except DECODE_ERRORS as error:
        raise ApiError(422, f"the image is damaged: {decode_error_text(error)}") from None


def png_from_pixels(pixels_CHW: np.ndarray) -> bytes:
    """A PNG of uint8 pixels (3, H, W)."""
    return png_from_image(Image.fromarray(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0))))


def webp_from_frames(pixels_CTHW: np.ndarray) -> bytes:
    """An animated WebP of the uint8 frames of a clip (3, T, H, W), nothing lost."""
    first, *others = (Image.fromarray(np.ascontiguousarray(frame)) for frame in pixels_CTHW.transpose(1, 2, 3, 0))
    file = io.BytesIO()
    first.save(
        file, "WEBP", save_all=True, append_images=others, duration=_FRAME_DURATION_MS, loop=0, lossless=True, method=0
    )
    return file.getvalue()


def png_from_image(image: Image.Image) -> bytes:
    """A PNG, packed quickly rather than tightly."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
