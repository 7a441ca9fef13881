"""Image files to pixels: decoding, what is stored of them, the training crop and the evaluation image.

Pixels are uint8, RGB; `to_float` maps them to [-1, 1].

Shape suffixes: C channels, H and W pixels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from bsq_ray import storage

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_SUFFIX_OF_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}

Interpolation = Literal["lanczos", "bilinear"]
_RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}

# Errors that Pillow raises on damaged, truncated or hostile files.
DECODE_ERRORS = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError, EOFError)


def decode_error_text(error: Exception) -> str:
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


def read_image(url: str) -> Image.Image:
    """The image of a file, as `decode_image`.

    Raises:
        ValueError: there is no such file, or it is not an image; the message names it.
    """
    data = storage.read_bytes(url)
    try:
        return decode_image(data)
    except DECODE_ERRORS as error:
        raise ValueError(f"{url} cannot be read as an image: {decode_error_text(error)}") from error


def reencode_image(data: bytes, max_side: int | None) -> tuple[bytes, str]:
    """The bytes to store and their suffix: the file as it is if it is plain RGB or grey, upright and small enough."""
    image = Image.open(io.BytesIO(data))
    image_format, mode, turned = image.format, image.mode, image.getexif().get(0x0112, 1) != 1
    opaque = mode in ("RGB", "L") and "transparency" not in image.info
    rgb = to_rgb(image)
    exceeds_max_side = max_side is not None and max(rgb.size) > max_side
    if image_format in _SUFFIX_OF_FORMAT and opaque and not turned and not exceeds_max_side:
        return data, _SUFFIX_OF_FORMAT[image_format]
    if max_side is not None and exceeds_max_side:
        scale = max_side / max(rgb.size)
        size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    stored = io.BytesIO()
    if image_format == "JPEG":
        rgb.save(stored, "JPEG", quality=95, subsampling=0)
        return stored.getvalue(), "jpg"
    rgb.save(stored, "PNG")
    return stored.getvalue(), "png"


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


@dataclass(frozen=True)
class Crop:
    """A square cut from pictures of one size: the same for every frame of a clip.

    Attributes:
        size: side of the result, pixels.
        resized: height and width that the picture is resized to.
        top, left: where the square begins in it.
        mirrored: whether left and right are exchanged.
    """

    size: int
    resized_hw: tuple[int, int]
    top: int
    left: int
    is_flipped: bool

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB to uint8 (3, size, size)."""
        image_HWC = torch.from_numpy(np.array(image))
        # The pixels of Pillow's resize, in a third of its time.
        image_1CHW = F.interpolate(image_HWC.permute(2, 0, 1)[None], self.resized_hw, mode="bilinear", antialias=True)
        pixels_CHW = image_1CHW[0, :, self.top : self.top + self.size, self.left : self.left + self.size].numpy()
        return np.ascontiguousarray(pixels_CHW[:, :, ::-1] if self.is_flipped else pixels_CHW)


def sample_crop(
    image_size: tuple[int, int],
    size: int,
    resize_range: tuple[float, float],
    random_flip: bool,
    rng: np.random.Generator,
) -> Crop:
    """The paper's training transform: short side resized (bilinear, antialiased), then a random square.

    Args:
        picture: width and height, pixels.
        size: side of the result, pixels.
        scale: the short side becomes size times a factor drawn from this range.
        flip: mirror half of the crops.
        rng: the only source of randomness.
    """
    factor = size * rng.uniform(*resize_range) / min(image_size)
    width, height = (max(size, round(side * factor)) for side in image_size)
    left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
    return Crop(size, (height, width), top, left, random_flip and bool(rng.random() < 0.5))


def train_transform(
    image: Image.Image, size: int, resize_range: tuple[float, float], random_flip: bool, rng: np.random.Generator
) -> np.ndarray:
    """One image through `draw_crop`; uint8 (3, size, size)."""
    return sample_crop(image.size, size, resize_range, random_flip, rng)(image)


def eval_transform(image: Image.Image, size: int, interpolation: Interpolation) -> np.ndarray:
    """The paper's evaluation transform: short side to `size`, then the centre square; uint8 (3, size, size)."""
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    image = image.resize((width, height), _RESAMPLING[interpolation])
    left, top = (width - size) // 2, (height - size) // 2
    return np.ascontiguousarray(np.asarray(image)[top : top + size, left : left + size].transpose(2, 0, 1))


def to_float(images_uint8: Tensor) -> Tensor:
    """uint8 0…255 to fp32 in [-1, 1]."""
    return images_uint8.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to the nearest uint8 0…255, clamped."""
    return images.float().add(1).mul(127.5).round().clamp_(0, 255).to(torch.uint8)
