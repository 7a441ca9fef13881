"""Video files that strangers send: recognised, bounded and decoded frame by frame; and frames back to files.

Only containers that say in their first bytes what they are, and what streams they hold, are opened, each by its own
reader: FFmpeg never looks for one, and none of these follows addresses that a file names. It works in a process apart.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterable
from dataclasses import replace
from fractions import Fraction

import numpy as np

from bsq_ray.media.color import Color
from bsq_ray.media.video_files import TooLargeError, VideoStream, write_video
from bsq_ray.serving.errors import Refused
from bsq_ray.serving.media.video_sandbox import read_apart
from bsq_ray.serving.service_config import Limits

# What answers can be: media types, and FFmpeg's names of them.
MP4, MKV = "video/mp4", "video/x-matroska"
_KINDS = {MP4: "mp4", MKV: "matroska"}
# What is read, in words.
VIDEOS = "MP4, MOV, 3GP, MKV, WebM, AVI, Ogg and WMV"
# What begins with these bytes is a video: place of the bytes, the bytes, FFmpeg's name.
_CONTAINERS = (
    (0, b"\x1a\x45\xdf\xa3", "matroska"), (8, b"AVI ", "avi"), (0, b"OggS", "ogg"), (0, b"\x30\x26\xb2\x75", "asf"),
    (4, b"moov", "mov"), (4, b"mdat", "mov"), (4, b"wide", "mov"), (4, b"ftyp", "mov"),
)  # fmt: skip
# Images in the container of MP4.
_IMAGE_BRANDS = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix")


def is_clip(data: bytes) -> bool:
    """Whether a body is a video file."""
    return _container(data) is not None


def read_clip(data: bytes, limits: Limits, least: int = 1) -> VideoStream:
    """Opens a video; its frames are decoded as they are taken, and end with a refusal at the limit.

    Args:
        least: pixels that each frame counts as at least.

    Raises:
        Refused: 413 too many pixels, 422 damaged; while frames are taken, too.
    """
    kind = _container(data)
    assert kind is not None
    try:
        video = read_apart(data, kind, limits.pixels, limits.seconds)
    except TooLargeError as error:
        raise _too_large(error) from None
    except ValueError as error:
        raise Refused(422, f"the video cannot be read: {error}") from None
    return replace(video, frames=_bounded(video, limits, least))


def check_length(frames: int, pixels: int, limits: Limits) -> None:
    """Refuses a clip that is too long.

    Args:
        pixels: of a frame.

    Raises:
        Refused: 413.
    """
    if frames * pixels > limits.clip_pixels:
        raise Refused(
            413,
            f"the video has more than the {limits.clip_pixels} pixels in all its frames that are taken; shorten or "
            "shrink it first",
        )


def written(frames: Iterable[np.ndarray], media_type: str, rate: Fraction, colour: Color) -> tuple[bytes, int]:
    """A video file of frames, uint8 (H, W, 3), and how many there were.

    Raises:
        Refused: 422 there is no such video; or what taking the frames raises.
    """
    file = io.BytesIO()
    try:
        count = write_video(file, _KINDS[media_type], frames, rate, colour)
    except ValueError as error:
        raise Refused(422, str(error)) from None
    return file.getvalue(), count


def wanted_type(accept: str, default: str) -> str:
    """The media type that an Accept header names, or the default."""
    named = [kind for kind in _KINDS if kind in accept]
    return min(named, key=accept.index) if named else default


def _container(data: bytes) -> str | None:
    for place, begin, name in _CONTAINERS:
        if data[place : place + 4] == begin:
            return None if begin == b"ftyp" and data[8:12] in _IMAGE_BRANDS else name
    return None


def _bounded(video: VideoStream, limits: Limits, least: int) -> Generator[np.ndarray, None, None]:
    frames, count = video.frames, 0
    try:
        check_length(video.num_frames, max(video.size[0] * video.size[1], least), limits)
        for frame in frames:
            count += 1
            check_length(count, max(frame.shape[0] * frame.shape[1], least), limits)
            yield frame
    except TooLargeError as error:
        raise _too_large(error) from None
    except ValueError as error:
        raise Refused(422, str(error)) from None
    finally:
        frames.close()


def _too_large(error: TooLargeError) -> Refused:
    return Refused(413, f"the video is too large: {error}")
