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
from bsq_ray.media.video_reader import VIDEO_SUFFIXES, decode_frames, even_size, open_video, to_upright_rgb

RAW_SUFFIX = ".yuv"
CLIP_SUFFIXES = (*VIDEO_SUFFIXES, ".y4m", RAW_SUFFIX)
# Width, height and rate in a name such as videoSRC01_1920x1080_30.yuv.
_RAW_NAME_PATTERN = re.compile(r"_(\d{1,5})x(\d{1,5})_(\d{1,3})(?:fps)?[._]")
_HD_MIN_HEIGHT = 720
# Of folders of frames, which do not say theirs.
_DEFAULT_FRAME_RATE = Fraction(30)


@dataclass(frozen=True)
class VideoClip:
    """Frames, uint8 (T, H, W, 3), and how many are shown in a second."""

    frames_THW3: np.ndarray
    frame_rate: Fraction


def read_video_clip(url: str, max_frames: int | None = None, max_side: int | None = None) -> VideoClip:
    """Reads a clip.

    Args:
        url: a video file, a .yuv file, or a folder of frames.
        frames: only the first so many.
        max_side: larger frames are shrunk to this longer side (Lanczos).

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    suffix = url.lower()[url.rfind(".") :]
    open_frames = (
        _open_raw if suffix == RAW_SUFFIX else _open_video_file if suffix in CLIP_SUFFIXES else _open_frame_folder
    )
    try:
        frame_rate, images = open_frames(url)
        frames_HW3 = [_even_crop(image, max_side) for image in islice(images, max_frames)]
    except ValueError as error:
        raise ValueError(str(error) if url in str(error) else f"{url} {error}") from error
    if len({picture.shape for picture in frames_HW3}) != 1:
        raise ValueError(f"{url} holds no frames" if not frames_HW3 else f"{url} has frames of different sizes")
    return VideoClip(np.stack(frames_HW3), frame_rate)


def _open_video_file(url: str) -> tuple[Fraction, Iterator[Image.Image]]:
    with storage.open_url(url) as file, open_video(file) as (_, stream):
        frame_rate = Fraction(stream.average_rate or stream.base_rate or _DEFAULT_FRAME_RATE)

    def iter_frames() -> Iterator[Image.Image]:
        with storage.open_url(url) as file, open_video(file) as (container, stream):
            yield from map(to_upright_rgb, decode_frames(container, stream))

    return frame_rate, iter_frames()


def _open_raw(url: str) -> tuple[Fraction, Iterator[Image.Image]]:
    match = _RAW_NAME_PATTERN.search(url.rsplit("/", 1)[-1])
    if not match:
        raise ValueError("does not tell its size; name it as videoSRC01_1920x1080_30.yuv: width, height, frames/s")
    if "10bit" in url.rsplit("/", 1)[-1]:
        raise ValueError("has 10 bits a sample by its name; raw files of 8 bits are read")
    width, height, frame_rate = map(int, match.groups())
    size = width * height * 3 // 2
    if width % 2 or height % 2 or not size or not frame_rate:
        raise ValueError(f"is {width} x {height} at {frame_rate} frames/s by its name; 4:2:0 has even sides")
    length = int(storage.filesystem(url)[0].size(storage.filesystem(url)[1]))
    if length % size or not length:
        raise ValueError(f"has {length} bytes, which is not a number of {width} x {height} frames of {size} bytes")
    color_space = Colorspace.ITU709 if height >= _HD_MIN_HEIGHT else Colorspace.ITU601

    def iter_frames() -> Iterator[Image.Image]:
        with storage.open_url(url) as file:
            while data := file.read(size):
                planes = np.frombuffer(data, np.uint8).reshape(height * 3 // 2, width)
                frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
                yield Image.fromarray(frame.reformat(format="rgb24", src_colorspace=color_space).to_ndarray())

    return Fraction(frame_rate), iter_frames()


def _open_frame_folder(url: str) -> tuple[Fraction, Iterator[Image.Image]]:
    def iter_frames() -> Iterator[Image.Image]:
        for name in storage.list_folder(url):
            try:
                yield decode_image(storage.read_bytes(storage.join(url, name)))
            except DECODE_ERRORS as error:
                raise ValueError(f"has {name}, which cannot be read as an image") from error

    return _DEFAULT_FRAME_RATE, iter_frames()


def _even_crop(image: Image.Image, max_side: int | None) -> np.ndarray:
    if max_side is not None and max(image.size) > max_side:
        image = image.resize(even_size(*image.size, max_side), Image.Resampling.LANCZOS)
    pixels_HW3 = np.asarray(image)
    return pixels_HW3[: pixels_HW3.shape[0] // 2 * 2, : pixels_HW3.shape[1] // 2 * 2]
