"""H.264, HEVC and AV1 by PyAV at the paper's settings; a file is the bare stream, without a container's overhead.

The paper compares with FFmpeg's `-preset medium -bf 0 -pix_fmt yuv420p -threads 4` at CRF 17 to 47. It has no AV1: that
is SVT-AV1's preset 8 with its own prediction structure.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass

import av
import numpy as np

from bsq_ray.evaluation.compression.clip_files import VideoClip

_THREADS = "4"
# Its encoder announces itself on stderr otherwise.
os.environ.setdefault("SVT_LOG", "1")


@dataclass(frozen=True)
class VideoCodec:
    """An encoder of FFmpeg: `encode(clip, crf)` gives the file, `decode` the frames; CRFs from the smallest file up."""

    encoder: str
    format: str
    qualities: tuple[float, ...]
    options: Mapping[str, str]

    def encode(self, clip: VideoClip, quality: float) -> bytes:
        """The whole file."""
        file = io.BytesIO()
        options = {"crf": f"{quality:g}", "threads": _THREADS, **self.options}
        with av.open(file, "w", format=self.format) as output:
            stream = output.add_stream(self.encoder, rate=clip.frame_rate, options=options)
            stream.height, stream.width = clip.frames_THW3.shape[1:3]
            stream.pix_fmt = "yuv420p"
            # As FFmpeg's command line does; PyAV's default cuts frames into slices, which costs bits.
            stream.thread_type = "FRAME"
            for pixels_HW3 in clip.frames_THW3:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HW3), format="rgb24")))
            output.mux(stream.encode(None))
        return file.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        """Frames, uint8 (T, H, W, 3)."""
        with av.open(io.BytesIO(data), format=self.format) as file:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def standard_video_codecs() -> dict[str, VideoCodec]:
    """Those that this machine's build of FFmpeg has."""
    medium = {"preset": "medium", "bf": "0"}
    crfs = (47, 42, 37, 32, 27, 22, 17)
    codecs = {
        "H.264": VideoCodec("libx264", "h264", crfs, medium),
        "HEVC": VideoCodec("libx265", "hevc", crfs, medium | {"x265-params": "log-level=error"}),
        "AV1": VideoCodec("libsvtav1", "obu", (63, 57, 50, 43, 36, 29, 22), {"preset": "8"}),
    }
    return {name: codec for name, codec in codecs.items() if codec.encoder in av.codecs_available}
