"""Decode video files, through PyAV (FFmpeg): whole ones frame by frame, and clips from the middle.

    file ─read_video─▶ `VideoStream`: every frame in order, with limits for untrusted files
    file ─probe, once, at packing─▶ `VideoInfo`: frames, rate, size, frames at which decoding can start
    file + `VideoInfo` ─seek to the key frame before─decode─▶ every n-th frame, by `read_frames`

Frames are numbered in the order of display; those that an edit list hides do not count. `display_rgb` is the only
conversion from decoded frames to pixels. Audio is ignored. Whatever FFmpeg raises becomes one `DecodeError`.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, TYPE_CHECKING, Any

import av
import numpy as np

from bsq_ray.media.color import ColorDescription, frame_color
from bsq_ray.media.decode_error import DecodeError, TooLargeError, error_text, translate_decode_errors
from bsq_ray.media.frame_display import display_rgb, display_size
from bsq_ray.media.limits import MAX_PIXELS
from bsq_ray.media.packet_scan import PacketScan, scan_packets
from bsq_ray.runtime.wrong_files import describe_wrong_binary

if TYPE_CHECKING:
    from PIL import Image

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".m2ts", ".mts", ".ts", ".vob", ".wmv", ".asf",
    ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".rm", ".swf", ".mxf",
)  # fmt: skip

# Largest deviation of a regular frame interval, relative to the usual one, and the largest fraction of other intervals.
_INTERVAL_TOLERANCE, _MAX_IRREGULAR_FRACTION = 0.5, 0.05
# Frames that a decoder may return out of order.
_MAX_REORDERED_FRAMES = 32
# A file with a smaller fraction of the frames it declares is truncated or damaged.
_MIN_DECODED_FRACTION = 0.9
# Bytes by which a file that is no video is recognized.
_HEAD_BYTES = 2**16


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video file that reading clips from it needs.

    Attributes:
        frames: number of frames that can be decoded.
        fps: frames per second.
        width, height: pixels of display: upright, square.
        key_frames: numbers of the frames at which decoding can start; the first is 0.
        key_times: their time stamps, in units of the stream's time base.
    """

    frames: int
    fps: float
    width: int
    height: int
    key_frames: tuple[int, ...]
    key_times: tuple[int, ...]


@dataclass(frozen=True)
class VideoProbe:
    """A video and the times of its frames.

    Attributes:
        video: the part that the manifest stores.
        times_s: time of each frame, seconds, float64 (frames,).
        interval_s: usual time between frames, seconds.
    """

    video: VideoInfo
    times_s: np.ndarray
    interval_s: float

    @property
    def is_variable_rate(self) -> bool:
        """True if the frames do not follow each other at a constant rate."""
        is_irregular = np.abs(np.diff(self.times_s) / self.interval_s - 1) > _INTERVAL_TOLERANCE
        return bool(is_irregular.mean() > _MAX_IRREGULAR_FRACTION) if len(is_irregular) else False


@dataclass(frozen=True)
class VideoStream:
    """A video that is being read.

    Attributes:
        frames: RGB frames of display, uint8 (H, W, 3), decoded on demand; closing it closes the file.
        frame_rate: frames per second; the mean of a variable rate, so that the duration is kept.
        num_frames: number of frames that the file declares or has, the larger one; 0 if unknown.
        size: width and height of the frames of display, pixels.
        color: what the file is marked with.
        has_audio: True if the file has sound, which is ignored.
    """

    frames: Generator[np.ndarray, None, None]
    frame_rate: Fraction
    num_frames: int
    size: tuple[int, int]
    color: ColorDescription
    has_audio: bool


def read_video(file: IO[bytes] | str, container_format: str | None = None, max_pixels: int = MAX_PIXELS) -> VideoStream:
    """Open a video to read its frames in order; the first frame is decoded at once.

    Args:
        file: path, or an open file.
        container_format: FFmpeg's name of the container; None detects it.
        max_pixels: largest number of pixels of a frame, checked against the header before anything is decoded and
            against every frame.

    Raises:
        TooLargeError: the frames are too large; also raised while frames are read.
        DecodeError: the file is not a video; or, while frames are read, it is damaged.
    """
    # FFmpeg would otherwise decode frames while it looks for the streams.
    options = {"skip_frame": "all"}
    scan = scan_video(file, container_format, options, max_pixels)
    container, stream = _open_container(file, container_format, options)
    try:
        with translate_decode_errors():
            stream.thread_type = "AUTO"
            # The size may change between frames. FFmpeg counts the padding of its decoders, too.
            stream.codec_context.options = {"max_pixels": str(4 * max_pixels + 2**17)}
            decoded = decode_frames(container, stream, max_pixels)
            first = next(decoded, None)
            if first is None:
                raise DecodeError("the video has no frames")
            size = display_size(first, stream)
            has_audio = bool(container.streams.audio)
    except BaseException:
        container.close()
        raise
    frames = _iter_display_rgb(container, stream, first, decoded)
    return VideoStream(frames, scan.frame_rate, scan.num_frames, size, frame_color(first), has_audio)


