"""Crop images for training and evaluation, and convert between pixels and the floats of the networks.

Pixels are uint8 RGB, 0 to 255; `to_float` maps them to [-1, 1].

Shape suffixes: C channels, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Interpolation = Literal["lanczos", "bilinear"]
_RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Crop:
    """A crop of a resized image; one crop applies to every frame of a clip.

    Attributes:
        crop_hw: height and width of the result, pixels.
        resized_hw: height and width to which the image is resized.
        top, left: upper left corner of the crop in the resized image.
        is_flipped: True to exchange left and right.
    """

    crop_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    top: int
    left: int
    is_flipped: bool

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Crop an RGB image to uint8 (3, H, W)."""
        image_HWC = torch.from_numpy(np.array(image))
        # Gives the pixels of Pillow's resize, in a third of its time.
        image_1CHW = F.interpolate(image_HWC.permute(2, 0, 1)[None], self.resized_hw, mode="bilinear", antialias=True)
        height, width = self.crop_hw
        pixels_CHW = image_1CHW[0, :, self.top : self.top + height, self.left : self.left + width].numpy()
        return np.ascontiguousarray(pixels_CHW[:, :, ::-1] if self.is_flipped else pixels_CHW)


def sample_crop(
    image_size: tuple[int, int],
    crop_hw: tuple[int, int],
    resize_range: tuple[float, float],
    max_enlargement: float | None,
    random_flip: bool,
    rng: np.random.Generator,
) -> Crop:
    """Draw the random crop of the paper's training transform: the image is resized (bilinear), then cropped.

    Args:
        image_size: width and height, pixels.
        crop_hw: height and width of the result, pixels; a square in the paper.
        resize_range: range of a random factor; the image is resized to this multiple of the smallest size that contains
            the crop, so the short side of an image to this multiple of a square's side.
        max_enlargement: the range ends where the image would be enlarged more than this, but not below its start;
            None: no limit.
        random_flip: mirror half of the crops.
        rng: the only source of randomness.
    """
    low, high = resize_range
    crop_wh = crop_hw[::-1]
    # The image must be enlarged most along this axis to contain the crop.
    axis = max((0, 1), key=lambda axis: crop_wh[axis] / image_size[axis])
    if max_enlargement is not None:
        high = max(low, min(high, max_enlargement * image_size[axis] / crop_wh[axis]))
    factor = crop_wh[axis] * rng.uniform(low, high) / image_size[axis]
    resized_wh = tuple(max(crop, round(side * factor)) for crop, side in zip(crop_wh, image_size, strict=True))
    left, top = (int(rng.integers(side - crop + 1)) for crop, side in zip(crop_wh, resized_wh, strict=True))
    return Crop(crop_hw, (resized_wh[1], resized_wh[0]), top, left, random_flip and bool(rng.random() < 0.5))


def train_transform(
    image: Image.Image,
    crop_hw: tuple[int, int],
    resize_range: tuple[float, float],
    max_enlargement: float | None,
    random_flip: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """Crop one image with `sample_crop`; returns uint8 (3, H, W)."""
    return sample_crop(image.size, crop_hw, resize_range, max_enlargement, random_flip, rng)(image)


def eval_transform(image: Image.Image, size: int, interpolation: Interpolation) -> np.ndarray:
    """Apply the paper's evaluation transform: short side to `size`, then the center square.

    The pixels are those of torchvision's `Resize` and `CenterCrop` on a PIL image, which the paper's code uses: the
    long side is rounded down, and offsets are rounded half to even.

    Returns:
        uint8 (3, size, size).
    """
    short_side = min(image.size)
    width, height = (int(size * side / short_side) for side in image.size)
    image = image.resize((width, height), _RESAMPLING[interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.ascontiguousarray(np.asarray(image)[top : top + size, left : left + size].transpose(2, 0, 1))


def to_float(images_uint8: Tensor) -> Tensor:
    """Convert uint8 0 to 255 to fp32 in [-1, 1]."""
    return images_uint8.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Convert floats in [-1, 1] to the nearest uint8 0 to 255, clamped."""
    return images.float().add(1).mul(127.5).round().clamp_(0, 255).to(torch.uint8)
