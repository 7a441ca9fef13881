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
from bsq_ray.codec.codec import Box, Codec, Compressed, Progress
from bsq_ray.codec.container import MAX_PIXELS, Clip, read_header
from bsq_ray.data.transforms import DECODE_ERRORS, decode_error_text
from bsq_ray.media.color import to_srgb
from bsq_ray.media.video_files import VideoStream, read_video, write_video
from bsq_ray.media.video_reader import VIDEO_SUFFIXES

_IMAGES: dict[str, tuple[str, dict[str, Any]]] = {"png": ("PNG", {}), "webp": ("WEBP", {"lossless": True})}
_VIDEOS = {"mp4": "mp4", "mkv": "matroska"}


@dataclass(frozen=True)
class Part:
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
    second: float | None = None
    preview: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        chosen = sum((self.frame is not None, self.second is not None, self.preview))
        if chosen > 1 or (self.preview and self.region):
            raise ValueError("choose one of --frame, --seek and --preview, and --region only without --preview")

    def chosen_frame(self, clip: Clip) -> int | None:
        """Number of the one frame that is wanted, None for all.

        Raises:
            ValueError: the clip has no such frame.
        """
        if self.frame is None and self.second is None:
            return None
        # By its decimal digits: the float nearest to 0.12 lies below it, which is a frame earlier at 25 a second.
        number = self.frame if self.frame is not None else floor(Fraction(str(self.second)) * clip.rate)
        if not 0 <= number < clip.frames:
            length = float(clip.frames / clip.rate)
            raise ValueError(
                f"there is no frame {number}: the clip has {clip.frames} frames, numbered from 0, in {length:.2f} s"
            )
        return number


def compress_file(
    model_url: str,
    source: str,
    destination: str,
    weights: Literal["ema", "plain"] = "ema",
    progress: Progress = lambda done, total: None,
) -> str:
    """Compresses an image or video file; a sentence with sizes and times.

    Raises:
        ValueError: the model or the file cannot be read, or the result cannot be written.
    """
    codec = Codec.from_pretrained(model_url, weights)
    began = time.perf_counter()
    with _opened(source) as file:
        image = None if source.lower().endswith(VIDEO_SUFFIXES) else _image(file, source)
        try:
            if image is not None:
                coded, what = codec.compress(image, progress), f"{image.width} x {image.height} px"
            else:
                file.seek(0)
                coded, what = _compress_video(codec, read_video(file), progress)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    _write(destination, coded.data)
    return f"{source}: {what} {_told(coded)}, {time.perf_counter() - began:.2f} s in all"


def _compress_video(codec: Codec, video: VideoStream, progress: Progress) -> tuple[Compressed, str]:
    size = (0, 0)

    def frames() -> Iterator[np.ndarray]:
        nonlocal size
        for frame in video.frames:
            size = frame.shape[1], frame.shape[0]
            yield frame

    coded = codec.compress_clip(
        frames(), video.frame_rate, video.color, lambda done, _: progress(done, video.num_frames)
    )
    silent = ", sound left out" if video.has_audio else ""
    return coded, f"{coded.frames} frames of {size[0]} x {size[1]} px at {float(video.frame_rate):g} a second{silent},"


def _told(coded: Compressed) -> str:
    saved = ""
    if coded.cross_entropy_bits:
        share = coded.cross_entropy_bits / coded.raw_bits
        saved = (
            f"; the prior needs {coded.cross_entropy_bits / 8:.0f} bytes, {share:.1%} of the tokens' "
            f"{coded.raw_bits / 8:.0f}, and {coded.side_bits / 8:.0f} of side information"
        )
    took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in coded.seconds.items())
    return f"in {len(coded.data)} bytes, {coded.bits_per_pixel:.4f} bits per pixel{saved}; {took}"


