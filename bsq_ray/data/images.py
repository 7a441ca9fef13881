"""Image files to pixels: decoding, the training crop and the evaluation image.

Pixels are uint8, RGB; `to_float` maps them to [-1, 1].
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Filter = Literal["lanczos", "bilinear"]
_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}

# Errors that Pillow raises on damaged, truncated or hostile files.
DECODE_ERRORS = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError, EOFError)


def decode_fault(error: Exception) -> str:
    """Why an image could not be decoded, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return " ".join(str(error).split())[:160] or type(error).__name__


def decode_image(data: bytes, short_side: int | None = None) -> Image.Image:
    """Decodes an image file to RGB, upright as its EXIF orientation says.

    Args:
        data: the file.
        short_side: the size the caller will shrink it to; a JPEG is then decoded at a fraction of its size, but never
            below twice that, so that the following resize stays antialiased.

    Raises:
        one of DECODE_ERRORS: the file is damaged or not an image.
    """
    image = Image.open(io.BytesIO(data))
    if short_side is not None and image.format == "JPEG":
        factor = 2 * short_side / min(image.size)
        image.draft("RGB", (round(image.width * factor), round(image.height * factor)))
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB with 8 bits a channel, upright; transparent parts become white."""
    image.load()
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        pixels = np.asarray(image, np.float32)
        return Image.fromarray(
            (pixels / (65535 if pixels.max() > 255 else 255) * 255).clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def training_crop(
    image: Image.Image, size: int, scale: tuple[float, float], flip: bool, rng: np.random.Generator
) -> np.ndarray:
    """The paper's training transform: short side resized (bilinear, antialiased), then a random square.

    Args:
        image: RGB.
        size: side of the result, pixels.
        scale: the short side becomes size times a factor drawn from this range.
        flip: mirror half of the images.
        rng: the only source of randomness.

    Returns:
        uint8 (3, size, size).
    """
    factor = size * rng.uniform(*scale) / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
    across, down = image.width / width, image.height / height
    # Resizing only what the crop keeps gives the pixels of resize-then-crop for less.
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def evaluation_image(image: Image.Image, size: int, resize_filter: Filter) -> np.ndarray:
    """The paper's evaluation transform: short side to `size`, then the centre square; uint8 (3, size, size)."""
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    image = image.resize((width, height), _FILTERS[resize_filter])
    left, top = (width - size) // 2, (height - size) // 2
    return np.ascontiguousarray(np.asarray(image)[top : top + size, left : left + size].transpose(2, 0, 1))


def to_float(images_uint8: Tensor) -> Tensor:
    """uint8 0…255 to fp32 in [-1, 1]."""
    return images_uint8.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to the nearest uint8 0…255, clamped."""
    return images.float().add(1).mul(127.5).round().clamp_(0, 255).to(torch.uint8)
