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
_BASE_MEMORY_BYTES, _MEMORY_BYTES_PER_PIXEL = 2**30, 64
_FRAME_HEADER = struct.Struct("<II")
_SUBPROCESS_CODE = "from bsq_ray.serving.media.video_sandbox import main; main()"


def read_video_sandboxed(data: bytes, container: str, max_pixels: int, timeout_s: float) -> VideoStream:
    """As `read_video`; its process ends with the frames, when they are closed, or when the time is up.

    Args:
        seconds: until the last frame is taken.

    Raises:
        TooLarge: its frames are too large; while frames are taken, too.
        ValueError: it cannot be read with this memory in this time; while frames are taken, too.
    """
    messages = _decode_in_subprocess(data, container, max_pixels, timeout_s)
    header: dict[str, Any] = next(messages)
    return VideoStream(
        messages,
        Fraction(header["rate"]),
        header["count"],
        tuple(header["size"]),
        Color(*header["colour"]),
        header["sound"],
    )


def _decode_in_subprocess(data: bytes, container: str, max_pixels: int, timeout_s: float) -> Generator[Any, None, None]:
    """What the file says of itself, and then its frames."""
    arguments = [sys.executable, "-P", "-c", _SUBPROCESS_CODE, container, str(max_pixels), str(timeout_s)]
    # Threads reserve memory that they never touch, and the limit would count it.
    low_memory_env = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    environment = {**os.environ, **low_memory_env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile() as body:
        body.write(data)
        body.seek(0)
        process = subprocess.Popen(arguments, stdin=body, stdout=subprocess.PIPE, env=environment)
    with process:
        assert process.stdout is not None
        try:
            yield _read_status(process.stdout)
            while (frame := _read_frame(process.stdout, max_pixels)) is not None:
                yield frame
            _read_status(process.stdout)
        finally:
            process.kill()


def _read_status(file: IO[bytes]) -> dict[str, Any]:
    """A line of JSON; raises what it says."""
    line = file.readline()
    if not line.endswith(b"\n"):
        raise ValueError("decoding it takes more memory or time than a request has")
    status: dict[str, Any] = json.loads(line)
    if error := status.get("error"):
        raise TooLargeError(error) if status["large"] else ValueError(error)
    return status


def _read_frame(file: IO[bytes], max_pixels: int) -> np.ndarray | None:
    """The next frame (H, W, 3); None after the last one, or where the process has ended."""
    shape = file.read(_FRAME_HEADER.size)
    height, width = _FRAME_HEADER.unpack(shape) if len(shape) == _FRAME_HEADER.size else (0, 0)
    if not 0 < height * width <= max_pixels:
        return None
    pixels_HWC = np.frombuffer(bytearray(file.read(height * width * 3)), np.uint8)
    return pixels_HWC.reshape(height, width, 3) if len(pixels_HWC) == height * width * 3 else None


def main() -> None:
    """What the process runs."""
    container, max_pixels, timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    # The system ends it then, whatever FFmpeg is at, and even if whoever waits is gone.
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    memory_limit_bytes = _BASE_MEMORY_BYTES + _MEMORY_BYTES_PER_PIXEL * max_pixels
    # Not every system has this limit.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    out, header_written = sys.stdout.buffer, False
    final_status: dict[str, Any] = {}
    try:
        video = read_video(sys.stdin.buffer, container, max_pixels)
        header = {"rate": str(video.frame_rate), "count": video.num_frames, "size": video.size, "colour": video.color}
        out.write(json.dumps({**header, "sound": video.has_audio}).encode() + b"\n")
        header_written = True
        for frame in video.frames:
            out.write(_FRAME_HEADER.pack(*frame.shape[:2]))
            out.write(frame.data)
    except ValueError as error:
        final_status = {"error": str(error), "large": isinstance(error, TooLargeError)}
    except MemoryError:
        # Nothing is said: whoever waits knows what that means.
        os._exit(1)
    out.write((_FRAME_HEADER.pack(0, 0) if header_written else b"") + json.dumps(final_status).encode() + b"\n")
    out.flush()
