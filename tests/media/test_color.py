"""Conversion between RGB and the pixel formats of video, which must not change the brightness."""

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace

from bsq_ray.media.color import frame_to_rgb, rgb_to_frame


@pytest.fixture(scope="module")
def photo(photos):
    """Photo with even sides, uint8 (H, W, 3)."""
    pixels = np.asarray(photos[0])
    return pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2]


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p"])
@pytest.mark.parametrize("colorspace", [Colorspace.ITU601, Colorspace.ITU709])
def test_yuv_roundtrip_keeps_mean_of_each_channel(photo, pixel_format, colorspace):
    """The mean error of each channel is below 0.2 levels."""
    frame = rgb_to_frame(photo, pixel_format, int(colorspace))
    error = frame_to_rgb(frame, int(colorspace)).astype(float) - photo
    assert np.abs(error.mean((0, 1))).max() < 0.2


def test_frame_to_rgb_gray_planes_are_exact():
    """Neutral planes become exactly the gray levels of the standard, 16 to 235 scaled to 0 to 255."""
    for luma in range(16, 236, 3):
        planes = np.full((12, 8), 128, np.uint8)
        planes[:8] = luma
        rgb = frame_to_rgb(av.VideoFrame.from_ndarray(planes, "yuv420p"))
        assert np.abs(rgb.astype(float) - (luma - 16) * 255 / 219).max() <= 0.75, luma


def test_rgb_to_frame_packed_rgb_is_lossless(photo):
    """A format that stores RGB keeps every value."""
    assert np.array_equal(frame_to_rgb(rgb_to_frame(photo, "bgr0")), photo)
