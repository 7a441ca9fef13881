"""Encode frames to video files, through PyAV (FFmpeg).

frames, uint8 RGB (H, W, 3) ─▶ mkv: FFV1 in RGB, lossless
                            └▶ mp4: H.264, for any player
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, Any

import av
import numpy as np

from bsq_ray.media.color import ColorDescription, resolve_matrix, rgb_to_frame
from bsq_ray.media.video_reader import ffmpeg_error_text

_LOSSLESS_PIXEL_FORMAT = "bgr0"


@dataclass(frozen=True)
class VideoEncoder:
    """FFmpeg's name of an encoder and its options."""

    name: str
    options: dict[str, str]


_ENCODERS = {
    # A fixed number of slices gives the same file on every machine.
    "matroska": VideoEncoder("ffv1", {"level": "3", "slices": "4"}),
    "mp4": VideoEncoder("libx264", {"crf": "10", "preset": "medium"}),
}


def write_video(
    file: IO[bytes] | str,
    container_format: str,
    frames: Iterable[np.ndarray],
    frame_rate: Fraction,
    color: ColorDescription,
    encoder: VideoEncoder | None = None,
) -> int:
    """Encode frames to a video file.

    Args:
        file: path of a local file, or a seekable file open for writing.
        container_format: "mp4" (H.264) or "matroska" (FFV1, lossless).
        frames: uint8 RGB (H, W, 3), all of one size.
        frame_rate: frames per second.
        color: what the file is marked with.
        encoder: None takes the encoder of the container.

    Returns:
        the number of frames written.

    Raises:
        ValueError: FFmpeg cannot write this video.
    """
    encoder = encoder or _ENCODERS[container_format]
    num_written = 0
    stream: Any = None
    try:
        with av.open(file, "w", format=container_format) as container:
            for pixels_HW3 in frames:
                if stream is None:
                    stream = container.add_stream(encoder.name, rate=frame_rate, options=encoder.options)
                    _configure_stream(stream, pixels_HW3.shape, color, is_lossless=encoder.name == "ffv1")
                container.mux(stream.encode(_to_stream_format(pixels_HW3, stream)))
                num_written += 1
            if stream is not None:
                container.mux(stream.encode())
    except (av.FFmpegError, OverflowError) as error:
        raise ValueError(f"the video cannot be written ({ffmpeg_error_text(error)})") from error
    return num_written


def even_size(width: int, height: int, max_side: int) -> tuple[int, int]:
    """Return the largest even size with sides up to `max_side`; H.264 stores one color for two by two pixels."""
    scale = max(2, max_side - max_side % 2) / max(width, height)
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def _configure_stream(stream: Any, shape: tuple[int, ...], color: ColorDescription, is_lossless: bool) -> None:
    stream.height, stream.width = shape[:2]
    context = stream.codec_context
    context.color_primaries, context.color_trc = color.primaries, color.transfer
    if is_lossless:
        stream.pix_fmt = _LOSSLESS_PIXEL_FORMAT
        return
    # Every player reads 4:2:0, but it needs even sides.
    stream.pix_fmt = "yuv420p" if shape[0] % 2 == 0 and shape[1] % 2 == 0 else "yuv444p"
    context.colorspace = resolve_matrix(color.matrix, shape[0])
    context.color_range = 2 if color.full_range else 1


def _to_stream_format(pixels_HW3: np.ndarray, stream: Any) -> Any:
    if stream.pix_fmt == _LOSSLESS_PIXEL_FORMAT:
        return rgb_to_frame(pixels_HW3, _LOSSLESS_PIXEL_FORMAT)
    context = stream.codec_context
    return rgb_to_frame(pixels_HW3, stream.pix_fmt, int(context.colorspace), int(context.color_range))
