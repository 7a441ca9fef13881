"""Compressing and decompressing files; `-` is the standard input or output.

png jpg webp mp4 mkv … ─▶ .bsq ─▶ png, webp: an image, or one frame of a clip
                               └▶ mp4, mkv: a clip
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from bsq_ray import storage
from bsq_ray.codec.codec import Box, Codec, CompressedFile, ProgressCallback
from bsq_ray.codec.container import VideoHeader, read_header
from bsq_ray.media.images import DECODE_ERRORS, decode_error_text, to_srgb
from bsq_ray.media.limits import MAX_PIXELS
from bsq_ray.media.video_reader import VIDEO_SUFFIXES, VideoStream, read_video
from bsq_ray.media.video_writer import write_video

_IMAGE_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {"png": ("PNG", {}), "webp": ("WEBP", {"lossless": True})}
_VIDEO_CONTAINERS = {"mp4": "mp4", "mkv": "matroska"}


@dataclass(frozen=True)
class DecodeSelection:
    """What of a .bsq file is wanted; everything by default.

    Attributes:
        region: left, top, right and lower edge in pixels.
        frame: of a clip, its number from 0.
        second: of a clip, the frame that is shown at this time.
        preview: take a file that is cut off, and show what is there.
        max_pixels: larger frames are refused.
    """

    region: Box | None = None
    frame: int | None = None
    time_s: float | None = None
    preview: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        num_choices = sum((self.frame is not None, self.time_s is not None, self.preview))
        if num_choices > 1 or (self.preview and self.region):
            raise ValueError("choose one of --frame, --seek and --preview, and --region only without --preview")

    def resolve_frame(self, clip: VideoHeader) -> int | None:
        """Number of the one frame that is wanted, None for all.

        Raises:
            ValueError: the clip has no such frame.
        """
        if self.frame is None and self.time_s is None:
            return None
        # By its decimal digits: the float nearest to 0.12 lies below it, which is a frame earlier at 25 a second.
        index = self.frame if self.frame is not None else floor(Fraction(str(self.time_s)) * clip.frame_rate)
        if not 0 <= index < clip.num_frames:
            duration_s = float(clip.num_frames / clip.frame_rate)
            raise ValueError(
                f"there is no frame {index}: the clip has {clip.num_frames} frames, numbered from 0, in {duration_s:.2f} s"
            )
        return index


def compress_file(
    model_url: str,
    source: str,
    destination: str,
    weights: Literal["ema", "plain"] = "ema",
    on_progress: ProgressCallback = lambda done, total: None,
) -> str:
    """Compresses an image or video file; a sentence with sizes and times.

    Raises:
        ValueError: the model or the file cannot be read, or the result cannot be written.
    """
    codec = Codec.from_pretrained(model_url, weights)
    start_time = time.perf_counter()
    with _open_input(source) as file:
        image = None if source.lower().endswith(VIDEO_SUFFIXES) else _open_image(file, source)
        try:
            if image is not None:
                compressed, description = codec.compress(image, on_progress), f"{image.width} x {image.height} px"
            else:
                file.seek(0)
                compressed, description = _compress_video(codec, read_video(file), on_progress)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    _write_output(destination, compressed.data)
    return f"{source}: {description} {_summary(compressed)}, {time.perf_counter() - start_time:.2f} s in all"


def _compress_video(codec: Codec, video: VideoStream, on_progress: ProgressCallback) -> tuple[CompressedFile, str]:
    size = (0, 0)

    def frames() -> Iterator[np.ndarray]:
        nonlocal size
        for frame in video.frames:
            size = frame.shape[1], frame.shape[0]
            yield frame

    compressed = codec.compress_clip(
        frames(), video.frame_rate, video.color, lambda done, _: on_progress(done, video.num_frames)
    )
    sound_note = ", sound left out" if video.has_audio else ""
    return (
        compressed,
        f"{compressed.num_frames} frames of {size[0]} x {size[1]} px at {float(video.frame_rate):g} a second{sound_note},",
    )


def _summary(compressed: CompressedFile) -> str:
    prior_note = ""
    if compressed.cross_entropy_bits:
        fraction = compressed.cross_entropy_bits / compressed.raw_bits
        prior_note = (
            f"; the prior needs {compressed.cross_entropy_bits / 8:.0f} bytes, {fraction:.1%} of the tokens' "
            f"{compressed.raw_bits / 8:.0f}, and {compressed.side_info_bits / 8:.0f} of side information"
        )
    timing_note = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in compressed.timings_s.items())
    return f"in {len(compressed.data)} bytes, {compressed.bits_per_pixel:.4f} bits per pixel{prior_note}; {timing_note}"


def decompress_file(
    model_url: str,
    source: str,
    destination: str,
    selection: DecodeSelection = DecodeSelection(),
    weights: Literal["ema", "plain"] = "ema",
    on_progress: ProgressCallback = lambda done, total: None,
) -> str:
    """Decompresses a .bsq file; a sentence about it.

    What is written goes by the name's ending: PNG or lossless WebP for an image or a frame, MP4 (H.264) or MKV (FFV1,
    lossless) for a clip. The standard output gets PNG or MKV.

    Raises:
        ValueError: the model or the file cannot be read, the file is damaged, or the ending does not suit it.
    """
    kind = "" if destination == "-" else destination.rsplit(".", 1)[-1].lower()
    if kind and kind not in _IMAGE_FORMATS | _VIDEO_CONTAINERS:
        raise ValueError(f"{destination} must end in .png or .webp (an image or a frame), or .mp4 or .mkv (a clip)")
    codec = Codec.from_pretrained(model_url, weights)
    with _open_input(source) as file:
        data = file.read()
    start_time = time.perf_counter()
    timings_s: dict[str, float] = {}
    try:
        clip = read_header(data, selection.max_pixels).clip
        frame = None if clip is None else selection.resolve_frame(clip)
        if clip is None and (selection.frame is not None or selection.time_s is not None):
            raise ValueError("it holds an image; --frame and --seek are for clips")
        is_image = clip is None or frame is not None
        if kind and is_image != (kind in _IMAGE_FORMATS):
            expected = "an image or one frame, so OUT must end in .png or .webp" if is_image else (
                "a clip, so OUT must end in .mp4 or .mkv; --frame N gives one frame as .png or .webp"
            )  # fmt: skip
            raise ValueError(f"this is {expected}")
        if clip is None:
            description = _decompress_image(codec, data, selection, destination, kind or "png", on_progress, timings_s)
        elif frame is not None:
            [pixels_HWC] = codec.decompress_clip(
                data, range(frame, frame + 1), selection.region, selection.max_pixels, on_progress, timings_s
            )
            description = f"frame {frame}, {_save_image(Image.fromarray(pixels_HWC), destination, kind or 'png')}"
        else:
            description = _decompress_video(
                codec, data, selection, clip, destination, kind or "mkv", on_progress, timings_s
            )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    timing_note = ", ".join(f"{name} {elapsed_s:.2f} s" for name, elapsed_s in timings_s.items())
    return f"{source}: {description}; {timing_note}, {time.perf_counter() - start_time:.2f} s in all"


def _decompress_image(
    codec: Codec,
    data: bytes,
    selection: DecodeSelection,
    destination: str,
    kind: str,
    on_progress: ProgressCallback,
    timings_s: dict[str, float],
) -> str:
    if selection.preview:
        image, fraction = codec.preview(data, selection.max_pixels)
        return f"{_save_image(image, destination, kind)}, {fraction:.0%} of it there"
    return _save_image(
        codec.decompress(data, selection.region, selection.max_pixels, on_progress, timings_s), destination, kind
    )


def _decompress_video(
    codec: Codec,
    data: bytes,
    selection: DecodeSelection,
    clip: VideoHeader,
    destination: str,
    kind: str,
    on_progress: ProgressCallback,
    timings_s: dict[str, float],
) -> str:
    if selection.preview:
        frames, num_available = codec.preview_clip(data, selection.max_pixels)
        if not num_available:
            raise ValueError("the file is cut off before its first frame is whole")
        availability_note = f", {num_available} of {clip.num_frames} frames there"
    else:
        frames, availability_note = (
            codec.decompress_clip(data, None, selection.region, selection.max_pixels, on_progress, timings_s),
            "",
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{kind}"
        num_frames = write_video(str(path), _VIDEO_CONTAINERS[kind], frames, clip.frame_rate, clip.color)
        if destination == "-":
            with path.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        else:
            storage.upload(str(path), destination)
    return f"{num_frames} frames{availability_note}"


def _open_image(file: IO[bytes], source: str) -> Image.Image | None:
    """The image in a file; None if it may be a video."""
    try:
        image = Image.open(file)
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("it is an animation; give it as a video, such as .mkv")
        return to_srgb(image)
    except UnidentifiedImageError:
        if source == "-":
            return None
        raise ValueError(f"{source} cannot be read as an image or video: unknown format") from None
    except DECODE_ERRORS as error:
        raise ValueError(f"{source} cannot be read as an image: {decode_error_text(error)}") from error


def _save_image(image: Image.Image, destination: str, kind: str) -> str:
    name, options = _IMAGE_FORMATS[kind]
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    _write_output(destination, buffer.getvalue())
    return f"{image.width} x {image.height} px"


@contextmanager
def _open_input(source: str) -> Iterator[IO[bytes]]:
    if source == "-":
        yield io.BytesIO(sys.stdin.buffer.read())
    else:
        with storage.open_url(source) as file:
            yield file


def _write_output(destination: str, data: bytes) -> None:
    if destination == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        storage.write_bytes(destination, data)
