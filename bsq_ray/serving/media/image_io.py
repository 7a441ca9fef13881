"""Decode untrusted image files with size limits, and encode result images.

The format is detected from the content of the file. Only formats that Pillow decodes without external programs are
tried.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from bsq_ray.media.decode_error import DecodeError, TooLargeError, UnknownFormatError
from bsq_ray.media.images import IMAGE_FORMATS, load_image, open_image
from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.media.video_io import VIDEO_FORMAT_NAMES

# PNG, JPEG, WebP and AVI, GIF, MP4 as base64.
_BASE64_STARTS = (b"iVBORw0KGgo", b"/9j/", b"UklGR", b"R0lGOD", b"AAAA")

# Duration of a frame of a generated video; tokens do not contain the frame rate of the training videos.
_FRAME_DURATION_MS = 40


def read_uploaded_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an uploaded image file to RGB, as `read_image` does.

    Args:
        data: content of the file.
        max_pixels: maximum number of pixels; larger images are rejected by their header, before decoding.

    Raises:
        ApiError: 415 not an image, 413 too many pixels, 422 damaged or an animation.
    """
    image = open_uploaded_image(data, max_pixels)
    try:
        return load_image(image)
    except DecodeError as error:
        raise ApiError(422, f"the image is damaged: {error}") from None


def open_uploaded_image(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header of an uploaded image file; arguments and errors as of `read_uploaded_image`."""
    try:
        image = open_image(data)
    except UnknownFormatError:
        raise ApiError(
            415,
            f"the body is not an image or video{_encoding_hint(data)}; supported: {', '.join(IMAGE_FORMATS)}, "
            f"{VIDEO_FORMAT_NAMES}",
        ) from None
    except TooLargeError:
        # Pillow's own limit is far above the usual `max_pixels`.
        raise ApiError(413, f"the image has more than {max_pixels} pixels; downscale it first") from None
    except DecodeError as error:
        raise ApiError(422, f"the image cannot be read: {error}") from None
    if image.width * image.height > max_pixels:
        raise ApiError(
            413, f"the image has {image.width} x {image.height} pixels, more than {max_pixels}; downscale it first"
        )
    return image


def png_from_pixels(pixels_CHW: np.ndarray) -> bytes:
    """Encode uint8 pixels (3, H, W) as PNG."""
    return png_from_image(Image.fromarray(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0))))


def webp_from_frames(pixels_CTHW: np.ndarray) -> bytes:
    """Encode uint8 frames (3, T, H, W) as an animated, lossless WebP."""
    first, *rest = (Image.fromarray(np.ascontiguousarray(frame)) for frame in pixels_CTHW.transpose(1, 2, 3, 0))
    file = io.BytesIO()
    first.save(
        file, "WEBP", save_all=True, append_images=rest, duration=_FRAME_DURATION_MS, loop=0, lossless=True, method=0
    )
    return file.getvalue()


def png_from_image(image: Image.Image) -> bytes:
    """Encode an image as PNG, at the fastest compression level."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _encoding_hint(data: bytes) -> str:
    """Return a remark on a body that the client encoded as text."""
    if data.startswith(b"data:"):
        return " but a data URL; send the bytes of the file"
    if data.startswith(_BASE64_STARTS):
        return " but base64; send the bytes of the file"
    return ""
