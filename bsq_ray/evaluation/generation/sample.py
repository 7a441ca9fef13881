"""Images or clips drawn from a model folder, as files and as a sheet.

Shape suffixes: B images, H and W pixels; a clip has T frames before H and W.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from bsq_ray import storage
from bsq_ray.data.transforms import eval_transform, read_image, to_float, to_uint8
from bsq_ray.evaluation.generation.features import default_device
from bsq_ray.evaluation.plots.class_grid import ClassSheet
from bsq_ray.models.generator import Generator

_BATCH, _COLUMNS = 16, 12
# Between frames of a drawn clip, ms: tokens do not tell the rate of the videos they were learnt from.
_FRAME_MS = 40


@dataclass(frozen=True)
class GenerateRequest:
    """What to draw.

    Attributes:
        classes: their numbers; none are all classes of the model.
        count: images of each class; of the way between two classes, steps.
        sampling: keys of `config.Sampling` to change.
        between: go from the first of two classes to the second.
        image, mask: an image to fill in where the mask is white.
    """

    classes: list[int]
    count: int = 8
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    interpolate: bool = False
    image: str | None = None
    mask: str | None = None


def generate_files(
    model_url: str, out_url: str, request: GenerateRequest, weights: Literal["ema", "plain"] = "ema"
) -> int:
    """Writes files named by class and number, and sheet.png; returns how many there are.

    Images become PNG, clips animated WebP; of a clip the sheet shows the middle frame.

    Raises:
        ValueError: the model, an image or the request is wrong.
    """
    if request.count < 1:
        raise ValueError(f"count {request.count} must be 1 or more")
    if (request.image is None) != (request.mask is None):
        raise ValueError("filling in needs both --image and --mask")
    generator = Generator.from_pretrained(model_url, weights, default_device())
    sheet = ClassSheet([f"class {n}" for n in range(generator.model.null_class)], _COLUMNS)
    num_images = 0
    try:
        for label, images_BCHW in _generate_batches(generator, request):
            for pixels in to_uint8(images_BCHW).cpu().numpy():
                suffix, content = ("png", _encode_png(pixels)) if pixels.ndim == 3 else ("webp", _encode_webp(pixels))
                storage.write_bytes(storage.join(out_url, f"class-{label:03}-{num_images:04}.{suffix}"), content)
                sheet.add(label, pixels if pixels.ndim == 3 else pixels[:, pixels.shape[1] // 2])
                num_images += 1
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}") from None
    storage.write_bytes(storage.join(out_url, "sheet.png"), sheet.png())
    return num_images


def _generate_batches(generator: Generator, request: GenerateRequest) -> Iterator[tuple[int, Tensor]]:
    """Labels with the images drawn for them."""
    if request.interpolate:
        images = generator.interpolate(request.classes, request.count, request.seed, **request.sampling)
        yield request.classes[0], images
        return
    classes = request.classes or list(range(generator.model.null_class))
    if request.image is not None and request.mask is not None:
        if generator.model.config.grid[0] > 1:
            raise ValueError("the model draws clips; --image and --mask fill in images only")
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


def _encode_png(pixels_CHW: np.ndarray) -> bytes:
    png = io.BytesIO()
    Image.fromarray(pixels_CHW.transpose(1, 2, 0)).save(png, "PNG")
    return png.getvalue()


def _encode_webp(pixels_CTHW: np.ndarray) -> bytes:
    first, *others = (Image.fromarray(pixels_CTHW[:, t].transpose(1, 2, 0)) for t in range(pixels_CTHW.shape[1]))
    webp = io.BytesIO()
    first.save(webp, "WEBP", save_all=True, append_images=others, duration=_FRAME_MS, loop=0, lossless=True)
    return webp.getvalue()
