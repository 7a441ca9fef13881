"""Read whole clips to compress: video files, raw YUV, or folders of frames.

The name of a raw YUV file gives its size and rate. It is 8-bit 4:2:0 (planes Y, U, V of each frame), the form of
MCL-JCV and UVG; its colors are those of BT.709 from 720 lines on and of BT.601 below. Video codecs store one color for
two by two pixels, so an odd last row or column is cut.

Stored pixels are compared, square or not. Clips that are stored as 8-bit 4:2:0 keep their planes: video
codecs encode them as they are, and every codec is compared with their conversion to RGB.

Shape suffixes: T frames, H and W pixels, P rows of the planes Y, U and V (3 / 2 H).
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any

import av
import numpy as np
from PIL import Image

from bsq_ray import storage
from bsq_ray.data.folder_listing import FolderListing, natural_key, walk_files
from bsq_ray.media.color import ColorDescription, frame_color, frame_to_rgb, planes_to_rgb, rgb_to_frame, stored_planes
from bsq_ray.media.decode_error import translate_decode_errors
from bsq_ray.media.frame_display import frame_orientation
from bsq_ray.media.images import IMAGE_SUFFIXES, decode_image
from bsq_ray.media.orientation import UPRIGHT, to_upright
from bsq_ray.media.video_reader import VIDEO_SUFFIXES, decode_frames, open_video, scan_video
from bsq_ray.media.video_writer import even_size

RAW_SUFFIX = ".yuv"
CLIP_SUFFIXES = (*VIDEO_SUFFIXES, ".y4m", RAW_SUFFIX)
# Width, height and rate in a name such as videoSRC01_1920x1080_30.yuv.
_RAW_NAME_PATTERN = re.compile(r"_(\d{1,5})x(\d{1,5})_(\d{1,3})(?:fps)?[._]")
# Rate of a folder of frames, which has none of its own.
_DEFAULT_FRAME_RATE = Fraction(30)


@dataclass(frozen=True)
class StoredPlanes:
    """Frames as they are stored, 8-bit 4:2:0.

    Attributes:
        planes_TPW: uint8 (T, 3 / 2 H, W).
        color: how they are converted to RGB.
    """

    planes_TPW: np.ndarray
    color: ColorDescription


@dataclass(frozen=True)
class VideoClip:
    """A clip in memory.

    Attributes:
        frames_THW3: frames, uint8 RGB (T, H, W, 3).
        frame_rate: frames per second.
        stored: the frames as they are stored, if as 8-bit 4:2:0 of this size.
    """

    frames_THW3: np.ndarray
    frame_rate: Fraction
    stored: StoredPlanes | None = None

    def frames_420(self) -> Iterator[Any]:
        """Yield the frames as `av.VideoFrame` of 8-bit 4:2:0: as they are stored, or converted from RGB."""
        if self.stored is None:
            yield from (rgb_to_frame(pixels_HW3, "yuv420p") for pixels_HW3 in self.frames_THW3)
            return
        for planes_PW in self.stored.planes_TPW:
            yield av.VideoFrame.from_ndarray(np.ascontiguousarray(planes_PW), "yuv420p")


@dataclass(frozen=True)
class _ClipFrame:
    """One frame: pixels (H, W, 3), and its planes (3 / 2 H, W) if they are stored as 8-bit 4:2:0 with even sides."""

    pixels_HW3: np.ndarray
    planes_PW: np.ndarray | None = None
    color: ColorDescription | None = None


# Frames per second, and the frames in order.
_Frames = tuple[Fraction, Iterator[_ClipFrame]]


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
            clip_frames = [_crop_to_even(frame, max_side) for frame in islice(frames, max_frames)]
    except ValueError as error:
        raise ValueError(str(error) if url in str(error) else f"{url}: {error}") from error
    if len({frame.pixels_HW3.shape for frame in clip_frames}) != 1:
        raise ValueError(f"{url} has frames of different sizes" if clip_frames else f"{url} contains no frames")
    return VideoClip(np.stack([frame.pixels_HW3 for frame in clip_frames]), frame_rate, _stack_planes(clip_frames))


def _stack_planes(frames: list[_ClipFrame]) -> StoredPlanes | None:
    color, planes = frames[0].color, [frame.planes_PW for frame in frames if frame.planes_PW is not None]
    is_uniform = all(frame.color == color for frame in frames)
    if color is None or not is_uniform or len(planes) < len(frames):
        return None
    return StoredPlanes(np.stack(planes), color)


@contextmanager
def _open_video_file(url: str) -> Generator[_Frames, None, None]:
    with storage.open_url(url) as file:
        frame_rate = scan_video(file).frame_rate
        with open_video(file) as (container, stream):
            yield frame_rate, map(_to_clip_frame, decode_frames(container, stream))


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
    with storage.open_url(url) as file:
        blocks = iter(lambda: file.read(frame_bytes), b"")
        planes = (np.frombuffer(block, np.uint8).reshape(height * 3 // 2, width) for block in blocks)
        yield Fraction(frame_rate), (_to_clip_frame(av.VideoFrame.from_ndarray(each, "yuv420p")) for each in planes)


@contextmanager
def _open_frame_folder(url: str) -> Generator[_Frames, None, None]:
    yield _DEFAULT_FRAME_RATE, _read_frame_files(url)


def _read_frame_files(url: str) -> Iterator[_ClipFrame]:
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
        yield _ClipFrame(pixels_HW3)


def _to_clip_frame(frame: Any) -> _ClipFrame:
    with translate_decode_errors():
        orientation = frame_orientation(frame)
        planes_PW, color = stored_planes(frame), frame_color(frame)
        if planes_PW is None or orientation != UPRIGHT:
            return _ClipFrame(to_upright(frame_to_rgb(frame), orientation))
        return _ClipFrame(planes_to_rgb(planes_PW, color), planes_PW, color)


def _crop_to_even(frame: _ClipFrame, max_side: int | None) -> _ClipFrame:
    height, width = frame.pixels_HW3.shape[:2]
    if max_side is not None and max(height, width) > max_side:
        size = even_size(width, height, max_side)
        return _ClipFrame(np.asarray(Image.fromarray(frame.pixels_HW3).resize(size, Image.Resampling.LANCZOS)))
    if height % 2 == 0 and width % 2 == 0:
        return frame
    return _ClipFrame(frame.pixels_HW3[: height // 2 * 2, : width // 2 * 2])
