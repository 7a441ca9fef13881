"""Video files to frames: which frames there are, and reading some of them without decoding the others.

    file ─probe, once, when it is packed─▶ `Video`: frames, rate, size, where decoding can begin
    file + `Video` ─seek to the key frame before─decode─▶ every n-th frame as RGB

Frames are numbered in the order in which they are shown. Decoding takes one thread: the readers run side by side.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, Any

import av
import numpy as np
from PIL import Image

from bsq_ray.data.manifest import VideoInfo

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".m2ts", ".mts", ".ts", ".vob", ".wmv", ".asf",
    ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".rm", ".swf", ".mxf",
)  # fmt: skip

# A time between two frames is regular within this share of the usual one; a few irregular ones are dropped frames.
_INTERVAL_TOLERANCE, _MAX_IRREGULAR_FRACTION = 0.5, 0.05
# Frames that a decoder may give out of order.
_MAX_REORDERED_FRAMES = 32
# A file that holds fewer than this share of the frames it declares is cut off.
_MIN_DECODED_FRACTION = 0.9


@dataclass(frozen=True)
class Probe:
    """A video and the times of its frames.

    Attributes:
        video: what the manifest keeps.
        seconds: when each frame is shown, (frames,).
        interval: usual time between frames, seconds.
    """

    video: VideoInfo
    times_s: np.ndarray
    interval_s: float

    @property
    def is_variable_rate(self) -> bool:
        """Whether the frames do not follow each other at a constant rate."""
        off = np.abs(np.diff(self.times_s) / self.interval_s - 1) > _INTERVAL_TOLERANCE
        return bool(off.mean() > _MAX_IRREGULAR_FRACTION) if len(off) else False


def probe(file: IO[bytes]) -> Probe:
    """Decodes a whole video and notes what reading clips of it needs.

    Raises:
        ValueError: it is no video, or it is damaged; the message gives the reason.
    """
    with open_video(file) as (container, stream):
        times: list[int] = []
        key_frames: list[int] = []
        size, num_corrupt, num_declared = (0, 0), 0, stream.frames
        for frame in decode_frames(container, stream):
            if frame.key_frame:
                key_frames.append(len(times))
            num_corrupt += frame.is_corrupt
            size = size if times else _upright_size(frame)
            times.append(frame_timestamp(frame))
        base = float(stream.time_base or Fraction(1, 1))
        rate = float(stream.average_rate or stream.base_rate or 25)
    if not times:
        raise ValueError("holds no frames")
    if num_corrupt:
        raise ValueError(f"{num_corrupt} of {len(times)} frames are corrupt")
    if len(times) < _MIN_DECODED_FRACTION * num_declared:
        raise ValueError(f"ends after {len(times)} of {num_declared} frames")
    interval = _median_frame_step(np.diff(times) * base) or 1 / rate
    seekable = [0, *(key for key in key_frames if key and _is_seekable(times, key))]
    video = VideoInfo(len(times), 1 / interval, *size, tuple(seekable), tuple(times[key] for key in seekable))
    return Probe(video, np.array(times) * base, interval)


def _median_frame_step(steps: np.ndarray) -> float:
    """Mean of the steps that are near their median, which rounded time stamps do not shift; 0 if there is none."""
    near = steps[np.abs(steps - np.median(steps)) <= _INTERVAL_TOLERANCE * np.median(steps)] if len(steps) else steps
    return float(near.mean()) if len(near) else 0.0


def _is_seekable(times: list[int], key: int) -> bool:
    """Whether no frame near it is shown out of order, so that seeking to its time finds this frame."""
    near = slice(max(0, key - _MAX_REORDERED_FRAMES), key + _MAX_REORDERED_FRAMES)
    return times[near] == sorted(set(times[near]))


def read_frames(file: IO[bytes], video: VideoInfo, start: int, num_frames: int, stride: int) -> Iterator[Image.Image]:
    """Frames start, start + stride, … as RGB; only what lies between them and the key frame before is decoded.

    Raises:
        ValueError: the file is damaged, or not the one that `video` was made of.
    """
    frame_indices = range(start, start + num_frames * stride, stride)
    key_index = bisect.bisect_right(video.key_frames, start) - 1
    num_yielded = 0
    for number, frame in _decode_from_key_frame(file, video, key_index):
        if number == frame_indices[num_yielded]:
            yield to_upright_rgb(frame)
            num_yielded += 1
            if num_yielded == num_frames:
                return
    raise ValueError(f"ends before frame {frame_indices[num_yielded]} of {video.frames}")


def _decode_from_key_frame(file: IO[bytes], video: VideoInfo, key_index: int) -> Iterator[tuple[int, Any]]:
    """Numbered frames from a key frame on; from the first one where the container cannot seek to it."""
    if key_index:
        with open_video(file) as (container, stream):
            frames = _seek(container, stream, video.key_times[key_index])
            first = next(frames, None)
            if first is not None:
                yield video.key_frames[key_index], first
                yield from enumerate(frames, video.key_frames[key_index] + 1)
                return
    file.seek(0)
    with open_video(file) as (container, stream):
        yield from enumerate(decode_frames(container, stream))


def _seek(container: Any, stream: Any, timestamp: int) -> Iterator[Any]:
    """Frames from the one at `time` on; none if it is not found."""
    try:
        container.seek(timestamp, stream=stream)
    except av.FFmpegError:
        return
    frames = decode_frames(container, stream)
    # Frames that are shown before their key frame come without what they refer to.
    first = next((frame for frame in frames if frame_timestamp(frame) >= timestamp), None)
    if first is not None and frame_timestamp(first) == timestamp:
        yield first
        yield from frames


@contextmanager
def open_video(file: IO[bytes]) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; errors of the decoder become a ValueError with the reason."""
    try:
        with av.open(file) as container:
            if not container.streams.video:
                raise ValueError("holds no video stream")
            stream = container.streams.video[0]
            # Threads inside a decoder can hang when many decoders run.
            stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"cannot be decoded: {error.strerror}") from error


def decode_frames(container: Any, stream: Any) -> Iterator[Any]:
    """Frames in the order in which they are shown."""
    for packet in container.demux(stream):
        # An empty packet repeats the frame before; only the last one, without a time, empties the decoder.
        if packet.size or packet.dts is None:
            yield from packet.decode()


def frame_timestamp(frame: Any) -> int:
    """Time stamp of a frame in the units of its stream.

    Raises:
        ValueError: it has none.
    """
    time = frame.pts if frame.pts is not None else frame.dts
    if time is None:
        raise ValueError("has frames without time stamps")
    return int(time)


def to_upright_rgb(frame: Any) -> Image.Image:
    """RGB, turned as the file says it is to be shown."""
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _upright_size(frame: Any) -> tuple[int, int]:
    turned = abs(frame.rotation) % 180 == 90
    return (frame.height, frame.width) if turned else (frame.width, frame.height)


def even_size(width: int, height: int, max_side: int) -> tuple[int, int]:
    """The size with this longer side, or the next smaller even one: H.264 stores colour for two by two pixels."""
    scale = max(2, max_side - max_side % 2) / max(width, height)
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))
