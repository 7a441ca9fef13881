"""What is stored of a video file: the file as it is, or made again at a constant rate or a smaller size."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from bsq_ray.media.color import BT709
from bsq_ray.media.images import encode_png, is_opaque_rgb_or_gray, is_upright, load_rgb, open_image
from bsq_ray.media.video_reader import (
    VideoInfo,
    VideoProbe,
    decode_frames,
    frame_timestamp,
    open_video,
    probe,
    upright_rgb,
)
from bsq_ray.media.video_writer import VideoEncoder, even_size, write_video

# H.264 that the eye does not tell from its source, with a key frame often enough to begin anywhere.
_ENCODER = VideoEncoder("libx264", {"crf": "14", "preset": "veryfast", "g": "12", "bf": "0"})
# Longest time that one frame is held, seconds: longer ones are broken time stamps.
_MAX_FRAME_DURATION_S = 60.0
# As many pictures, at most, for each frame that a video of variable rate has: more come of broken time stamps.
_MAX_REPEATS = 50
# Image formats that are stored as they are, and their suffixes.
_SUFFIX_OF_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class TooShortError(ValueError):
    """The video is whole, but has too few frames."""


def reencode_image(data: bytes, max_side: int | None) -> tuple[bytes, str]:
    """The bytes to store and their suffix: the file as it is if it is plain RGB or grey, upright and small enough."""
    image = open_image(data)
    image_format, is_plain = image.format, is_upright(image) and is_opaque_rgb_or_gray(image)
    rgb = load_rgb(image)
    exceeds_max_side = max_side is not None and max(rgb.size) > max_side
    if image_format in _SUFFIX_OF_FORMAT and is_plain and not exceeds_max_side:
        return data, _SUFFIX_OF_FORMAT[image_format]
    if max_side is not None and exceeds_max_side:
        scale = max_side / max(rgb.size)
        size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    if image_format == "JPEG":
        stored = io.BytesIO()
        rgb.save(stored, "JPEG", quality=95, subsampling=0)
        return stored.getvalue(), "jpg"
    return encode_png(rgb), "png"


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


def _reencode(data: bytes, source_probe: VideoProbe, max_side: int) -> bytes:
    size = even_size(source_probe.video.width, source_probe.video.height, max_side)
    frame_rate = Fraction(1 / source_probe.interval_s).limit_denominator(1001)
    frames = (
        np.asarray(Image.fromarray(pixels_HW3).resize(size, Image.Resampling.LANCZOS))
        for pixels_HW3 in _resample_constant_rate(data, source_probe)
    )
    file = io.BytesIO()
    write_video(file, "mp4", frames, frame_rate, BT709, _ENCODER)
    return file.getvalue()


def _resample_constant_rate(data: bytes, source_probe: VideoProbe) -> Iterator[np.ndarray]:
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
            num_emitted, current_image = max(num_emitted, target_index), upright_rgb(frame)
        yield current_image
