"""Color metadata of video frames, and conversion between FFmpeg pixel formats and RGB."""

from __future__ import annotations

from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation

# FFmpeg's default rounding makes every channel one level darker, and it converts chroma at half resolution.
_ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class ColorDescription(NamedTuple):
    """Color description of a video, with the code points of ITU-T H.273.

    Attributes:
        primaries: color primaries.
        transfer: transfer characteristics.
        matrix: matrix coefficients.
        full_range: 1 for values from 0 to 255, 0 for values from 16 to 235.
    """

    primaries: int
    transfer: int
    matrix: int
    full_range: int


SRGB = ColorDescription(1, 13, 0, 1)
BT709 = ColorDescription(1, 1, 1, 0)


def frame_color(frame: Any) -> ColorDescription:
    """Return the color description in the metadata of a decoded frame (`av.VideoFrame`)."""
    full_range = int(frame.color_range == 2)
    return ColorDescription(int(frame.color_primaries), int(frame.color_trc), int(frame.colorspace), full_range)


def frame_to_rgb(frame: Any, colorspace: int | None = None) -> np.ndarray:
    """Convert a decoded frame to RGB.

    Args:
        frame: `av.VideoFrame` of any pixel format.
        colorspace: matrix of the frame (`av.video.reformatter.Colorspace`); None uses the frame's metadata.

    Returns:
        uint8 (H, W, 3), in the stored orientation: rotation metadata is not applied.
    """
    pixels_HW3: np.ndarray = frame.reformat(
        format="rgb24", src_colorspace=colorspace, interpolation=_ACCURATE
    ).to_ndarray()
    return pixels_HW3


def rgb_to_frame(
    pixels_HW3: np.ndarray, pixel_format: str, colorspace: int | None = None, color_range: int | None = None
) -> Any:
    """Convert RGB pixels to a frame that an encoder accepts.

    Args:
        pixels_HW3: uint8 (H, W, 3).
        pixel_format: FFmpeg pixel format, such as "yuv420p".
        colorspace, color_range: matrix and range of the result; None uses FFmpeg's default (BT.601, 16 to 235).

    Returns:
        `av.VideoFrame` without a timestamp.
    """
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HW3), "rgb24")
    return frame.reformat(
        format=pixel_format, dst_colorspace=colorspace, dst_color_range=color_range, interpolation=_ACCURATE
    )
