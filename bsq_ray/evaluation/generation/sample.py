"""Generate images or clips with a model folder; write them as files and as one sheet.

Shape suffixes: B images, H and W pixels; a clip has T frames before H and W.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from bsq_ray import storage
from bsq_ray.config.validation_error import format_first_error
from bsq_ray.data.transforms import eval_transform, to_float, to_uint8
from bsq_ray.evaluation.generation.features import default_device
from bsq_ray.evaluation.plots.class_grid import ClassSheet
from bsq_ray.evaluation.plots.image_encoding import encode_animation, encode_png, image_from_pixels
from bsq_ray.media.images import read_image
from bsq_ray.model_folder import WeightsKind
from bsq_ray.models.generator import Generator

_BATCH, _COLUMNS = 16, 12
# Duration of a frame of a generated clip: tokens do not contain the frame rate of the training videos.
_FRAME_MS = 40


@dataclass(frozen=True)
class GenerateRequest:
    """Options of a generation.

    Attributes:
        classes: class indices; an empty list stands for all classes of the model.
        count: images of each class, or steps of an interpolation.
        seed: of the sampler; the same seed generates the same images.
        sampling: keys of `config.SamplingConfig` to change.
        interpolate: interpolate from the first of two classes to the second.
        image, mask: URLs of an image to inpaint where the mask is white.
    """

    classes: list[int]
    count: int = 8
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    interpolate: bool = False
    image: str | None = None
    mask: str | None = None


def generate_files(model_url: str, out_url: str, request: GenerateRequest, weights: WeightsKind = "ema") -> int:
    """Write one file per image, named by class and number, and sheet.png; return the number of images.

    Images become PNG files, clips animated WebP files. The sheet shows the middle frame of a clip.

    Raises:
        ValueError: the model, an image or the request is invalid.
    """
    if request.count < 1:
        raise ValueError(f"count {request.count} must be 1 or more")
    if (request.image is None) != (request.mask is None):
        raise ValueError("inpainting needs both --image and --mask")
    generator = Generator.from_pretrained(model_url, weights, default_device())
    sheet = ClassSheet([f"class {n}" for n in range(generator.model.null_class)], _COLUMNS)
    num_images = 0
    try:
        for label, images_BCHW in _generate_batches(generator, request):
            for pixels in to_uint8(images_BCHW).cpu().numpy():
                suffix, content = _encode_file(pixels)
                storage.write_bytes(storage.join(out_url, f"class-{label:03}-{num_images:04}.{suffix}"), content)
                sheet.add(label, pixels if pixels.ndim == 3 else pixels[:, pixels.shape[1] // 2])
                num_images += 1
    except ValidationError as error:
        raise ValueError(f"{format_first_error(error)}, got {error.errors()[0]['input']!r}") from None
    storage.write_bytes(storage.join(out_url, "sheet.png"), sheet.png())
    return num_images


def _generate_batches(generator: Generator, request: GenerateRequest) -> Iterator[tuple[int, Tensor]]:
    """Yield labels with the images (B, 3, H, W) or clips (B, 3, T, H, W) of each."""
    if request.interpolate:
        images = generator.interpolate(request.classes, request.count, request.seed, **request.sampling)
        yield request.classes[0], images
        return
    classes = request.classes or list(range(generator.model.null_class))
    if request.image is not None and request.mask is not None:
        if generator.model.config.grid[0] > 1:
            raise ValueError("the model generates clips; --image and --mask inpaint images only")
        source_image, mask = read_image(request.image), read_image(request.mask)
        if source_image.size != mask.size:
            sizes = (
                f"{mask.width} x {mask.height} pixels, {request.image} has {source_image.width} x {source_image.height}"
            )
            raise ValueError(f"{request.mask} has {sizes}; give a mask of the image's size")
        size = generator.tokenizer.config.image_size
        image = to_float(torch.from_numpy(eval_transform(source_image, size, "lanczos"))[None])
        hole = torch.from_numpy(eval_transform(mask, size, "lanczos")[None, :1] > 127)
        for label in classes:
            copies, holes = image.repeat(request.count, 1, 1, 1), hole.repeat(request.count, 1, 1, 1)
            labels = [label] * request.count
            yield label, generator.inpaint(copies, holes, labels, request.seed, **request.sampling)
        return
    first = 0
    for label in classes:
        for start in range(0, request.count, _BATCH):
            labels = [label] * min(_BATCH, request.count - start)
            yield label, generator.generate(labels, request.seed, first, **request.sampling)
            first += len(labels)


def _encode_file(pixels: np.ndarray) -> tuple[str, bytes]:
    """Return suffix and content of the file of an image (3, H, W) or a clip (3, T, H, W), uint8."""
    if pixels.ndim == 3:
        return "png", encode_png(image_from_pixels(pixels))
    frames = [image_from_pixels(pixels[:, t]) for t in range(pixels.shape[1])]
    return "webp", encode_animation(frames, _FRAME_MS)
