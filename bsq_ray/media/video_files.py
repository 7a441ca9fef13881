"""Video files to frames and back, through PyAV (FFmpeg).

    mp4, mkv, … ─▶ frames, rate, colour           frames ─▶ mkv: FFV1 in RGB, every byte as it was decoded
                                                         └▶ mp4: H.264, for any player

A frame is uint8 RGB (H, W, 3), upright. Sound is left out, and uneven times become the mean rate.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, Any

import av
import numpy as np

from bsq_ray.codec.container import MAX_PIXELS
from bsq_ray.media.color import Color

# What FFmpeg's scaler calculates with; anything else is written as BT.709.
_SCALER_MATRICES = {1, 2, 4, 5, 6, 7, 9}
_BT709 = 1
_ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    # Slices of one frame would be coded in threads; a frame at a time is fast enough and always the same file.
    "matroska": ("ffv1", {"level": "3", "slices": "4"}),
    "mp4": ("libx264", {"crf": "10", "preset": "medium"}),
}


@dataclass(frozen=True)
class VideoStream:
    """A video being read.

    Attributes:
        frames: one after the other, read as they are asked for; closed with the file.
        rate: frames per second.
        count: how many the file says there are; 0 where it does not say.
        size: width and height that the file says its frames are stored with, pixels.
        colour: as the file is marked.
        has_sound: whether sound is left out.
    """

    frames: Generator[np.ndarray, None, None]
    frame_rate: Fraction
    num_frames: int
    size: tuple[int, int]
    color: Color
    has_audio: bool


class TooLargeError(ValueError):
    """The frames have more pixels than are taken."""


def read_video(file: IO[bytes] | str, container_format: str | None = None, max_pixels: int = MAX_PIXELS) -> VideoStream:
    """Opens a video by its path or as an open file.

    Args:
        kind: FFmpeg's name of the container; None lets FFmpeg look at the file.
        max_pixels: of a frame; a video that says that its frames are larger is refused before any of them is decoded.

    Raises:
        TooLarge: its frames are too large; while frames are taken, too.
        ValueError: it is not one; while frames are taken, that it is damaged.
    """
    try:
        # FFmpeg would decode frames already to find out what the streams are.
        container = av.open(file, format=container_format, options={"skip_frame": "all"})
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise ValueError(f"not a video of a known format ({_error_text(error)})") from error
    if not container.streams.video:
        container.close()
        raise ValueError("it holds no video")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    # Frames may grow on the way. FFmpeg counts the edges that its decoders pad them with.
    stream.codec_context.options = {"max_pixels": str(4 * max_pixels + 2**17)}
    size = stream.width, stream.height
    try:
        _check_size(*size, max_pixels)
    except TooLargeError:
        container.close()
        raise
    frames = _decode_frames(container, stream, max_pixels)
    first = next(frames, None)
    if first is None:
        raise ValueError("its video has no frames")
    color = Color(int(first.color_primaries), int(first.color_trc), int(first.colorspace), int(first.color_range == 2))
    frame_rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    return VideoStream(_iter_rgb(first, frames), frame_rate, stream.frames, size, color, bool(container.streams.audio))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLargeError(f"its frames have {width} x {height} pixels; at most {max_pixels} are taken")


def _decode_frames(container: Any, stream: Any, max_pixels: int) -> Iterator[Any]:
    count = 0
    with container:
        try:
            for frame in container.decode(stream):
                # What the file says of itself need not be so.
                _check_size(frame.width, frame.height, max_pixels)
                yield frame
                count += 1
        except (av.error.FFmpegError, OSError) as error:
            raise ValueError(f"the video is damaged after {count} frames ({_error_text(error)})") from error


def _iter_rgb(first: Any, frames: Iterator[Any]) -> Generator[np.ndarray, None, None]:
    yield _to_upright_rgb(first)
    for frame in frames:
        yield _to_upright_rgb(frame)


def _to_upright_rgb(frame: Any) -> np.ndarray:
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


def write_video(
    file: IO[bytes] | str, container_format: str, frames: Iterable[np.ndarray], frame_rate: Fraction, color: Color
) -> int:
    """Writes frames to a file; returns how many.

    Args:
        file: the path of a local one, or an open one that can be sought in.
        kind: "mp4" (H.264) or "matroska" (FFV1, lossless).
        colour: what the file is marked with.

    Raises:
        ValueError: FFmpeg cannot write such a video.
    """
    codec, options = _ENCODERS[container_format]
    num_written = 0
    stream: Any = None
    try:
        with av.open(file, "w", format=container_format) as container:
            for pixels_HWC in frames:
                if stream is None:
                    stream = container.add_stream(codec, rate=frame_rate, options=options)
                    _set_color_tags(stream, container_format, pixels_HWC.shape, color)
                container.mux(stream.encode(_to_av_frame(pixels_HWC, stream)))
                num_written += 1
            if stream is not None:
                container.mux(stream.encode())
    except (av.error.FFmpegError, OverflowError) as error:
        raise ValueError(f"the video cannot be written ({_error_text(error)})") from error
    return num_written


def _set_color_tags(stream: Any, container_format: str, shape: tuple[int, ...], color: Color) -> None:
    stream.height, stream.width = shape[:2]
    context = stream.codec_context
    context.color_primaries, context.color_trc = color.primaries, color.transfer
    if container_format == "matroska":
        stream.pix_fmt = "bgr0"
        return
    even = shape[0] % 2 == 0 and shape[1] % 2 == 0
    # Half the colour in each direction is what every player takes, but it needs even sides.
    stream.pix_fmt = "yuv420p" if even else "yuv444p"
    context.colorspace = color.matrix if color.matrix in _SCALER_MATRICES else _BT709
    context.color_range = 2 if color.full_range else 1


def _to_av_frame(pixels_HWC: np.ndarray, stream: Any) -> Any:
    frame = av.VideoFrame.from_ndarray(pixels_HWC, "rgb24")
    if stream.pix_fmt == "bgr0":
        return frame.reformat(format="bgr0")
    context = stream.codec_context
    return frame.reformat(
        format=stream.pix_fmt, dst_colorspace=int(context.colorspace), dst_color_range=int(context.color_range)
    )


def _error_text(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:160] or type(error).__name__
