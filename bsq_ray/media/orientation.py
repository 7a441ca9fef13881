"""Orientation of stored pixels: the eight of EXIF, which also describe the display matrix of a video."""

from __future__ import annotations

import numpy as np

UPRIGHT = 1
# EXIF orientation: whether rows are mirrored (left and right exchanged), then quarter turns counterclockwise.
_STEPS = {
    1: (False, 0), 2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1),
}  # fmt: skip
_ORIENTATIONS = {steps: orientation for orientation, steps in _STEPS.items()}


def swaps_sides(orientation: int) -> bool:
    """Return True if width and height are exchanged."""
    return orientation >= 5


def to_upright(pixels_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror stored pixels to the orientation of display.

    Args:
        pixels_HWC: (H, W, C), or (H, W).
        orientation: 1 to 8, as in EXIF.

    Returns:
        a contiguous array; the same one if it is upright.
    """
    is_mirrored, quarter_turns = _STEPS[orientation]
    if is_mirrored:
        pixels_HWC = pixels_HWC[:, ::-1]
    return np.ascontiguousarray(np.rot90(pixels_HWC, quarter_turns))


def orientation_of_matrix(a: float, b: float, c: float, d: float) -> int:
    """Return the orientation that is nearest to a display matrix.

    A stored pixel (x, y), y downwards, is displayed at (a x + c y, b x + d y), as in the track header of MP4.
    A singular matrix does not change the pixels.
    """
    determinant = a * d - b * c
    if not np.isfinite(determinant) or determinant == 0:
        return UPRIGHT
    is_mirrored = determinant < 0
    if is_mirrored:
        a, b = -a, -b
    # The angle of the stored x axis on the screen; y downwards, so that positive angles are clockwise.
    clockwise_turns = round(float(np.arctan2(b - c, a + d)) / (np.pi / 2))
    return _ORIENTATIONS[is_mirrored, -clockwise_turns % 4]
