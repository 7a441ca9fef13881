"""Image files to pixels: decoding, what is stored of them, the training crop and the evaluation image.

Pixels are uint8, RGB; `to_float` maps them to [-1, 1].

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
