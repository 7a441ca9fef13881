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
from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.media.video_sandbox import read_video_sandboxed
from bsq_ray.serving.service_config import Limits

# What answers can be: media types, and FFmpeg's names of them.
MP4, MKV = "video/mp4", "video/x-matroska"
_FFMPEG_FORMATS = {MP4: "mp4", MKV: "matroska"}
# What is read, in words.
VIDEO_FORMAT_NAMES = "MP4, MOV, 3GP, MKV, WebM, AVI, Ogg and WMV"
# What begins with these bytes is a video: place of the bytes, the bytes, FFmpeg's name.
_CONTAINER_SIGNATURES = (
    (0, b"\x1a\x45\xdf\xa3", "matroska"), (8, b"AVI ", "avi"), (0, b"OggS", "ogg"), (0, b"\x30\x26\xb2\x75", "asf"),
    (4, b"moov", "mov"), (4, b"mdat", "mov"), (4, b"wide", "mov"), (4, b"ftyp", "mov"),
)  # fmt: skip
# Images in the container of MP4.
_IMAGE_BRANDS = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix")


def is_video(data: bytes) -> bool:
    """Whether a body is a video file."""
    return _detect_container(data) is not None


def read_uploaded_video(data: bytes, limits: Limits, min_pixels_per_frame: int = 1) -> VideoStream:
    """Opens a video; its frames are decoded as they are taken, and end with a refusal at the limit.

    Args:
        least: pixels that each frame counts as at least.

    Raises:
        Refused: 413 too many pixels, 422 damaged; while frames are taken, too.
    """
    container = _detect_container(data)
    assert container is not None
    try:
        video = read_video_sandboxed(data, container, limits.max_pixels, limits.request_timeout_s)
    except TooLargeError as error:
        raise _too_large_error(error) from None
    except ValueError as error:
        raise ApiError(422, f"the video cannot be read: {error}") from None
    return replace(video, frames=_limit_frames(video, limits, min_pixels_per_frame))


def check_total_pixels(num_frames: int, pixels_per_frame: int, limits: Limits) -> None:
    """Refuses a clip that is too long.

    Args:
        pixels: of a frame.

    Raises:
        Refused: 413.
    """
    if num_frames * pixels_per_frame > limits.max_video_pixels:
        raise ApiError(
            413,
            f"the video has more than the {limits.max_video_pixels} pixels in all its frames that are taken; shorten or "
            "shrink it first",
        )


def encode_video_file(frames: Iterable[np.ndarray], media_type: str, rate: Fraction, color: Color) -> tuple[bytes, int]:
    """A video file of frames, uint8 (H, W, 3), and how many there were.

    Raises:
        Refused: 422 there is no such video; or what taking the frames raises.
    """
    file = io.BytesIO()
    try:
        num_frames = write_video(file, _FFMPEG_FORMATS[media_type], frames, rate, color)
    except ValueError as error:
        raise ApiError(422, str(error)) from None
    return file.getvalue(), num_frames


def negotiate_media_type(accept: str, default: str) -> str:
    """The media type that an Accept header names, or the default."""
    accepted = [kind for kind in _FFMPEG_FORMATS if kind in accept]
    return min(accepted, key=accept.index) if accepted else default


def _detect_container(data: bytes) -> str | None:
    for offset, signature, container in _CONTAINER_SIGNATURES:
        if data[offset : offset + 4] == signature:
            return None if signature == b"ftyp" and data[8:12] in _IMAGE_BRANDS else container
    return None


def _limit_frames(video: VideoStream, limits: Limits, min_pixels_per_frame: int) -> Generator[np.ndarray, None, None]:
    frames, num_frames = video.frames, 0
    try:
        check_total_pixels(video.num_frames, max(video.size[0] * video.size[1], min_pixels_per_frame), limits)
        for frame in frames:
            num_frames += 1
            check_total_pixels(num_frames, max(frame.shape[0] * frame.shape[1], min_pixels_per_frame), limits)
            yield frame
    except TooLargeError as error:
        raise _too_large_error(error) from None
    except ValueError as error:
        raise ApiError(422, str(error)) from None
    finally:
        frames.close()


def _too_large_error(error: TooLargeError) -> ApiError:
    return ApiError(413, f"the video is too large: {error}")
