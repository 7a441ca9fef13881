"""Whole clips to compress: video files, raw YUV whose name tells its size, folders of frames.

Raw YUV is 8-bit 4:2:0 (planes Y, U, V of each frame), as MCL-JCV and UVG are handed out; its colours are those of
BT.709 from 720 lines on and of BT.601 below. Codecs store colour for two by two pixels, so an odd last row or column
is cut.

Shape suffixes: T frames, H and W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image

from bsq_ray import storage
from bsq_ray.data.transforms import DECODE_ERRORS, decode_image
from bsq_ray.media.video_reader import VIDEO_SUFFIXES, decode, even_size, open_video, upright

RAW_SUFFIX = ".yuv"
CLIP_SUFFIXES = (*VIDEO_SUFFIXES, ".y4m", RAW_SUFFIX)
# Width, height and rate in a name such as videoSRC01_1920x1080_30.yuv.
_NAME = re.compile(r"_(\d{1,5})x(\d{1,5})_(\d{1,3})(?:fps)?[._]")
_HD_LINES = 720
# Of folders of frames, which do not say theirs.
_RATE = Fraction(30)


@dataclass(frozen=True)
class Clip:
    """Frames, uint8 (T, H, W, 3), and how many are shown in a second."""

    frames_THW3: np.ndarray
    rate: Fraction


def read_clip(url: str, frames: int | None = None, max_side: int | None = None) -> Clip:
    """Reads a clip.

    Args:
        url: a video file, a .yuv file, or a folder of frames.
        frames: only the first so many.
        max_side: larger frames are shrunk to this longer side (Lanczos).

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    suffix = url.lower()[url.rfind(".") :]
    read = _raw if suffix == RAW_SUFFIX else _video if suffix in CLIP_SUFFIXES else _folder
    try:
        rate, pictures = read(url)
        kept = [_fitting(picture, max_side) for picture in islice(pictures, frames)]
    except ValueError as error:
        raise ValueError(str(error) if url in str(error) else f"{url} {error}") from error
    if len({picture.shape for picture in kept}) != 1:
        raise ValueError(f"{url} holds no frames" if not kept else f"{url} has frames of different sizes")
    return Clip(np.stack(kept), rate)


def _video(url: str) -> tuple[Fraction, Iterator[Image.Image]]:
    with storage.open_url(url) as file, open_video(file) as (_, stream):
        rate = Fraction(stream.average_rate or stream.base_rate or _RATE)

    def pictures() -> Iterator[Image.Image]:
        with storage.open_url(url) as file, open_video(file) as (container, stream):
            yield from map(upright, decode(container, stream))

    return rate, pictures()


def _raw(url: str) -> tuple[Fraction, Iterator[Image.Image]]:
    found = _NAME.search(url.rsplit("/", 1)[-1])
    if not found:
        raise ValueError("does not tell its size; name it as videoSRC01_1920x1080_30.yuv: width, height, frames/s")
    if "10bit" in url.rsplit("/", 1)[-1]:
        raise ValueError("has 10 bits a sample by its name; raw files of 8 bits are read")
    width, height, rate = map(int, found.groups())
    size = width * height * 3 // 2
    if width % 2 or height % 2 or not size or not rate:
        raise ValueError(f"is {width} x {height} at {rate} frames/s by its name; 4:2:0 has even sides")
    length = int(storage.filesystem(url)[0].size(storage.filesystem(url)[1]))
    if length % size or not length:
        raise ValueError(f"has {length} bytes, which is not a number of {width} x {height} frames of {size} bytes")
    colours = Colorspace.ITU709 if height >= _HD_LINES else Colorspace.ITU601

    def pictures() -> Iterator[Image.Image]:
        with storage.open_url(url) as file:
            while data := file.read(size):
                planes = np.frombuffer(data, np.uint8).reshape(height * 3 // 2, width)
                frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
                yield Image.fromarray(frame.reformat(format="rgb24", src_colorspace=colours).to_ndarray())

    return Fraction(rate), pictures()


def _folder(url: str) -> tuple[Fraction, Iterator[Image.Image]]:
    def pictures() -> Iterator[Image.Image]:
        for name in storage.list_folder(url):
            try:
                yield decode_image(storage.read_bytes(storage.join(url, name)))
            except DECODE_ERRORS as error:
                raise ValueError(f"has {name}, which cannot be read as an image") from error

    return _RATE, pictures()


def _fitting(picture: Image.Image, max_side: int | None) -> np.ndarray:
    if max_side is not None and max(picture.size) > max_side:
        picture = picture.resize(even_size(*picture.size, max_side), Image.Resampling.LANCZOS)
    pixels_HW3 = np.asarray(picture)
    return pixels_HW3[: pixels_HW3.shape[0] // 2 * 2, : pixels_HW3.shape[1] // 2 * 2]
