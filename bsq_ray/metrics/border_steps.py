"""Visibility of tile borders: steps between neighboring pixels there, compared with other positions.

Shape suffixes: H and W pixels.
"""

from __future__ import annotations

import numpy as np


def border_step_ratio(pixels_HW3: np.ndarray, tile_size: int, patch_size: int) -> float | None:
    """Return the mean step between pixels across tile borders, relative to that across other patch borders.

    1 means that tile borders are as smooth as every other border of a patch. An image has about 1 of its own.

    Args:
        pixels_HW3: uint8 pixels.
        tile_size, patch_size: sides in pixels; tiles and patches are counted from the upper left corner.

    Returns:
        The ratio, or None if the image has no border of tiles or none of other patches, or no steps there.
    """
    ratios, weights = [], []
    for axis in (0, 1):
        step = np.abs(np.diff(pixels_HW3.astype(np.float32), axis=axis)).mean(axis=(1 - axis, 2))
        position = np.arange(1, len(step) + 1)
        is_tile, is_patch = position % tile_size == 0, position % patch_size == 0
        at_tiles, at_patches = step[is_tile], step[is_patch & ~is_tile]
        if at_tiles.size and at_patches.size and at_patches.mean() > 0:
            ratios.append(at_tiles.mean() / at_patches.mean())
            weights.append(at_tiles.size)
    # Directions are compared each with itself, because their steps differ.
    return float(np.average(ratios, weights=weights)) if ratios else None
