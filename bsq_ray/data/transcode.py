"""What is stored of a video file: the file as it is, or made again at a constant rate or a smaller size."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from bsq_ray.data.manifest import Video
from bsq_ray.media.video_reader import Probe, decode, even_size, open_video, probe, time_of, upright

# H.264 that the eye does not tell from its source, with a key frame often enough to begin anywhere.
_CODEC, _OPTIONS = "libx264", {"crf": "14", "preset": "veryfast", "g": "12", "bf": "0"}
# Longest time that one frame is held, seconds: longer ones are broken time stamps.
_HELD = 60.0
# As many pictures, at most, for each frame that a video of variable rate has: more come of broken time stamps.
_REPEATED = 50


class TooShort(ValueError):
    """The video is whole, but has too few frames."""


def stored_video(data: bytes, suffix: str, max_side: int | None, min_frames: int) -> tuple[bytes, str, Video, str]:
    """The bytes to store, their suffix, what is known of them, and what was changed ("" for nothing).

    Args:
        suffix: of the file, without the dot.
        max_side: videos with a longer side are shrunk to it; None keeps their size.
        min_frames: fewer are too few.

    Raises:
        TooShort: it has fewer frames.
        ValueError: it cannot be decoded.
    """
    found = probe(io.BytesIO(data))
    if found.video.frames < min_frames:
        raise TooShort(f"has {found.video.frames} frames, fewer than {min_frames}")
    longest = max(found.video.width, found.video.height)
    shrunk = max_side is not None and longest > max_side
    if not found.variable and not shrunk:
        return data, suffix, found.video, ""
    made = _made_again(data, found, min(longest, max_side or longest))
    known = probe(io.BytesIO(made)).video
    return made, "mp4", known, f"variable rate, now {known.fps:.4g} fps" if found.variable else ""


def _made_again(data: bytes, found: Probe, max_side: int) -> bytes:
    width, height = even_size(found.video.width, found.video.height, max_side)
    rate = Fraction(1 / found.interval).limit_denominator(1001)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream(_CODEC, rate=rate, options=_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, image in enumerate(_at_constant_rate(data, found)):
            frame = av.VideoFrame.from_image(image.resize((width, height), Image.Resampling.LANCZOS))
            frame.pts, frame.time_base = number, 1 / rate
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def _at_constant_rate(data: bytes, found: Probe) -> Iterator[Image.Image]:
    """One picture for each interval: the frame that is shown at that time.

    Raises:
        ValueError: the time stamps are broken: they jump, or ask for far more pictures than there are frames.
    """
    times = np.maximum.accumulate(found.seconds) - found.seconds[0]
    jump, pictures = np.diff(times).max(initial=0), 1 + round(times[-1] / found.interval)
    if jump > _HELD:
        raise ValueError(f"its time stamps jump by {jump:.0f} s")
    if pictures > _REPEATED * len(times):
        raise ValueError(
            f"its time stamps make {pictures} pictures of {len(times)} frames at {found.video.fps:.4g} fps"
        )
    held: Any = None
    shown = 0
    with open_video(io.BytesIO(data)) as (container, stream):
        for frame in decode(container, stream):
            seconds = float(time_of(frame) * stream.time_base) - found.seconds[0]
            due = round(seconds / found.interval)
            for _ in range(due - shown if held is not None else 0):
                yield held
            shown, held = max(shown, due), upright(frame)
        yield held