def decompress_file(
    model_url: str,
    source: str,
    destination: str,
    part: Part = Part(),
    weights: Literal["ema", "plain"] = "ema",
    progress: Progress = lambda done, total: None,
) -> str:
    """Decompresses a .bsq file; a sentence about it.

    What is written goes by the name's ending: PNG or lossless WebP for an image or a frame, MP4 (H.264) or MKV (FFV1,
    lossless) for a clip. The standard output gets PNG or MKV.

    Raises:
        ValueError: the model or the file cannot be read, the file is damaged, or the ending does not suit it.
    """
    kind = "" if destination == "-" else destination.rsplit(".", 1)[-1].lower()
    if kind and kind not in _IMAGES | _VIDEOS:
        raise ValueError(f"{destination} must end in .png or .webp (an image or a frame), or .mp4 or .mkv (a clip)")
    codec = Codec.from_pretrained(model_url, weights)
    with _opened(source) as file:
        data = file.read()
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    try:
        clip = read_header(data, part.max_pixels).clip
        frame = None if clip is None else part.chosen_frame(clip)
        if clip is None and (part.frame is not None or part.second is not None):
            raise ValueError("it holds an image; --frame and --seek are for clips")
        is_picture = clip is None or frame is not None
        if kind and is_picture != (kind in _IMAGES):
            wanted = "an image or one frame, so OUT must end in .png or .webp" if is_picture else (
                "a clip, so OUT must end in .mp4 or .mkv; --frame N gives one frame as .png or .webp"
            )  # fmt: skip
            raise ValueError(f"this is {wanted}")
        if clip is None:
            what = _decompress_image(codec, data, part, destination, kind or "png", progress, seconds)
        elif frame is not None:
            [pixels_HWC] = codec.decompress_clip(
                data, range(frame, frame + 1), part.region, part.max_pixels, progress, seconds
            )
            what = f"frame {frame}, {_save(Image.fromarray(pixels_HWC), destination, kind or 'png')}"
        else:
            what = _decompress_video(codec, data, part, clip, destination, kind or "mkv", progress, seconds)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    took = ", ".join(f"{name} {spent:.2f} s" for name, spent in seconds.items())
    return f"{source}: {what}; {took}, {time.perf_counter() - began:.2f} s in all"


def _decompress_image(
    codec: Codec, data: bytes, part: Part, destination: str, kind: str, progress: Progress, seconds: dict[str, float]
) -> str:
    if part.preview:
        image, share = codec.preview(data, part.max_pixels)
        return f"{_save(image, destination, kind)}, {share:.0%} of it there"
    return _save(codec.decompress(data, part.region, part.max_pixels, progress, seconds), destination, kind)


def _decompress_video(
    codec: Codec,
    data: bytes,
    part: Part,
    clip: Clip,
    destination: str,
    kind: str,
    progress: Progress,
    seconds: dict[str, float],
) -> str:
    if part.preview:
        frames, there = codec.preview_clip(data, part.max_pixels)
        if not there:
            raise ValueError("the file is cut off before its first frame is whole")
        known = f", {there} of {clip.frames} frames there"
    else:
        frames, known = codec.decompress_clip(data, None, part.region, part.max_pixels, progress, seconds), ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{kind}"
        count = write_video(str(path), _VIDEOS[kind], frames, clip.rate, clip.colour)
        if destination == "-":
            with path.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        else:
            storage.upload(str(path), destination)
    return f"{count} frames{known}"


def _image(file: IO[bytes], source: str) -> Image.Image | None:
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


def _save(image: Image.Image, destination: str, kind: str) -> str:
    name, options = _IMAGES[kind]
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    _write(destination, buffer.getvalue())
    return f"{image.width} x {image.height} px"


@contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    if source == "-":
        yield io.BytesIO(sys.stdin.buffer.read())
    else:
        with storage.open_url(source) as file:
            yield file


def _write(destination: str, data: bytes) -> None:
    if destination == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        storage.write_bytes(destination, data)
