"""Decode untrusted video files frame by frame with size limits, and encode result videos.

The container is detected by the signature in the first bytes, and opened with the demuxer of this container only.
FFmpeg never probes formats, and none of these demuxers follows URLs in a file. Decoding runs in a subprocess.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from fractions import Fraction

import numpy as np

from bsq_ray.media.color import ColorDescription
from bsq_ray.media.decode_error import TooLargeError
from bsq_ray.media.video_reader import VideoStream
from bsq_ray.media.video_writer import write_video
from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.media.video_sandbox import read_video_sandboxed
from bsq_ray.serving.service_config import Limits

# Media types of responses, and the FFmpeg format of each.
MP4, MKV = "video/mp4", "video/x-matroska"
_FFMPEG_FORMATS = {MP4: "mp4", MKV: "matroska"}
# Supported formats, for error messages.
VIDEO_FORMAT_NAMES = "MP4, MOV, 3GP, MKV, WebM, AVI, Ogg and WMV"
# Signatures of video containers: offset, bytes, name of the FFmpeg demuxer.
_CONTAINER_SIGNATURES = (
    (0, b"\x1a\x45\xdf\xa3", "matroska"), (8, b"AVI ", "avi"), (0, b"OggS", "ogg"), (0, b"\x30\x26\xb2\x75", "asf"),
    (4, b"moov", "mov"), (4, b"mdat", "mov"), (4, b"wide", "mov"), (4, b"ftyp", "mov"),
)  # fmt: skip
# `ftyp` brands of image formats that use the MP4 container (AVIF, HEIF).
_IMAGE_BRANDS = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix")


def is_video(data: bytes) -> bool:
    """Return True if the content is a video file."""
    return _detect_container(data) is not None


def read_uploaded_video(data: bytes, limits: Limits, count_pixels: Callable[[int, int], int]) -> VideoStream:
    """Open an uploaded video; its frames are decoded lazily, during iteration.

    Args:
        data: content of a file for which `is_video` is True.
        count_pixels: pixels to compute for a frame, of its height and width.

    Raises:
        ApiError: 413 too many pixels, 422 damaged; also while frames are iterated.
    """
    container = _detect_container(data)
    assert container is not None
    try:
        video = read_video_sandboxed(data, container, max_pixels=limits.max_pixels, timeout_s=limits.request_timeout_s)
    except TooLargeError as error:
        raise _too_large_error(error) from None
    except ValueError as error:
        raise ApiError(422, f"the video cannot be read: {error}") from None
    return replace(video, frames=_limit_frames(video, limits, count_pixels))


def check_total_pixels(num_frames: int, pixels_per_frame: int, limits: Limits) -> None:
    """Reject a video that is too long.

    Raises:
        ApiError: 413 too many pixels in all frames.
    """
    if num_frames * pixels_per_frame > limits.max_video_pixels:
        raise ApiError(
            413,
            f"the video has more than {limits.max_video_pixels} pixels in all frames; shorten or downscale it first",
        )


def encode_video_file(
    frames: Iterable[np.ndarray], media_type: str, *, rate: Fraction, color: ColorDescription
) -> tuple[bytes, int]:
    """Encode frames, uint8 (H, W, 3), as a video; return the content of the file and the number of frames.

    Args:
        frames: RGB frames of the same size.
        media_type: `MP4` or `MKV`.
        rate: frames per second.
        color: color description of the encoded video.

    Raises:
        ApiError: 422 the frames cannot be encoded. Errors of `frames` propagate.
    """
    file = io.BytesIO()
    try:
        num_frames = write_video(file, _FFMPEG_FORMATS[media_type], frames, rate, color)
    except ValueError as error:
        raise ApiError(422, str(error)) from None
    return file.getvalue(), num_frames


def negotiate_media_type(accept: str, default: str) -> str:
    """Return the first supported media type in an Accept header, or the default."""
    accepted = [media_type for media_type in _FFMPEG_FORMATS if media_type in accept]
    return min(accepted, key=accept.index) if accepted else default


def _detect_container(data: bytes) -> str | None:
    for offset, signature, container in _CONTAINER_SIGNATURES:
        if data[offset : offset + 4] == signature:
            return None if signature == b"ftyp" and data[8:12] in _IMAGE_BRANDS else container
    return None


def _limit_frames(
    video: VideoStream, limits: Limits, count_pixels: Callable[[int, int], int]
) -> Generator[np.ndarray, None, None]:
    frames, num_frames = video.frames, 0
    try:
        width, height = video.size
        check_total_pixels(video.num_frames, count_pixels(height, width), limits)
        for frame in frames:
            num_frames += 1
            check_total_pixels(num_frames, count_pixels(*frame.shape[:2]), limits)
            yield frame
    except TooLargeError as error:
        raise _too_large_error(error) from None
    except ValueError as error:
        raise ApiError(422, str(error)) from None
    finally:
        frames.close()


def _too_large_error(error: TooLargeError) -> ApiError:
    return ApiError(413, f"the video is too large: {error}")
