"""Steps between pixels across the borders of tiles, relative to other borders of patches."""

import numpy as np
import pytest

from bsq_ray.metrics.border_steps import border_step_ratio


def test_border_step_ratio_smooth_image_is_one():
    ramp = np.arange(96, dtype=np.uint8)[:, None] + np.arange(128, dtype=np.uint8)
    assert border_step_ratio(ramp[..., None].repeat(3, 2), 32, 8) == 1


def test_border_step_ratio_photo_is_about_one(photos):
    ratios = [border_step_ratio(np.asarray(photo.resize((384, 256))), 64, 8) for photo in photos]
    assert np.mean(ratios) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("axis", [0, 1])
def test_border_step_ratio_finds_tiles_of_other_brightness(axis):
    """Steps of 2 at every patch, and of 2 + 4 at every tile."""
    patch, tile = np.arange(128) // 8, np.arange(128) // 32
    column = np.broadcast_to((2 * patch + 4 * tile)[:, None, None], (128, 128, 3)).astype(np.uint8)
    assert border_step_ratio(np.moveaxis(column, 0, axis), 32, 8) == 3


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (1, 200)])
def test_border_step_ratio_without_borders_is_none(size):
    """A single tile has no border, and a uniform image has no steps."""
    assert border_step_ratio(np.zeros((*size, 3), np.uint8), 32, 8) is None
