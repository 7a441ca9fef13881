"""What is stored of a video file: the file as it is, or made again at a constant rate or a smaller size."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from bsq_ray.data.manifest import VideoInfo
from bsq_ray.media.video_reader import (
    Probe,
    decode_frames,
    even_size,
    frame_timestamp,
    open_video,
    probe,
    to_upright_rgb,
)

# H.264 that the eye does not tell from its source, with a key frame often enough to begin anywhere.
_CODEC, _OPTIONS = "libx264", {"crf": "14", "preset": "veryfast", "g": "12", "bf": "0"}
# Longest time that one frame is held, seconds: longer ones are broken time stamps.
_MAX_FRAME_DURATION_S = 60.0
# As many pictures, at most, for each frame that a video of variable rate has: more come of broken time stamps.
_MAX_REPEATS = 50


class TooShortError(ValueError):
    """The video is whole, but has too few frames."""


def transcode_if_needed(
    data: bytes, suffix: str, max_side: int | None, min_frames: int
) -> tuple[bytes, str, VideoInfo, str]:
    """The bytes to store, their suffix, what is known of them, and what was changed ("" for nothing).

    Args:
        suffix: of the file, without the dot.
        max_side: videos with a longer side are shrunk to it; None keeps their size.
        min_frames: fewer are too few.

    Raises:
        TooShort: it has fewer frames.
        ValueError: it cannot be decoded.
    """
    source_probe = probe(io.BytesIO(data))
    if source_probe.video.frames < min_frames:
        raise TooShortError(f"has {source_probe.video.frames} frames, fewer than {min_frames}")
    long_side = max(source_probe.video.width, source_probe.video.height)
    needs_resize = max_side is not None and long_side > max_side
    if not source_probe.is_variable_rate and not needs_resize:
        return data, suffix, source_probe.video, ""
    output = _reencode(data, source_probe, min(long_side, max_side or long_side))
    output_video = probe(io.BytesIO(output)).video
    return (
        output,
        "mp4",
        output_video,
        f"variable rate, now {output_video.fps:.4g} fps" if source_probe.is_variable_rate else "",
    )


def _reencode(data: bytes, source_probe: Probe, max_side: int) -> bytes:
    width, height = even_size(source_probe.video.width, source_probe.video.height, max_side)
    frame_rate = Fraction(1 / source_probe.interval_s).limit_denominator(1001)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream(_CODEC, rate=frame_rate, options=_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, image in enumerate(_resample_constant_rate(data, source_probe)):
            frame = av.VideoFrame.from_image(image.resize((width, height), Image.Resampling.LANCZOS))
            frame.pts, frame.time_base = number, 1 / frame_rate
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def _resample_constant_rate(data: bytes, source_probe: Probe) -> Iterator[Image.Image]:
    """One picture for each interval: the frame that is shown at that time.

    Raises:
        ValueError: the time stamps are broken: they jump, or ask for far more pictures than there are frames.
    """
    times = np.maximum.accumulate(source_probe.times_s) - source_probe.times_s[0]
    max_gap_s, num_images = np.diff(times).max(initial=0), 1 + round(times[-1] / source_probe.interval_s)
    if max_gap_s > _MAX_FRAME_DURATION_S:
        raise ValueError(f"its time stamps jump by {max_gap_s:.0f} s")
    if num_images > _MAX_REPEATS * len(times):
        raise ValueError(
            f"its time stamps make {num_images} pictures of {len(times)} frames at {source_probe.video.fps:.4g} fps"
        )
    current_image: Any = None
    num_emitted = 0
    with open_video(io.BytesIO(data)) as (container, stream):
        for frame in decode_frames(container, stream):
            time_s = float(frame_timestamp(frame) * stream.time_base) - source_probe.times_s[0]
            target_index = round(time_s / source_probe.interval_s)
            for _ in range(target_index - num_emitted if current_image is not None else 0):
                yield current_image
            num_emitted, current_image = max(num_emitted, target_index), to_upright_rgb(frame)
        yield current_image
