"""Read whole clips to compress: video files, raw YUV, or folders of frames.

The name of a raw YUV file gives its size and rate. It is 8-bit 4:2:0 (planes Y, U, V of each frame), the form of
MCL-JCV and UVG; its colors are those of BT.709 from 720 lines on and of BT.601 below. Video codecs store one color for
two by two pixels, so an odd last row or column is cut.

Shape suffixes: T frames, H and W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image

from bsq_ray import storage
from bsq_ray.data.folder_listing import FolderListing, natural_key, walk_files
from bsq_ray.media.color import frame_to_rgb
from bsq_ray.media.decode_error import translate_decode_errors
from bsq_ray.media.images import IMAGE_SUFFIXES, decode_image
from bsq_ray.media.video_reader import VIDEO_SUFFIXES, read_video
from bsq_ray.media.video_writer import even_size

RAW_SUFFIX = ".yuv"
CLIP_SUFFIXES = (*VIDEO_SUFFIXES, ".y4m", RAW_SUFFIX)
# Width, height and rate in a name such as videoSRC01_1920x1080_30.yuv.
_RAW_NAME_PATTERN = re.compile(r"_(\d{1,5})x(\d{1,5})_(\d{1,3})(?:fps)?[._]")
_HD_MIN_HEIGHT = 720
# Rate of a folder of frames, which has none of its own.
_DEFAULT_FRAME_RATE = Fraction(30)

# Frames per second, and the frames in order, uint8 RGB (H, W, 3).
_Frames = tuple[Fraction, Iterator[np.ndarray]]


@dataclass(frozen=True)
class VideoClip:
    """Frames, uint8 (T, H, W, 3), and their number per second."""

    frames_THW3: np.ndarray
    frame_rate: Fraction


def read_video_clip(url: str, max_frames: int | None = None, max_side: int | None = None) -> VideoClip:
    """Read a clip into memory.

    Args:
        url: a video file, a .yuv file, or a folder of frames.
        max_frames: number of leading frames to read; None reads all.
        max_side: larger frames are shrunk to this longer side (Lanczos).

    Raises:
        ValueError: the clip cannot be read; the message names it.
    """
    suffix = url.lower()[url.rfind(".") :]
    if suffix == RAW_SUFFIX:
        open_frames = _open_raw
    elif suffix in CLIP_SUFFIXES:
        open_frames = _open_video_file
    else:
        open_frames = _open_frame_folder
    try:
        with open_frames(url) as (frame_rate, frames):
            frames_HW3 = [_even_crop(pixels_HW3, max_side) for pixels_HW3 in islice(frames, max_frames)]
    except ValueError as error:
        raise ValueError(str(error) if url in str(error) else f"{url}: {error}") from error
    if len({frame.shape for frame in frames_HW3}) != 1:
        raise ValueError(f"{url} has frames of different sizes" if frames_HW3 else f"{url} contains no frames")
    return VideoClip(np.stack(frames_HW3), frame_rate)


@contextmanager
def _open_video_file(url: str) -> Generator[_Frames, None, None]:
    with storage.open_url(url) as file:
        video = read_video(file)
        try:
            yield video.frame_rate, video.frames
        finally:
            video.frames.close()


@contextmanager
def _open_raw(url: str) -> Generator[_Frames, None, None]:
    name = url.rsplit("/", 1)[-1]
    match = _RAW_NAME_PATTERN.search(name)
    if not match:
        raise ValueError("the name has no frame size; rename it like videoSRC01_1920x1080_30.yuv: width, height, rate")
    if "10bit" in name:
        raise ValueError("the file name has 10 bits per sample; convert it to 8 bits")
    width, height, frame_rate = map(int, match.groups())
    frame_bytes = width * height * 3 // 2
    if width % 2 or height % 2 or not frame_bytes or not frame_rate:
        raise ValueError(f"the file name has {width} x {height} at {frame_rate} frames/s; 4:2:0 requires even sides")
    fs, path = storage.filesystem(url)
    num_bytes = int(fs.size(path))
    if num_bytes % frame_bytes or not num_bytes:
        raise ValueError(f"{num_bytes} bytes are not a multiple of {frame_bytes}, a frame of {width} x {height} pixels")
    colorspace = Colorspace.ITU709 if height >= _HD_MIN_HEIGHT else Colorspace.ITU601
    with storage.open_url(url) as file:
        blocks = iter(lambda: file.read(frame_bytes), b"")
        planes = (np.frombuffer(block, np.uint8).reshape(height * 3 // 2, width) for block in blocks)
        yield (
            Fraction(frame_rate),
            (frame_to_rgb(av.VideoFrame.from_ndarray(each, "yuv420p"), colorspace) for each in planes),
        )


@contextmanager
def _open_frame_folder(url: str) -> Generator[_Frames, None, None]:
    yield _DEFAULT_FRAME_RATE, _read_frame_files(url)


def _read_frame_files(url: str) -> Iterator[np.ndarray]:
    """Yield the images of a folder, their numbers in order: 1, 2, 10."""
    listing = FolderListing()
    names = [file.name for file in walk_files(url, listing) if "/" not in file.name]
    if listing.broken_links:
        raise ValueError(f"{listing.broken_links[0]} is a link to a file that does not exist")
    image_names = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    for name in sorted(image_names or names, key=natural_key):
        data = storage.read_bytes(storage.join(url, name))
        with translate_decode_errors(f"{name} cannot be read as an image: "):
            pixels_HW3 = np.asarray(decode_image(data))
        yield pixels_HW3


def _even_crop(pixels_HW3: np.ndarray, max_side: int | None) -> np.ndarray:
    height, width = pixels_HW3.shape[:2]
    if max_side is not None and max(height, width) > max_side:
        size = even_size(width, height, max_side)
        return np.asarray(Image.fromarray(pixels_HW3).resize(size, Image.Resampling.LANCZOS))
    return pixels_HW3[: height // 2 * 2, : width // 2 * 2]
