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

from bsq_ray.config.tokenizer_config import Strict
from bsq_ray.serving.errors import Refused, too_slow
from bsq_ray.serving.http.admission import Guard
from bsq_ray.serving.registry import Kind, Models

# An image, and a clip, which moves.
PICTURES = ("image/png", "image/webp")


class DrawBody(Strict):
    """What to draw. What is left out is the model's own setting; the same seed draws the same image."""

    model: str | None = None
    label: int = Field(alias="class", ge=0, lt=2**31)
    seed: int = Field(default_factory=lambda: randbelow(2**32), ge=0, lt=2**53)
    steps: int | None = None
    guidance: float | None = None
    temperature: float | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """Settings of the sampling that are given."""
        return self.model_dump(include={"steps", "guidance", "temperature"}, exclude_none=True)


async def draw(body: DrawBody, models: Models, guard: Guard, seconds: float) -> AsyncIterator[bytes]:
    """Pictures after each step.

    Raises:
        Refused: there is no such model or class, too many requests are under way, or the time is up.
    """
    replicas = models.choose("generate", body.model).serving("generate")
    until = asyncio.get_running_loop().time() + seconds
    with guard.turn():
        pictures = replicas.stream("draw", body.label, body.seed, body.changes)
        while True:
            left = max(0.0, until - asyncio.get_running_loop().time())
            try:
                picture = await asyncio.wait_for(anext(pictures), left)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise too_slow(seconds) from None
            yield picture


def picture_type(kind: Kind) -> str:
    """Media type of what a model draws."""
    return PICTURES[kind.frames > 1]


async def lines(
    first: bytes, rest: AsyncIterator[bytes], body: DrawBody, steps: int, media_type: str
) -> AsyncIterator[bytes]:
    """A line of JSON for each step; the last one has the image, or says why there is none.

    Args:
        first, rest: of `draw`.
        steps: how many there will be.
        media_type: of the pictures.
    """
    step, picture = 1, first
    async with aclosing(rest):  # type: ignore[type-var]
        try:
            while True:
                image = f"data:{media_type};base64," + base64.b64encode(picture).decode()
                yield json.dumps({"step": step, "steps": steps, "seed": body.seed, "image": image}).encode() + b"\n"
                picture, step = await anext(rest), step + 1
        except StopAsyncIteration:
            return
        except Refused as refusal:
            yield json.dumps({"error": refusal.message}).encode() + b"\n"
