"""Compressing and decompressing files; `-` is the standard input or output."""

from __future__ import annotations

import io
import sys
import time
from typing import Literal

from bsq_ray import storage
from bsq_ray.codec.container import MAX_PIXELS
from bsq_ray.codec.image import Codec
from bsq_ray.data.images import DECODE_ERRORS, decode_fault, decode_image

_FORMATS = {"png": "PNG", "webp": "WEBP"}


def compress_file(model_url: str, source: str, destination: str, weights: Literal["ema", "plain"] = "ema") -> str:
    """Compresses an image file; a sentence with sizes and times.

    Raises:
        ValueError: the model or the image cannot be read, or the file cannot be written.
    """
    codec = Codec.from_pretrained(model_url, weights)
    content = _read(source)
    try:
        image = decode_image(content)
    except DECODE_ERRORS as error:
        raise ValueError(f"{source} cannot be read as an image: {decode_fault(error)}") from error
    coded = codec.compress(image)
    _write(destination, coded.data)
    saved = ""
    if coded.cross_entropy_bits:
        share = coded.cross_entropy_bits / coded.raw_bits
        saved = (
            f"; the prior's {coded.cross_entropy_bits / 8:.0f} are {share:.1%} of the tokens' {coded.raw_bits / 8:.0f}"
        )
    took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in coded.seconds.items())
    size = f"{image.width} x {image.height} px in {len(coded.data)} bytes, {coded.bits_per_pixel:.4f} bits per pixel"
    return f"{source}: {size}{saved} ({took})"


def decompress_file(
    model_url: str,
    source: str,
    destination: str,
    region: tuple[int, int, int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    weights: Literal["ema", "plain"] = "ema",
) -> str:
    """Decompresses a .bsq file to PNG, or WebP without further loss by the name's ending; a sentence about it.

    Raises:
        ValueError: the model or the file cannot be read, or the file is damaged.
    """
    kind = "png" if destination == "-" else destination.rsplit(".", 1)[-1].lower()
    if kind not in _FORMATS:
        raise ValueError(f"{destination} must end in .png or .webp")
    codec = Codec.from_pretrained(model_url, weights)
    data = _read(source)
    began = time.perf_counter()
    try:
        image = codec.decompress(data, region, max_pixels)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    buffer = io.BytesIO()
    image.save(buffer, _FORMATS[kind], **({"lossless": True} if kind == "webp" else {}))
    _write(destination, buffer.getvalue())
    return f"{source}: {image.width} x {image.height} px in {time.perf_counter() - began:.2f} s"


def _read(source: str) -> bytes:
    return sys.stdin.buffer.read() if source == "-" else storage.read_bytes(source)


def _write(destination: str, data: bytes) -> None:
    if destination == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        storage.write_bytes(destination, data)
