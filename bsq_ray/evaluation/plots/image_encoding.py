"""Encode plots and examples as image files in memory."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image


def image_from_pixels(pixels_3HW: np.ndarray) -> Image.Image:
    """Return an image of uint8 pixels (3, H, W)."""
    return Image.fromarray(np.ascontiguousarray(pixels_3HW.transpose(1, 2, 0)))


def encode_png(image: Image.Image) -> bytes:
    """Return the image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def encode_animation(images: Sequence[Image.Image], frame_ms: int, quality: int | None = None) -> bytes:
    """Return the images as an animated WebP file that loops forever.

    Args:
        images: the frames, all of the same size.
        frame_ms: duration of a frame, milliseconds.
        quality: WebP quality, 0 to 100; None encodes losslessly.
    """
    options = {"lossless": True} if quality is None else {"quality": quality}
    file = io.BytesIO()
    images[0].save(file, "WEBP", save_all=True, append_images=list(images[1:]), duration=frame_ms, loop=0, **options)
    return file.getvalue()
