"""Run one codec on images or clips: encode to a file in memory, decode to frames.

    image ─ImageRunner.encode─▶ bytes ─decode─▶ frames (1, H, W, 3)
    clip  ─VideoRunner.encode─▶ bytes ─decode─▶ frames (T, H, W, 3)

Shape suffixes: T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from bsq_ray.codec.codec import Codec
from bsq_ray.evaluation.compression.clip_files import VideoClip
from bsq_ray.evaluation.compression.image_codecs import ImageCodec
from bsq_ray.evaluation.compression.video_codecs import VideoCodec

RAW, PRIOR = "BSQ, raw bits", "BSQ with prior"
# Our codec has no quality setting.
_SINGLE_QUALITY = (0.0,)


@dataclass(frozen=True)
class ImageRunner:
    """An image codec at each of its qualities.

    Attributes:
        qualities: from the smallest file to the largest.
        encode_image: image and quality to the content of a file.
        decode_image: the inverse.
    """

    qualities: tuple[float, ...]
    encode_image: Callable[[Image.Image, float], bytes]
    decode_image: Callable[[bytes], Image.Image]

    @classmethod
    def from_standard(cls, codec: ImageCodec) -> ImageRunner:
        """Run a standard image codec."""
        return cls(codec.qualities, codec.encode, codec.decode)

    @classmethod
    def from_bsq(cls, codec: Codec) -> ImageRunner:
        """Run our codec."""
        return cls(_SINGLE_QUALITY, lambda image, quality: codec.compress(image).data, codec.decompress)

    def encode(self, image: Image.Image, quality: float) -> bytes:
        """Return the content of the compressed file."""
        return self.encode_image(image, quality)

    def decode(self, data: bytes) -> np.ndarray:
        """Return the pixels as one frame, uint8 (1, H, W, 3)."""
        return np.asarray(self.decode_image(data))[None]


@dataclass(frozen=True)
class VideoRunner:
    """A video codec at each of its qualities.

    Attributes:
        qualities: from the smallest file to the largest.
        encode_clip: clip and quality to the content of a file.
        decode_clip: content of a file to frames, uint8 (T, H, W, 3).
    """

    qualities: tuple[float, ...]
    encode_clip: Callable[[VideoClip, float], bytes]
    decode_clip: Callable[[bytes], np.ndarray]

    @classmethod
    def from_standard(cls, codec: VideoCodec) -> VideoRunner:
        """Run a standard video codec."""
        return cls(codec.qualities, codec.encode, codec.decode)

    @classmethod
    def from_bsq(cls, codec: Codec) -> VideoRunner:
        """Run our codec."""
        return cls(
            _SINGLE_QUALITY,
            lambda clip, quality: codec.compress_clip(clip.frames_THW3, clip.frame_rate).data,
            lambda data: np.stack(list(codec.decompress_clip(data))),
        )

    def encode(self, clip: VideoClip, quality: float) -> bytes:
        """Return the content of the compressed file."""
        return self.encode_clip(clip, quality)

    def decode(self, data: bytes) -> np.ndarray:
        """Return the frames, uint8 (T, H, W, 3)."""
        return self.decode_clip(data)


CodecRunner = ImageRunner | VideoRunner


def bsq_runners(codec: Codec, kind: Literal["images", "clips"]) -> dict[str, CodecRunner]:
    """Return runners of our codec with raw bits and, if it has a prior, with it; by name."""
    codecs = {RAW: codec} if codec.prior is None else {RAW: Codec(codec.tokenizer), PRIOR: codec}
    runner_type = ImageRunner if kind == "images" else VideoRunner
    return {name: runner_type.from_bsq(each) for name, each in codecs.items()}
