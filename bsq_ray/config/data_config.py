"""Configuration of the samples of a tokenizer's training: order, cache, and transforms to training images and clips."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from bsq_ray.config.base import DataOrderConfig, StrictModel


class ShardCacheConfig(StrictModel):
    """Copies of remote shards on the local disk, shared by the processes of a node."""

    folder: str | None = Field(
        None, description="Local folder of the copies; null reads byte ranges of the remote shards, one per sample."
    )
    size_gb: float = Field(
        100.0, gt=0, description="Maximum size of the copies in GB; the least recently used go first."
    )


class DataConfig(DataOrderConfig):
    """Samples read from the shards, their order, and the transforms to training images and clips."""

    resize_range: tuple[float, float] = Field(
        (1.0, 1.0),
        description="[low, high]: short side before the random crop, as a multiple of image_size; for crop_sizes the "
        "size of the image, as a multiple of the smallest one that contains the crop.",
    )
    crop_sizes: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], ...] = Field(
        (),
        description="[[height, width], ...] of training crops, with about as many tokens as image_size; each batch has "
        "one of them. Empty: squares of image_size. For position rotary.",
    )
    max_enlargement: float | None = Field(
        None,
        ge=1,
        description="Largest factor by which a random crop enlarges an image: resize_range ends there for small "
        "images, but every image reaches image_size; null: no limit.",
    )
    random_flip: bool = Field(False, description="Mirror half of the images.")
    eval_interpolation: Literal["lanczos", "bilinear"] = Field(
        "lanczos", description="Filter that resizes evaluation images; it moves PSNR by more than 2 dB."
    )
    frame_stride: int = Field(1, ge=1, description="Clips take every n-th frame of a video.")
    clips_per_video: int = Field(
        1, ge=1, description="Most clips of a video in an epoch and in an evaluation; short videos give fewer."
    )
    cache: ShardCacheConfig = Field(ShardCacheConfig(), description="Copies of remote shards on the local disk.")

    @field_validator("crop_sizes")
    @classmethod
    def _check_crop_sizes_differ(cls, value: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if len(set(value)) < len(value):
            raise ValueError("a size is listed twice; list every size once")
        return value

    @model_validator(mode="after")
    def _check_resize_range(self) -> DataConfig:
        low, high = self.resize_range
        if not 1.0 <= low <= high:
            raise ValueError(f"resize_range {list(self.resize_range)} is not a range [low, high] with 1 <= low <= high")
        return self
