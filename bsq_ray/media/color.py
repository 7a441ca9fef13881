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
_BT601_MATRIX, _UNSPECIFIED_MATRIX = 6, 2
_HD_MIN_HEIGHT = 720
# Pixel formats of 8-bit 4:2:0; the second has values from 0 to 255.
_FULL_RANGE_PLANES = "yuvj420p"
_PLANE_FORMATS = ("yuv420p", _FULL_RANGE_PLANES)
# Matrices that FFmpeg's scaler computes with.
_SCALER_MATRICES = {1, 4, 5, 6, 7, 9}


def frame_color(frame: Any) -> ColorDescription:
    """Return the color description in the metadata of a decoded frame (`av.VideoFrame`)."""
    full_range = int(frame.color_range == 2 or frame.format.name == _FULL_RANGE_PLANES)
    return ColorDescription(int(frame.color_primaries), int(frame.color_trc), int(frame.colorspace), full_range)


def resolve_matrix(matrix: int, height: int) -> int:
    """Return a matrix that FFmpeg converts with.

    Args:
        matrix: matrix coefficients of H.273. Unspecified ones are those of BT.709 from 720 lines on and of BT.601
            below, as players assume; matrices that FFmpeg cannot convert become BT.709.
        height: lines of a frame.
    """
    if matrix == _UNSPECIFIED_MATRIX:
        return BT709.matrix if height >= _HD_MIN_HEIGHT else _BT601_MATRIX
    return matrix if matrix in _SCALER_MATRICES else BT709.matrix


def frame_to_rgb(frame: Any, colorspace: int | None = None, size: tuple[int, int] | None = None) -> np.ndarray:
    """Convert a decoded frame to RGB.

    Args:
        frame: `av.VideoFrame` of any pixel format.
        colorspace: matrix of the frame; None uses the frame's metadata, see `resolve_matrix`.
        size: width and height of the result, by bicubic interpolation; None keeps the stored size.

    Returns:
        uint8 (H, W, 3), in the stored orientation: the display matrix is not applied.
    """
    if colorspace is None and not frame.format.is_rgb:
        colorspace = resolve_matrix(int(frame.colorspace), frame.height)
    width, height = size or (frame.width, frame.height)
    pixels_HW3: np.ndarray = frame.reformat(
        width, height, format="rgb24", src_colorspace=colorspace, interpolation=_ACCURATE
    ).to_ndarray()
    return pixels_HW3


def stored_planes(frame: Any) -> np.ndarray | None:
    """Return the planes of a frame, uint8 (3 / 2 H, W); None if it is not 8-bit 4:2:0 with even sides."""
    if frame.format.name not in _PLANE_FORMATS or frame.width % 2 or frame.height % 2:
        return None
    planes_PW: np.ndarray = frame.to_ndarray()
    return planes_PW


def planes_to_rgb(planes_PW: np.ndarray, color: ColorDescription) -> np.ndarray:
    """Convert planes of 8-bit 4:2:0 to RGB.

    Unlike `frame_to_rgb`, the result does not depend on the position of chroma samples that a decoder reports: planes
    of a raw file, of RGB pixels and of a decoder are converted alike.

    Args:
        planes_PW: as `stored_planes` returns them.
        color: matrix and range.

    Returns:
        uint8 (H, W, 3).
    """
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes_PW), "yuv420p")
    frame.color_range = 2 if color.full_range else 1
    return frame_to_rgb(frame, resolve_matrix(color.matrix, frame.height))


def rgb_to_frame(
    pixels_HW3: np.ndarray, pixel_format: str, colorspace: int | None = None, color_range: int | None = None
) -> Any:
    """Convert RGB pixels to a frame that an encoder accepts.

    Args:
        pixels_HW3: uint8 (H, W, 3).
        pixel_format: FFmpeg pixel format, such as "yuv420p".
        colorspace: matrix of the result; None takes that of unspecified metadata, see `resolve_matrix`.
        color_range: range of the result; None is 16 to 235.

    Returns:
        `av.VideoFrame` without a timestamp.
    """
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HW3), "rgb24")
    if colorspace is None and not av.VideoFormat(pixel_format).is_rgb:
        colorspace = resolve_matrix(_UNSPECIFIED_MATRIX, frame.height)
    return frame.reformat(
        format=pixel_format, dst_colorspace=colorspace, dst_color_range=color_range, interpolation=_ACCURATE
    )
