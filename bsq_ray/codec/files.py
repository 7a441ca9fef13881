"""Compression and decompression of files; `-` is the standard input or output.

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
from typing import IO, Any

import numpy as np
from PIL import Image

from bsq_ray import storage
from bsq_ray.codec.codec import Box, Codec, CompressedFile
from bsq_ray.codec.container import read_header
from bsq_ray.codec.header import VideoHeader
from bsq_ray.codec.rate import Rate
from bsq_ray.codec.shipped_codec import find_shipped_codec
from bsq_ray.codec.written_format import decoder_remark
from bsq_ray.media.decode_error import UnknownFormatError, translate_decode_errors
from bsq_ray.media.images import decode_image
from bsq_ray.media.limits import MAX_PIXELS
from bsq_ray.media.video_reader import VIDEO_SUFFIXES, VideoStream, read_video
from bsq_ray.media.video_writer import write_video
from bsq_ray.model_folder import WeightsKind
from bsq_ray.runtime.progress_callback import ProgressCallback, no_progress

_IMAGE_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {"png": ("PNG", {}), "webp": ("WEBP", {"lossless": True})}
_VIDEO_CONTAINERS = {"mp4": "mp4", "mkv": "matroska"}


@dataclass(frozen=True)
class DecodeSelection:
    """The part of a .bsq file to decode; by default all of it.

    Attributes:
        region: left, top, right and bottom edge in pixels.
        frame: index of one frame of a clip.
        time_s: time of one frame of a clip in seconds.
        preview: decode the available part of a truncated file.
        max_pixels: larger frames are rejected.
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
        """Return the index of the selected frame, or None for all frames.

        Raises:
            ValueError: the clip does not have this frame.
        """
        if self.frame is None and self.time_s is None:
            return None
        # Exact decimal digits: the float nearest to 0.12 is below it, which selects the previous frame at 25 fps.
        index = self.frame if self.frame is not None else floor(Fraction(str(self.time_s)) * clip.frame_rate)
        if not 0 <= index < clip.num_frames:
            duration_s = float(clip.num_frames / clip.frame_rate)
            raise ValueError(
                f"there is no frame {index}: the clip has frames 0 to {clip.num_frames - 1} in {duration_s:.2f} s"
            )
        return index


def compress_file(
    model_url: str,
    source: str,
    destination: str,
    weights: WeightsKind = "ema",
    on_progress: ProgressCallback = no_progress,
    rate: Rate = Rate(),
) -> str:
    """Compress an image or video file; return one line with sizes and times.

    Args:
        rate: bits per token, or a target; other than all bits only with nested bits.

    Raises:
        ValueError: the model or the file cannot be read, the rate cannot be reached, or the result cannot be written.
    """
    codec = Codec.from_pretrained(model_url, weights)
    start_time = time.perf_counter()
    with _open_input(source) as file:
        image = None if source.lower().endswith(VIDEO_SUFFIXES) else _open_image(file, source)
        try:
            if image is not None:
                compressed, description = codec.compress(image, on_progress, rate), f"{image.width} x {image.height} px"
            else:
                file.seek(0)
                compressed, description = _compress_video(codec, read_video(file), on_progress, rate)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    _write_output(destination, compressed.data)
    return f"{source}: {description} {_summary(compressed)}, {time.perf_counter() - start_time:.2f} s in total"


def _compress_video(
    codec: Codec, video: VideoStream, on_progress: ProgressCallback, rate: Rate
) -> tuple[CompressedFile, str]:
    size = (0, 0)

    def frames() -> Iterator[np.ndarray]:
        nonlocal size
        for frame in video.frames:
            size = frame.shape[1], frame.shape[0]
            yield frame

    compressed = codec.compress_clip(
        frames(), video.frame_rate, video.color, lambda done, _: on_progress(done, video.num_frames), rate
    )
    sound_note = ", without its sound" if video.has_audio else ""
    return (
        compressed,
        f"{compressed.num_frames} frames of {size[0]} x {size[1]} px at {float(video.frame_rate):g} fps{sound_note},",
    )


def _summary(compressed: CompressedFile) -> str:
    prior_note = ""
    if compressed.cross_entropy_bits:
        fraction = compressed.cross_entropy_bits / compressed.raw_bits
        prior_note = (
            f"; tokens {compressed.raw_bits / 8:.0f} bytes raw, {compressed.cross_entropy_bits / 8:.0f} "
            f"({fraction:.1%}) with the prior, plus {compressed.side_info_bits / 8:.0f} of side information"
        )
    timing_note = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in compressed.timings_s.items())
    return (
        f"in {len(compressed.data)} bytes, {compressed.bits_per_pixel:.4f} bits per pixel, {compressed.num_bits} bits "
        f"per token{prior_note}; {timing_note}"
    )


def decompress_file(
    model_url: str | None,
    source: str,
    destination: str,
    selection: DecodeSelection = DecodeSelection(),
    weights: WeightsKind = "ema",
    on_progress: ProgressCallback = no_progress,
) -> str:
    """Decompress a .bsq file; return one line with sizes and times.

    The file name extension selects the format: PNG or lossless WebP for an image or a frame, MP4 (H.264) or MKV (FFV1,
    lossless) for a clip. The standard output receives PNG or MKV.

    Args:
        model_url: model folder that wrote the file; None finds it among the shipped models.

    Raises:
        ValueError: the model or the file cannot be read, the file is damaged, or the extension does not fit.
    """
    has_name = destination != "-" and not storage.is_special(destination)
    kind = destination.rsplit(".", 1)[-1].lower() if has_name else ""
    if kind and kind not in _IMAGE_FORMATS | _VIDEO_CONTAINERS:
        raise ValueError(f"{destination} must end in .png or .webp (an image or a frame), or .mp4 or .mkv (a clip)")
    # A wrong folder is reported before the input is read, which may be a pipe.
    codec = None if model_url is None else Codec.from_pretrained(model_url, weights)
    with _open_input(source) as file:
        data = file.read()
    timings_s: dict[str, float] = {}
    try:
        if codec is None:
            codec = Codec.from_pretrained(find_shipped_codec(data, selection.max_pixels), weights)
        start_time = time.perf_counter()
        clip = read_header(data, selection.max_pixels).clip
        frame = None if clip is None else selection.resolve_frame(clip)
        if clip is None and (selection.frame is not None or selection.time_s is not None):
            raise ValueError("it contains an image; --frame and --seek are for clips")
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
        if note := decoder_remark(codec.token_formats, data, selection.max_pixels):
            description += f", {note}"
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    available, stored = codec.available_bits(data, selection.max_pixels)
    if available < stored:
        description += f", {available} of {stored} bits per token, because the file is cut"
    timing_note = ", ".join(f"{name} {elapsed_s:.2f} s" for name, elapsed_s in timings_s.items())
    return f"{source}: {description}; {timing_note}, {time.perf_counter() - start_time:.2f} s in total"


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
        return f"{_save_image(image, destination, kind)}, {fraction:.0%} of it available"
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
            raise ValueError("the file is truncated before the end of its first frame")
        availability_note = f", {num_available} of {clip.num_frames} frames available"
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
    """Return the image in a file, or None if it may be a video."""
    try:
        with translate_decode_errors(f"{source} cannot be read as an image: "):
            return decode_image(file.read())
    except UnknownFormatError:
        if source == "-" or storage.is_special(source):
            return None
        raise ValueError(f"{source} cannot be read as an image or video: unknown format") from None


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
