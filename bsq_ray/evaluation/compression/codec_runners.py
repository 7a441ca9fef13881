"""Common interface of image and video codecs: encode to the content of a file, decode to frames.

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
# The BSQ codec has no quality setting.
_SINGLE_QUALITY = (0.0,)


@dataclass(frozen=True)
class ImageRunner:
    """An image codec and its quality settings.

    Attributes:
        qualities: quality settings, in the order of increasing file size.
        encode_image: maps an image and a quality setting to the content of a file.
        decode_image: maps the content of a file to an image.
    """

    qualities: tuple[float, ...]
    encode_image: Callable[[Image.Image, float], bytes]
    decode_image: Callable[[bytes], Image.Image]

    @classmethod
    def from_standard(cls, codec: ImageCodec) -> ImageRunner:
        """Return a runner of a standard image codec."""
        return cls(codec.qualities, codec.encode, codec.decode)

    @classmethod
    def from_bsq(cls, codec: Codec) -> ImageRunner:
        """Return a runner of the BSQ codec."""
        return cls(_SINGLE_QUALITY, lambda image, quality: codec.compress(image).data, codec.decompress)

    def encode(self, image: Image.Image, quality: float) -> bytes:
        """Return the content of the compressed file."""
        return self.encode_image(image, quality)

    def decode(self, data: bytes) -> np.ndarray:
        """Return the pixels as one frame, uint8 (1, H, W, 3)."""
        return np.asarray(self.decode_image(data))[None]


@dataclass(frozen=True)
class VideoRunner:
    """A video codec and its quality settings.

    Attributes:
        qualities: quality settings, in the order of increasing file size.
        encode_clip: maps a clip and a quality setting to the content of a file.
        decode_clip: maps the content of a file to frames, uint8 (T, H, W, 3).
    """

    qualities: tuple[float, ...]
    encode_clip: Callable[[VideoClip, float], bytes]
    decode_clip: Callable[[bytes], np.ndarray]

    @classmethod
    def from_standard(cls, codec: VideoCodec) -> VideoRunner:
        """Return a runner of a standard video codec."""
        return cls(codec.qualities, codec.encode, codec.decode)

    @classmethod
    def from_bsq(cls, codec: Codec) -> VideoRunner:
        """Return a runner of the BSQ codec."""
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
    """Return runners of the BSQ codec by name: with raw bits, and with the prior if there is one."""
    codecs = {RAW: codec} if codec.prior is None else {RAW: Codec(codec.tokenizer), PRIOR: codec}
    runner_type = ImageRunner if kind == "images" else VideoRunner
    return {name: runner_type.from_bsq(each) for name, each in codecs.items()}
