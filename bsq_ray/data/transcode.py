"""Choose what to store of an image or video file: the file itself, or one encoded again.

image ─plain, upright, small enough─▶ unchanged      otherwise ─▶ JPEG or PNG
video ─constant rate, small enough──▶ unchanged      otherwise ─▶ H.264 at a constant rate, at most `max_side`
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from PIL import Image

from bsq_ray.data.packing import JPEG_QUALITY, VIDEO_CRF
from bsq_ray.media.color import BT709
from bsq_ray.media.frame_display import display_rgb
from bsq_ray.media.images import encode_png, exif_orientation, is_opaque_rgb_or_gray, load_image, open_image
from bsq_ray.media.orientation import UPRIGHT
from bsq_ray.media.packet_scan import MAX_FRAME_DURATION_S
from bsq_ray.media.video_reader import (
    VideoInfo,
    VideoProbe,
    decode_frames,
    frame_timestamp,
    open_video,
    probe,
)
from bsq_ray.media.video_writer import VideoEncoder, even_size, write_video

# Visually lossless H.264, with a key frame every 12 frames so that a clip can start anywhere.
_ENCODER = VideoEncoder("libx264", {"crf": str(VIDEO_CRF), "preset": "veryfast", "g": "12", "bf": "0"})
# Largest ratio of output frames to input frames of a variable-rate video; more come from broken time stamps.
_MAX_REPEATS = 50
# Image formats that are stored unchanged, and their suffixes. An MPO is a JPEG with previews.
_SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class StoredFile:
    """A file as it is stored in a shard.

    Attributes:
        data: content.
        suffix: without the dot.
        video: facts for the manifest; None for an image.
        change: note on what changed for the user; empty for nothing.
    """

    data: bytes
    suffix: str
    video: VideoInfo | None = None
    change: str = ""


class TooShortError(ValueError):
    """The video is readable but has too few frames."""


def reencode_image(data: bytes, suffix: str, max_side: int | None) -> StoredFile:
    """Return an image file as it is to be stored.

    A JPEG, PNG or WebP is stored unchanged if it is 8-bit RGB or gray, opaque, upright and small enough. It keeps its
    color profile, which readers apply; a file that is encoded again contains sRGB.

    Args:
        data: content of the file.
        suffix: of the file; the format follows from the content instead.
        max_side: images with a longer side are shrunk to it (Lanczos); None keeps their size.

    Raises:
        DecodeError: the file is damaged or not an image.
    """
    image = open_image(data)
    image_format, is_plain = image.format, is_opaque_rgb_or_gray(image)
    rgb = load_image(image)
    is_plain = is_plain and exif_orientation(image) == UPRIGHT
    exceeds_max_side = max_side is not None and max(rgb.size) > max_side
    if image_format in _SUFFIX_OF_FORMAT and is_plain and not exceeds_max_side:
        return StoredFile(data, _SUFFIX_OF_FORMAT[image_format])
    if max_side is not None and exceeds_max_side:
        scale = max_side / max(rgb.size)
        size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    if _SUFFIX_OF_FORMAT.get(image_format or "") == "jpg":
        file = io.BytesIO()
        rgb.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return StoredFile(file.getvalue(), "jpg")
    return StoredFile(encode_png(rgb), "png")


def transcode_if_needed(data: bytes, suffix: str, max_side: int | None, min_frames: int) -> StoredFile:
    """Return a video file as it is to be stored.

    Args:
        data: content of the file.
        suffix: of the file, without the dot.
        max_side: videos with a longer side are shrunk to it; None keeps their size.
        min_frames: smallest number of frames.

    Raises:
        TooShortError: the video has fewer frames.
        ValueError: the video cannot be decoded.
    """
    source_probe = probe(io.BytesIO(data))
    if source_probe.video.frames < min_frames:
        raise TooShortError(f"has {source_probe.video.frames} frames, fewer than {min_frames}")
    long_side = max(source_probe.video.width, source_probe.video.height)
    needs_resize = max_side is not None and long_side > max_side
    if not source_probe.is_variable_rate and not needs_resize:
        return StoredFile(data, suffix, source_probe.video)
    output = _reencode(data, source_probe, min(long_side, max_side or long_side))
    output_video = probe(io.BytesIO(output)).video
    note = f"variable rate, now {output_video.fps:.4g} fps" if source_probe.is_variable_rate else ""
    return StoredFile(output, "mp4", output_video, note)


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
    """Yield one frame for each interval: the one that is displayed at that time.

    Raises:
        ValueError: the time stamps are broken: they jump, or require far more frames than there are.
    """
    times_s = np.maximum.accumulate(source_probe.times_s) - source_probe.times_s[0]
    max_gap_s, num_frames = np.diff(times_s).max(initial=0), 1 + round(times_s[-1] / source_probe.interval_s)
    if max_gap_s > MAX_FRAME_DURATION_S:
        raise ValueError(f"its time stamps jump by {max_gap_s:.0f} s")
    if num_frames > _MAX_REPEATS * len(times_s):
        raise ValueError(
            f"its time stamps require {num_frames} frames instead of {len(times_s)} at {source_probe.video.fps:.4g} fps"
        )
    current: np.ndarray | None = None
    num_emitted = 0
    with open_video(io.BytesIO(data)) as (container, stream):
        for frame in decode_frames(container, stream):
            time_s = float(frame_timestamp(frame) * stream.time_base) - source_probe.times_s[0]
            target_index = round(time_s / source_probe.interval_s)
            if current is not None:
                for _ in range(target_index - num_emitted):
                    yield current
            num_emitted, current = max(num_emitted, target_index), display_rgb(frame, stream)
        if current is not None:
            yield current
