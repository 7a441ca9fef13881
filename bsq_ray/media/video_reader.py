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

from bsq_ray.data.manifest import Video

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".m2ts", ".mts", ".ts", ".vob", ".wmv", ".asf",
    ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".rm", ".swf", ".mxf",
)  # fmt: skip

# A time between two frames is regular within this share of the usual one; a few irregular ones are dropped frames.
_REGULAR, _IRREGULAR_SHARE = 0.5, 0.05
# Frames that a decoder may give out of order.
_REORDERED = 32
# A file that holds fewer than this share of the frames it declares is cut off.
_WHOLE_SHARE = 0.9


@dataclass(frozen=True)
class Probe:
    """A video and the times of its frames.

    Attributes:
        video: what the manifest keeps.
        seconds: when each frame is shown, (frames,).
        interval: usual time between frames, seconds.
    """

    video: Video
    seconds: np.ndarray
    interval: float

    @property
    def variable(self) -> bool:
        """Whether the frames do not follow each other at a constant rate."""
        off = np.abs(np.diff(self.seconds) / self.interval - 1) > _REGULAR
        return bool(off.mean() > _IRREGULAR_SHARE) if len(off) else False


def probe(file: IO[bytes]) -> Probe:
    """Decodes a whole video and notes what reading clips of it needs.

    Raises:
        ValueError: it is no video, or it is damaged; the message gives the reason.
    """
    with open_video(file) as (container, stream):
        times: list[int] = []
        keys: list[int] = []
        size, corrupt, declared = (0, 0), 0, stream.frames
        for frame in decode(container, stream):
            if frame.key_frame:
                keys.append(len(times))
            corrupt += frame.is_corrupt
            size = size if times else _upright_size(frame)
            times.append(time_of(frame))
        base = float(stream.time_base or Fraction(1, 1))
        rate = float(stream.average_rate or stream.base_rate or 25)
    if not times:
        raise ValueError("holds no frames")
    if corrupt:
        raise ValueError(f"{corrupt} of {len(times)} frames are corrupt")
    if len(times) < _WHOLE_SHARE * declared:
        raise ValueError(f"ends after {len(times)} of {declared} frames")
    interval = _usual_step(np.diff(times) * base) or 1 / rate
    starts = [0, *(key for key in keys if key and _found_by_its_time(times, key))]
    video = Video(len(times), 1 / interval, *size, tuple(starts), tuple(times[key] for key in starts))
    return Probe(video, np.array(times) * base, interval)


def _usual_step(steps: np.ndarray) -> float:
    """Mean of the steps that are near their median, which rounded time stamps do not shift; 0 if there is none."""
    near = steps[np.abs(steps - np.median(steps)) <= _REGULAR * np.median(steps)] if len(steps) else steps
    return float(near.mean()) if len(near) else 0.0


def _found_by_its_time(times: list[int], key: int) -> bool:
    """Whether no frame near it is shown out of order, so that seeking to its time finds this frame."""
    near = slice(max(0, key - _REORDERED), key + _REORDERED)
    return times[near] == sorted(set(times[near]))


def read_frames(file: IO[bytes], video: Video, start: int, count: int, stride: int) -> Iterator[Image.Image]:
    """Frames start, start + stride, … as RGB; only what lies between them and the key frame before is decoded.

    Raises:
        ValueError: the file is damaged, or not the one that `video` was made of.
    """
    wanted = range(start, start + count * stride, stride)
    place = bisect.bisect_right(video.key_frames, start) - 1
    given = 0
    for number, frame in _from_key_frame(file, video, place):
        if number == wanted[given]:
            yield upright(frame)
            given += 1
            if given == count:
                return
    raise ValueError(f"ends before frame {wanted[given]} of {video.frames}")


def _from_key_frame(file: IO[bytes], video: Video, place: int) -> Iterator[tuple[int, Any]]:
    """Numbered frames from a key frame on; from the first one where the container cannot seek to it."""
    if place:
        with open_video(file) as (container, stream):
            frames = _sought(container, stream, video.key_times[place])
            first = next(frames, None)
            if first is not None:
                yield video.key_frames[place], first
                yield from enumerate(frames, video.key_frames[place] + 1)
                return
    file.seek(0)
    with open_video(file) as (container, stream):
        yield from enumerate(decode(container, stream))


def _sought(container: Any, stream: Any, time: int) -> Iterator[Any]:
    """Frames from the one at `time` on; none if it is not found."""
    try:
        container.seek(time, stream=stream)
    except av.FFmpegError:
        return
    frames = decode(container, stream)
    # Frames that are shown before their key frame come without what they refer to.
    first = next((frame for frame in frames if time_of(frame) >= time), None)
    if first is not None and time_of(first) == time:
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


def decode(container: Any, stream: Any) -> Iterator[Any]:
    """Frames in the order in which they are shown."""
    for packet in container.demux(stream):
        # An empty packet repeats the frame before; only the last one, without a time, empties the decoder.
        if packet.size or packet.dts is None:
            yield from packet.decode()


def time_of(frame: Any) -> int:
    """Time stamp of a frame in the units of its stream.

    Raises:
        ValueError: it has none.
    """
    time = frame.pts if frame.pts is not None else frame.dts
    if time is None:
        raise ValueError("has frames without time stamps")
    return int(time)


def upright(frame: Any) -> Image.Image:
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
