"""Streaming of a generation: image files from a replica, lines of JSON to the client."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import aclosing

from bsq_ray.serving.errors import ApiError, deadline_exceeded_error
from bsq_ray.serving.http.admission import AdmissionControl
from bsq_ray.serving.http.schemas import GenerateBody
from bsq_ray.serving.registry import ModelKind, ModelRegistry

IMAGE_MEDIA_TYPE, VIDEO_MEDIA_TYPE = "image/png", "image/webp"
GENERATED_MEDIA_TYPES = (IMAGE_MEDIA_TYPE, VIDEO_MEDIA_TYPE)


async def generate_images(
    body: GenerateBody, models: ModelRegistry, *, admission: AdmissionControl, timeout_s: float
) -> AsyncIterator[bytes]:
    """Yield an image file after each step.

    Raises:
        ApiError: unknown model or class, too many requests in progress, or the request timed out.
    """
    replicas = models.choose("generate", body.model).replicas_for("generate")
    expires_at = asyncio.get_running_loop().time() + timeout_s
    with admission.slot():
        images = replicas.stream("generate", body.label, body.seed, body.sampling_overrides)
        while True:
            remaining_s = max(0.0, expires_at - asyncio.get_running_loop().time())
            try:
                image = await asyncio.wait_for(anext(images), remaining_s)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise deadline_exceeded_error(timeout_s) from None
            yield image


def generated_media_type(kind: ModelKind) -> str:
    """Return the media type of the images or videos that a model generates."""
    return VIDEO_MEDIA_TYPE if kind.num_frames > 1 else IMAGE_MEDIA_TYPE


async def ndjson_lines(
    first_image: bytes, other_images: AsyncIterator[bytes], *, seed: int, num_steps: int, media_type: str
) -> AsyncIterator[bytes]:
    """Yield a line of JSON for each step, or a line with the error if the generation fails.

    Args:
        first_image, other_images: image files of `generate_images`.
        num_steps: expected number of steps.
        media_type: media type of the image files.
    """
    step, image_data = 1, first_image
    async with aclosing(other_images):  # type: ignore[type-var]
        try:
            while True:
                data_url = f"data:{media_type};base64," + base64.b64encode(image_data).decode()
                line = json.dumps({"step": step, "steps": num_steps, "seed": seed, "image": data_url})
                yield line.encode() + b"\n"
                image_data, step = await anext(other_images), step + 1
        except StopAsyncIteration:
            return
        except ApiError as error:
            yield json.dumps({"error": error.message}).encode() + b"\n"
