"""What the values of pixels mean: images become sRGB, clips keep what their source says of itself."""

from __future__ import annotations

from typing import NamedTuple


class Color(NamedTuple):
    """Code points of ITU-T H.273, and whether all 256 values of a source are used (1) or 16 to 235 (0)."""

    primaries: int
    transfer: int
    matrix: int
    full_range: int


SRGB = Color(1, 13, 0, 1)
