"""Videos that strangers send, decoded in a process of their own: what a hostile file does to FFmpeg ends with that.

    body ─file─▶ read_video ─stdout─▶ what the file says, frames one by one, how it ended

The index of an MP4 of a thousand bytes can ask for gigabytes or for hours, and FFmpeg itself has no limit for either.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import suppress
from fractions import Fraction
from typing import IO, Any

import numpy as np

from bsq_ray.media.color import Color
from bsq_ray.media.video_files import TooLargeError, VideoStream, read_video

# Bytes of the process, beside those for each pixel of the largest frame, of which decoders keep many.
_OWN_BYTES, _PIXEL_BYTES = 2**30, 64
_SHAPE = struct.Struct("<II")
_CODE = "from bsq_ray.serving.media.video_sandbox import main; main()"


def read_apart(data: bytes, kind: str, max_pixels: int, seconds: float) -> VideoStream:
    """As `read_video`; its process ends with the frames, when they are closed, or when the time is up.

    Args:
        seconds: until the last frame is taken.

    Raises:
        TooLarge: its frames are too large; while frames are taken, too.
        ValueError: it cannot be read with this memory in this time; while frames are taken, too.
    """
    answers = _answers(data, kind, max_pixels, seconds)
    told: dict[str, Any] = next(answers)
    return VideoStream(
        answers, Fraction(told["rate"]), told["count"], tuple(told["size"]), Color(*told["colour"]), told["sound"]
    )


def _answers(data: bytes, kind: str, max_pixels: int, seconds: float) -> Generator[Any, None, None]:
    """What the file says of itself, and then its frames."""
    arguments = [sys.executable, "-P", "-c", _CODE, kind, str(max_pixels), str(seconds)]
    # Threads reserve memory that they never touch, and the limit would count it.
    lean = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    environment = {**os.environ, **lean, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile() as body:
        body.write(data)
        body.seek(0)
        process = subprocess.Popen(arguments, stdin=body, stdout=subprocess.PIPE, env=environment)
    with process:
        assert process.stdout is not None
        try:
            yield _told(process.stdout)
            while (frame := _frame(process.stdout, max_pixels)) is not None:
                yield frame
            _told(process.stdout)
        finally:
            process.kill()


def _told(file: IO[bytes]) -> dict[str, Any]:
    """A line of JSON; raises what it says."""
    line = file.readline()
    if not line.endswith(b"\n"):
        raise ValueError("decoding it takes more memory or time than a request has")
    told: dict[str, Any] = json.loads(line)
    if error := told.get("error"):
        raise TooLargeError(error) if told["large"] else ValueError(error)
    return told


def _frame(file: IO[bytes], max_pixels: int) -> np.ndarray | None:
    """The next frame (H, W, 3); None after the last one, or where the process has ended."""
    shape = file.read(_SHAPE.size)
    height, width = _SHAPE.unpack(shape) if len(shape) == _SHAPE.size else (0, 0)
    if not 0 < height * width <= max_pixels:
        return None
    pixels_HWC = np.frombuffer(bytearray(file.read(height * width * 3)), np.uint8)
    return pixels_HWC.reshape(height, width, 3) if len(pixels_HWC) == height * width * 3 else None


def main() -> None:
    """What the process runs."""
    kind, max_pixels, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    # The system ends it then, whatever FFmpeg is at, and even if whoever waits is gone.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    most = _OWN_BYTES + _PIXEL_BYTES * max_pixels
    # Not every system has this limit.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    out, begun = sys.stdout.buffer, False
    end: dict[str, Any] = {}
    try:
        video = read_video(sys.stdin.buffer, kind, max_pixels)
        told = {"rate": str(video.frame_rate), "count": video.num_frames, "size": video.size, "colour": video.color}
        out.write(json.dumps({**told, "sound": video.has_audio}).encode() + b"\n")
        begun = True
        for frame in video.frames:
            out.write(_SHAPE.pack(*frame.shape[:2]))
            out.write(frame.data)
    except ValueError as error:
        end = {"error": str(error), "large": isinstance(error, TooLargeError)}
    except MemoryError:
        # Nothing is said: whoever waits knows what that means.
        os._exit(1)
    out.write((_SHAPE.pack(0, 0) if begun else b"") + json.dumps(end).encode() + b"\n")
    out.flush()