def scan_video(
    file: IO[bytes] | str,
    container_format: str | None = None,
    options: dict[str, str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> PacketScan:
    """Read frame rate and number of frames of a video without decoding it, and rewind the file.

    Raises:
        TooLargeError: the frames that the header declares are too large.
        DecodeError: the file is not a video.
    """
    container, stream = _open_container(file, container_format, options)
    with container, translate_decode_errors():
        _check_size(stream.width, stream.height, max_pixels)
        scan = scan_packets(container, stream)
    if not isinstance(file, str):
        file.seek(0)
    return scan


def _iter_display_rgb(
    container: Any, stream: Any, first: Any, others: Iterator[Any]
) -> Generator[np.ndarray, None, None]:
    with container:
        for frame in itertools.chain([first], others):
            with translate_decode_errors():
                pixels_HW3 = display_rgb(frame, stream)
            yield pixels_HW3


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLargeError(f"its frames have {width} x {height} pixels; at most {max_pixels} are allowed")


@translate_decode_errors()
def probe(file: IO[bytes]) -> VideoProbe:
    """Decode a whole video and record what reading clips from it needs.

    Raises:
        DecodeError: the file is not a video, or it is damaged; the message gives the reason.
    """
    scan = scan_video(file)
    with open_video(file) as (container, stream):
        times: list[int] = []
        key_frames: list[int] = []
        size, num_corrupt = (0, 0), 0
        num_declared = min(stream.frames, scan.num_visible)
        for frame in decode_frames(container, stream):
            if frame.key_frame:
                key_frames.append(len(times))
            num_corrupt += frame.is_corrupt
            size = size if times else display_size(frame, stream)
            times.append(frame_timestamp(frame))
        time_base = float(stream.time_base or Fraction(1, 1))
    if not times:
        raise DecodeError("the video has no frames")
    if num_corrupt:
        raise DecodeError(f"{num_corrupt} of {len(times)} frames are corrupt")
    if scan.num_packets < _MIN_DECODED_FRACTION * scan.num_expected:
        raise DecodeError(f"the video ends after {scan.num_packets} of {scan.num_expected} frames")
    # Some decoders start without a key frame.
    num_declared -= max(0, scan.num_before_key - sum(time < scan.first_key_time for time in times))
    if len(times) < _MIN_DECODED_FRACTION * num_declared:
        raise DecodeError(f"only {len(times)} of {num_declared} frames can be decoded")
    interval_s = _usual_interval(np.diff(times) * time_base) or 1 / float(scan.frame_rate)
    seekable = [0, *(key for key in key_frames if key and _is_seekable(times, key))]
    video = VideoInfo(len(times), 1 / interval_s, *size, tuple(seekable), tuple(times[key] for key in seekable))
    return VideoProbe(video, np.array(times) * time_base, interval_s)


def _usual_interval(intervals_s: np.ndarray) -> float:
    """Return the mean of the intervals near the median, in which rounded time stamps cancel; 0 if there is none."""
    if not len(intervals_s):
        return 0.0
    median = np.median(intervals_s)
    near = intervals_s[np.abs(intervals_s - median) <= _INTERVAL_TOLERANCE * median]
    return float(near.mean()) if len(near) else 0.0


def _is_seekable(times: list[int], key: int) -> bool:
    """Return True if no frame near a key frame is out of order, so that seeking to its time finds it."""
    near = slice(max(0, key - _MAX_REORDERED_FRAMES), key + _MAX_REORDERED_FRAMES)
    return times[near] == sorted(set(times[near]))


def read_frames(file: IO[bytes], video: VideoInfo, start: int, num_frames: int, stride: int) -> Iterator[Image.Image]:
    """Read frames start, start + stride, … as RGB; decoding starts at the last key frame before them.

    Raises:
        DecodeError: the file is damaged, or not the one that `video` describes.
    """
    # Imported here because the process that decodes each uploaded video must start fast.
    from PIL import Image

    frame_indices = range(start, start + num_frames * stride, stride)
    key_index = bisect.bisect_right(video.key_frames, start) - 1
    num_yielded = 0
    for number, frame, stream in _decode_from_key_frame(file, video, key_index):
        if number == frame_indices[num_yielded]:
            with translate_decode_errors():
                image = Image.fromarray(display_rgb(frame, stream))
            yield image
            num_yielded += 1
            if num_yielded == num_frames:
                return
    raise DecodeError(f"the video ends before frame {frame_indices[num_yielded]} of {video.frames}")


def _decode_from_key_frame(file: IO[bytes], video: VideoInfo, key_index: int) -> Iterator[tuple[int, Any, Any]]:
    """Yield number, frame and stream of each frame from a key frame on, or from frame 0 if no seek finds it."""
    if key_index:
        with open_video(file) as (container, stream):
            frames = _seek(container, stream, video.key_times[key_index])
            first = next(frames, None)
            if first is not None:
                for number, frame in enumerate(itertools.chain([first], frames), video.key_frames[key_index]):
                    yield number, frame, stream
                return
    file.seek(0)
    with open_video(file) as (container, stream):
        for number, frame in enumerate(decode_frames(container, stream)):
            yield number, frame, stream


def _seek(container: Any, stream: Any, timestamp: int) -> Iterator[Any]:
    """Yield frames from the one with this time stamp on; none if it is not found."""
    try:
        container.seek(timestamp, stream=stream)
    except av.FFmpegError:
        return
    frames = decode_frames(container, stream)
    # Frames that are displayed before their key frame lack their reference frames.
    first = next((frame for frame in frames if frame_timestamp(frame) >= timestamp), None)
    if first is not None and frame_timestamp(first) == timestamp:
        yield first
        yield from frames


@contextmanager
def open_video(file: IO[bytes]) -> Iterator[tuple[Any, Any]]:
    """Open a container and its first video stream, decoded by one thread.

    Raises:
        DecodeError: the file is not a video.
    """
    container, stream = _open_container(file)
    with container:
        # Threads inside a decoder can hang when many decoders run; readers run in parallel instead.
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        yield container, stream


def _open_container(
    file: IO[bytes] | str, container_format: str | None = None, options: dict[str, str] | None = None
) -> tuple[Any, Any]:
    try:
        # Titles and comments may have any encoding.
        container = av.open(file, format=container_format, options=options or {}, metadata_errors="replace")
    except Exception as error:
        head = _read_head(file)
        description = describe_wrong_binary(head) if head is not None else ""
        reason = f"it {description}" if description else ffmpeg_error_text(error)
        raise DecodeError(f"not a video of a known format ({reason})") from error
    if not container.streams.video:
        container.close()
        raise DecodeError("the file has no video stream")
    return container, container.streams.video[0]


def _read_head(file: IO[bytes] | str) -> bytes | None:
    """Return the first bytes of a file, or None if they cannot be read again."""
    try:
        if isinstance(file, str):
            with open(file, "rb") as opened:
                return opened.read(_HEAD_BYTES)
        file.seek(0)
        return file.read(_HEAD_BYTES)
    except (OSError, ValueError):
        return None


def decode_frames(container: Any, stream: Any, max_pixels: int = MAX_PIXELS) -> Iterator[Any]:
    """Decode frames (`av.VideoFrame`) in the order of display.

    Raises:
        TooLargeError: a frame has more than `max_pixels` pixels.
        DecodeError: the file is damaged.
    """
    num_decoded = 0
    try:
        for packet in container.demux(stream):
            # An empty packet repeats the frame before. Only the last one, without a time stamp, flushes the decoder.
            if packet.size or packet.dts is None:
                for frame in packet.decode():
                    # A frame need not have the size that the header declares.
                    _check_size(frame.width, frame.height, max_pixels)
                    yield frame
                    num_decoded += 1
    except TooLargeError:
        raise
    except Exception as error:
        raise DecodeError(
            f"the video is damaged after {num_decoded} decoded frames ({ffmpeg_error_text(error)})"
        ) from error


def ffmpeg_error_text(error: Exception) -> str:
    """Return a short reason for an error of PyAV."""
    return " ".join((getattr(error, "strerror", None) or "").split()) or error_text(error)


def frame_timestamp(frame: Any) -> int:
    """Return the time stamp of a frame, in units of the stream's time base.

    Raises:
        DecodeError: the frame has none.
    """
    time = frame.pts if frame.pts is not None else frame.dts
    if time is None:
        raise DecodeError("the video has frames without time stamps")
    return int(time)
