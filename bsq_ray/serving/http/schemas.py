"""Request and response bodies of the HTTP API, which also generate its OpenAPI schema."""

from __future__ import annotations

import base64
import binascii
from secrets import randbelow
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bsq_ray.config.tokenizer_config import StrictModel
from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.payloads import PackedTokens, QualityReport

# Frames per second of tokens without a rate.
_DEFAULT_FRAME_RATE = "25"


class TokensBody(StrictModel):
    """Tokens of an image or a video: the response of `encode` and the body of `decode`."""

    model: str | None = Field(None, description="name or ID of the model")
    grid: tuple[int, int, int] = Field(description="frames, rows, columns")
    bits: int = Field(description="bits per token")
    rate: str | None = Field(
        None, pattern=r"^[1-9]\d{0,9}(/[1-9]\d{0,9})?$", description="frames per second of a video, such as 30000/1001"
    )
    packed: str = Field(
        description="base64; ceil(bits / 8) bytes per token, bit 1 least significant, frames slowest, then rows"
    )

    def to_packed_tokens(self) -> PackedTokens:
        """Return the tokens as replicas expect them.

        Raises:
            ApiError: 422 `packed` is not base64.
        """
        try:
            packed = base64.b64decode(self.packed, validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(422, "packed: not base64") from None
        rate = self.rate or (_DEFAULT_FRAME_RATE if self.grid[0] > 1 else None)
        return PackedTokens(list(self.grid), packed, rate)


class GenerateBody(StrictModel):
    """Request of `generate`. Missing values are the model's own settings; the same seed gives the same image."""

    model: str | None = Field(None, description="name or ID of the model")
    label: int = Field(alias="class", ge=0, lt=2**31, description="class; the number of classes means any class")
    seed: int = Field(default_factory=lambda: randbelow(2**32), ge=0, lt=2**53)
    steps: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None

    @property
    def sampling_overrides(self) -> dict[str, Any]:
        """Sampling settings that the request contains."""
        return self.model_dump(include={"steps", "guidance_scale", "temperature"}, exclude_none=True)


class GenerateStep(BaseModel):
    """One line of the response of `generate`; a stream that fails ends with an `ErrorBody`."""

    step: int
    steps: int
    seed: int
    image: str = Field(description="data URL of the image after this step")


class MeasureResponse(QualityReport):
    """The response of `measure`."""

    model: str


class ModelInfo(BaseModel):
    """A model of the service; a loaded model has further fields, such as its ID and image size."""

    model_config = ConfigDict(extra="allow")

    name: str
    stage: str
    frames: int = Field(description="frames of the model's input; more than 1 for a video model")
    ready: bool
    capabilities: list[str]


class ModelsResponse(BaseModel):
    """The models of the service."""

    models: list[ModelInfo]


class HealthResponse(BaseModel):
    """State of the service; `models` lists those that are still loading."""

    status: Literal["ok", "loading"]
    models: list[str] = []


class ErrorBody(BaseModel):
    """A failed request."""

    error: str
