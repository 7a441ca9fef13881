"""The codecs that ours is compared with, each at a range of qualities; sizes are those of real files."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class ImageCodec:
    """A codec: `encode(image, quality)` gives the file, `decode` the image; qualities from the smallest file up."""

    qualities: tuple[float, ...]
    encode: Callable[[Image.Image, float], bytes]
    decode: Callable[[bytes], Image.Image]


def standard_codecs() -> dict[str, ImageCodec]:
    """JPEG, JPEG 2000, WebP and AVIF by Pillow, JPEG XL by imagecodecs; those that this machine's builds have."""
    from PIL import features

    codecs = {"JPEG": ImageCodec((5, 10, 20, 35, 50, 70), _pillow_encoder("JPEG", optimize=True), _decode_pillow)}
    if features.check("jpg_2000"):
        codecs["JPEG 2000"] = ImageCodec((24, 27, 30, 33, 36, 40), _encode_jpeg2000, _decode_pillow)
    if features.check("webp"):
        codecs["WebP"] = ImageCodec((0, 8, 20, 40, 60, 80), _pillow_encoder("WEBP", method=6), _decode_pillow)
    if features.check("avif"):
        codecs["AVIF"] = ImageCodec((8, 20, 32, 44, 56, 70), _pillow_encoder("AVIF", speed=6), _decode_pillow)
    try:
        import imagecodecs
    except ImportError:
        return codecs
    codecs["JPEG XL"] = ImageCodec(
        (20.0, 13.0, 8.0, 5.0, 3.0, 1.5),
        lambda image, distance: bytes(imagecodecs.jpegxl_encode(np.asarray(image), distance=distance, effort=7)),
        lambda data: Image.fromarray(imagecodecs.jpegxl_decode(data)),
    )
    return codecs


def _pillow_encoder(kind: str, **options: Any) -> Callable[[Image.Image, float], bytes]:
    def encode(image: Image.Image, quality: float) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, quality=int(quality), **options)
        return file.getvalue()

    return encode


def _encode_jpeg2000(image: Image.Image, psnr: float) -> bytes:
    # At a wanted PSNR: at a wanted size it would spend on easy images what others save.
    file = io.BytesIO()
    image.save(file, "JPEG2000", quality_mode="dB", quality_layers=[psnr], irreversible=True, mct=1)
    return file.getvalue()


def _decode_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")
