"""Standard video codecs by PyAV with the paper's settings: H.264, HEVC, AV1.

A file is the elementary stream, without the overhead of a container. The paper compares with FFmpeg's
`-preset medium -bf 0 -pix_fmt yuv420p -threads 4` at CRF 17 to 47. It has no AV1; here it is preset 8 of SVT-AV1 with
its default prediction structure. Clips that are stored as 4:2:0 are encoded as they are.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from bsq_ray.evaluation.compression.clip_files import VideoClip
from bsq_ray.media.color import frame_color, frame_to_rgb, planes_to_rgb, stored_planes
from bsq_ray.runtime.thread_scheduling import normal_scheduling

_THREADS = "4"
# Otherwise SVT-AV1 prints its version to stderr.
os.environ.setdefault("SVT_LOG", "1")


@dataclass(frozen=True)
class VideoCodec:
    """An encoder of FFmpeg.

    Attributes:
        encoder: FFmpeg's name of the encoder.
        format: FFmpeg's name of the format of the elementary stream.
        qualities: CRFs from the smallest file to the largest.
        options: further options of the encoder.
    """

    encoder: str
    format: str
    qualities: tuple[float, ...]
    options: Mapping[str, str]

    def encode(self, clip: VideoClip, quality: float) -> bytes:
        """Return the content of the compressed file; `quality` is the CRF."""
        file = io.BytesIO()
        options = {"crf": f"{quality:g}", "threads": _THREADS, **self.options}
        with av.open(file, "w", format=self.format) as output:
            stream = output.add_stream(self.encoder, rate=clip.frame_rate, options=options)
            stream.height, stream.width = clip.frames_THW3.shape[1:3]
            stream.pix_fmt = "yuv420p"
            # FFmpeg's command line uses frame threads; PyAV's default divides frames into slices, which costs bits.
            stream.thread_type = "FRAME"
            if clip.stored is not None:
                # The decoder then converts to RGB as the source is converted.
                stream.codec_context.colorspace = clip.stored.color.matrix
                stream.codec_context.color_range = 2 if clip.stored.color.full_range else 1
            with normal_scheduling():
                output.start_encoding()
            for frame in clip.frames_420():
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return file.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        """Return the frames, uint8 (T, H, W, 3)."""
        with av.open(io.BytesIO(data), format=self.format) as file:
            return np.stack([_to_rgb(frame) for frame in file.decode(video=0)])


def _to_rgb(frame: Any) -> np.ndarray:
    """Convert a decoded frame as the frames of a clip are converted."""
    planes_PW = stored_planes(frame)
    return frame_to_rgb(frame) if planes_PW is None else planes_to_rgb(planes_PW, frame_color(frame))


def standard_video_codecs() -> dict[str, VideoCodec]:
    """Return H.264, HEVC and AV1, as far as the installed FFmpeg has their encoders."""
    medium = {"preset": "medium", "bf": "0"}
    crfs = (47, 42, 37, 32, 27, 22, 17)
    codecs = {
        "H.264": VideoCodec("libx264", "h264", crfs, medium),
        "HEVC": VideoCodec("libx265", "hevc", crfs, medium | {"x265-params": "log-level=error"}),
        "AV1": VideoCodec("libsvtav1", "obu", (63, 57, 50, 43, 36, 29, 22), {"preset": "8"}),
    }
    return {name: codec for name, codec in codecs.items() if codec.encoder in av.codecs_available}
