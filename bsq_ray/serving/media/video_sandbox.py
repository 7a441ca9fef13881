"""Decoding of untrusted videos in a subprocess with limited memory and time.

    service ─body in a temporary file─▶ subprocess: read_video ─stdout─▶ service

    stdout: header (JSON line), frames (height, width, pixels), 0 x 0 frame, final status (JSON line)

The index of an MP4 of a thousand bytes can request gigabytes or hours, and FFmpeg limits neither.
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

from bsq_ray.media.color import ColorDescription
from bsq_ray.media.decode_error import TooLargeError
from bsq_ray.media.video_reader import VideoStream, read_video

# Memory limit of the subprocess: a constant, and a part per pixel of the largest frame; decoders keep many frames.
_BASE_MEMORY_BYTES, _MEMORY_BYTES_PER_PIXEL = 2**30, 64
_FRAME_HEADER = struct.Struct("<II")
_SUBPROCESS_CODE = "from bsq_ray.serving.media.video_sandbox import main; main()"


def read_video_sandboxed(data: bytes, container: str, *, max_pixels: int, timeout_s: float) -> VideoStream:
    """Open a video as `read_video` does, in a subprocess that ends with the frames or when they are closed.

    Args:
        container: name of the container in FFmpeg.
        max_pixels: maximum number of pixels of a frame.
        timeout_s: time until the last frame must be decoded; the subprocess is killed after it.

    Raises:
        TooLargeError: a frame is too large; also while frames are iterated.
        ValueError: the video cannot be decoded within these limits; also while frames are iterated.
    """
    messages = _decode_in_subprocess(data, container, max_pixels=max_pixels, timeout_s=timeout_s)
    header: dict[str, Any] = next(messages)
    return VideoStream(
        messages,
        Fraction(header["rate"]),
        header["count"],
        tuple(header["size"]),
        ColorDescription(*header["color"]),
        header["has_sound"],
    )


def _decode_in_subprocess(
    data: bytes, container: str, *, max_pixels: int, timeout_s: float
) -> Generator[Any, None, None]:
    """Yield the header of the video, and then its frames."""
    arguments = [sys.executable, "-P", "-c", _SUBPROCESS_CODE, container, str(max_pixels), str(timeout_s)]
    # Threads reserve memory that they never use, and the limit counts it.
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
    """Read a status line of the subprocess; raise the error that it contains."""
    line = file.readline()
    if not line.endswith(b"\n"):
        raise ValueError("decoding exceeds the memory or time limit of a request")
    status: dict[str, Any] = json.loads(line)
    if error := status.get("error"):
        raise TooLargeError(error) if status["is_too_large"] else ValueError(error)
    return status


def _read_frame(file: IO[bytes], max_pixels: int) -> np.ndarray | None:
    """Read the next frame (H, W, 3); None after the last one, or if the subprocess has ended."""
    shape = file.read(_FRAME_HEADER.size)
    height, width = _FRAME_HEADER.unpack(shape) if len(shape) == _FRAME_HEADER.size else (0, 0)
    if not 0 < height * width <= max_pixels:
        return None
    pixels_HWC = np.frombuffer(bytearray(file.read(height * width * 3)), np.uint8)
    return pixels_HWC.reshape(height, width, 3) if len(pixels_HWC) == height * width * 3 else None


def main() -> None:
    """Decode the video on stdin to stdout: the entry point of the subprocess."""
    container, max_pixels, timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    # The kernel kills the process then, also within a call of FFmpeg, and also if the service is gone.
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    memory_limit_bytes = _BASE_MEMORY_BYTES + _MEMORY_BYTES_PER_PIXEL * max_pixels
    # Not every system has this limit.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    out, header_written = sys.stdout.buffer, False
    final_status: dict[str, Any] = {}
    try:
        video = read_video(sys.stdin.buffer, container, max_pixels)
        header = {"rate": str(video.frame_rate), "count": video.num_frames, "size": video.size, "color": video.color}
        out.write(json.dumps({**header, "has_sound": video.has_audio}).encode() + b"\n")
        header_written = True
        for frame in video.frames:
            out.write(_FRAME_HEADER.pack(*frame.shape[:2]))
            out.write(frame.data)
    except ValueError as error:
        final_status = {"error": str(error), "is_too_large": isinstance(error, TooLargeError)}
    except MemoryError:
        # The service recognizes the missing status line.
        os._exit(1)
    out.write((_FRAME_HEADER.pack(0, 0) if header_written else b"") + json.dumps(final_status).encode() + b"\n")
    out.flush()
