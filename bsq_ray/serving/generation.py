"""An image while it is generated: pictures from a replica, lines of JSON to the client."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from secrets import randbelow
from typing import Any

from pydantic import Field

from bsq_ray.config.tokenizer_config import StrictModel
from bsq_ray.serving.errors import ApiError, deadline_exceeded
from bsq_ray.serving.http.admission import AdmissionControl
from bsq_ray.serving.registry import ModelKind, ModelRegistry

# An image, and a clip, which moves.
IMAGE_MEDIA_TYPES = ("image/png", "image/webp")


class GenerateBody(StrictModel):
    """What to draw. What is left out is the model's own setting; the same seed draws the same image."""

    model: str | None = None
    label: int = Field(alias="class", ge=0, lt=2**31)
    seed: int = Field(default_factory=lambda: randbelow(2**32), ge=0, lt=2**53)
    steps: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None

    @property
    def sampling_overrides(self) -> dict[str, Any]:
        """Settings of the sampling that are given."""
        return self.model_dump(include={"steps", "guidance", "temperature"}, exclude_none=True)


async def generate_images(
    body: GenerateBody, models: ModelRegistry, admission: AdmissionControl, timeout_s: float
) -> AsyncIterator[bytes]:
    """Pictures after each step.

    Raises:
        Refused: there is no such model or class, too many requests are under way, or the time is up.
    """
    replicas = models.choose("generate", body.model).replicas_for("generate")
    expires_at = asyncio.get_running_loop().time() + timeout_s
    with admission.slot():
        images = replicas.stream("draw", body.label, body.seed, body.sampling_overrides)
        while True:
            remaining_s = max(0.0, expires_at - asyncio.get_running_loop().time())
            try:
                image = await asyncio.wait_for(anext(images), remaining_s)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise deadline_exceeded(timeout_s) from None
            yield image


def image_media_type(kind: ModelKind) -> str:
    """Media type of what a model draws."""
    return IMAGE_MEDIA_TYPES[kind.num_frames > 1]


async def ndjson_lines(
    first_image: bytes, other_images: AsyncIterator[bytes], body: GenerateBody, num_steps: int, media_type: str
) -> AsyncIterator[bytes]:
    """A line of JSON for each step; the last one has the image, or says why there is none.

    Args:
        first, rest: of `draw`.
        steps: how many there will be.
        media_type: of the pictures.
    """
    step, image_data = 1, first_image
    async with aclosing(other_images):  # type: ignore[type-var]
        try:
            while True:
                data_url = f"data:{media_type};base64," + base64.b64encode(image_data).decode()
                yield (
                    json.dumps({"step": step, "steps": num_steps, "seed": body.seed, "image": data_url}).encode()
                    + b"\n"
                )
                image_data, step = await anext(other_images), step + 1
        except StopAsyncIteration:
            return
        except ApiError as refusal:
            yield json.dumps({"error": refusal.message}).encode() + b"\n"
