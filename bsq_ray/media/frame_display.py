"""Conversion of decoded frames to the pixels of display: RGB, upright, square.

    stored frame ─square pixels, RGB─▶ ─display matrix─▶ uint8 (H, W, 3)

The display matrix of a file turns and mirrors, by one of the eight orientations of EXIF. Pixels that are not square are
resampled: the smaller of the displayed sides is enlarged, so that none are lost.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from av.sidedata.sidedata import SideDataContainer, Type

from bsq_ray.media.color import frame_to_rgb
from bsq_ray.media.orientation import UPRIGHT, orientation_of_matrix, swaps_sides, to_upright

# Ratios of pixel sides beyond this come from broken headers.
_MAX_PIXEL_ASPECT = 8.0


def display_rgb(frame: Any, stream: Any) -> np.ndarray:
    """Convert a decoded frame to RGB in the orientation and aspect ratio of display.

    Args:
        frame: `av.VideoFrame`.
        stream: the stream that it comes from.

    Returns:
        uint8 (H, W, 3).
    """
    return to_upright(frame_to_rgb(frame, size=_square_size(frame, stream)), frame_orientation(frame))


def display_size(frame: Any, stream: Any) -> tuple[int, int]:
    """Return width and height of the pixels that `display_rgb` returns."""
    width, height = _square_size(frame, stream)
    return (height, width) if swaps_sides(frame_orientation(frame)) else (width, height)


def _square_size(frame: Any, stream: Any) -> tuple[int, int]:
    """Return width and height of the stored frame with square pixels."""
    # The ratio of the container, or that of the coded frames.
    aspect = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    if not 1 / _MAX_PIXEL_ASPECT <= aspect <= _MAX_PIXEL_ASPECT:
        return frame.width, frame.height
    if aspect > 1:
        return round(frame.width * aspect), frame.height
    return frame.width, round(frame.height / aspect)


def frame_orientation(frame: Any) -> int:
    """Return the orientation, 1 to 8, that is nearest to the display matrix of a decoded frame."""
    # The property `side_data` ties a frame to itself, so that only a garbage collection frees its pixels and threads.
    matrix = SideDataContainer(frame).get(Type.DISPLAYMATRIX)  # type: ignore[call-arg]
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).astype(float)
    return orientation_of_matrix(a, b, c, d)
