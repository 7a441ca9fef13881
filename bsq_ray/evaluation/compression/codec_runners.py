"""Common interface of image and video codecs: encode to the content of a file, decode to frames.

    image ─ImageRunner.encode─▶ bytes ─decode─▶ frames (1, H, W, 3)
    clip  ─VideoRunner.encode─▶ bytes ─decode─▶ frames (T, H, W, 3)

Shape suffixes: T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from bsq_ray.codec.codec import Codec
from bsq_ray.codec.rate import Rate
from bsq_ray.evaluation.compression.clip_files import VideoClip
from bsq_ray.evaluation.compression.image_codecs import ImageCodec
from bsq_ray.evaluation.compression.video_codecs import VideoCodec

RAW, PRIOR = "BSQ, raw bits", "BSQ with prior"
# The quality setting of the BSQ codec is the number of bits per token; without nested bits it has none.
_ALL_BITS = 0.0


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
    def from_bsq(cls, codec: Codec, qualities: tuple[float, ...]) -> ImageRunner:
        """Return a runner of the BSQ codec; qualities are numbers of bits per token, 0 for all."""
        return cls(qualities, lambda image, quality: codec.compress(image, rate=_rate(quality)).data, codec.decompress)

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
    def from_bsq(cls, codec: Codec, qualities: tuple[float, ...]) -> VideoRunner:
        """Return a runner of the BSQ codec; qualities are numbers of bits per token, 0 for all."""
        return cls(
            qualities,
            lambda clip, quality: codec.compress_clip(clip.frames_THW3, clip.frame_rate, rate=_rate(quality)).data,
            lambda data: np.stack(list(codec.decompress_clip(data))),
        )

    def encode(self, clip: VideoClip, quality: float) -> bytes:
        """Return the content of the compressed file."""
        return self.encode_clip(clip, quality)

    def decode(self, data: bytes) -> np.ndarray:
        """Return the frames, uint8 (T, H, W, 3)."""
        return self.decode_clip(data)


CodecRunner = ImageRunner | VideoRunner


def bsq_runners(codec: Codec, kind: Literal["images", "clips"], bits: Sequence[int] = ()) -> dict[str, CodecRunner]:
    """Return runners of the BSQ codec by name: with raw bits, and with the prior if there is one.

    Args:
        codec: codec of a tokenizer, or of a prior.
        kind: "images" or "clips".
        bits: numbers of bits per token of a tokenizer with nested bits; empty uses those that it was trained with.

    Raises:
        ValueError: the tokenizer has no nested bits, or files cannot have so many bits.
    """
    codecs = {RAW: codec} if codec.prior is None else {RAW: Codec(codec.tokenizer), PRIOR: codec}
    if bits and codecs[RAW].plane_layout is None:
        raise ValueError(
            "--bits needs a tokenizer trained with nested bits (model.quantizer.keep); without the option, this model "
            "is measured with all its bits"
        )
    runner_type = ImageRunner if kind == "images" else VideoRunner
    return {name: runner_type.from_bsq(each, _bsq_qualities(each, bits)) for name, each in codecs.items()}


def _bsq_qualities(codec: Codec, bits: Sequence[int]) -> tuple[float, ...]:
    """Return the numbers of bits to measure, ascending; the marker of all bits if the codec has no nested bits."""
    layout = codec.plane_layout
    if layout is None:
        return (_ALL_BITS,)
    if not bits:
        return tuple(number for number in layout.keep if number % layout.unit == 0)
    return tuple(sorted({number for each in bits for number in layout.candidates(Rate(bits=each))}))


def _rate(quality: float) -> Rate:
    return Rate() if quality == _ALL_BITS else Rate(bits=int(quality))
