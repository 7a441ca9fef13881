"""Video files: written frames, sizes, limits, and errors."""

import io
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsq_ray.media.color import BT709, SRGB, ColorDescription
from bsq_ray.media.decode_error import TooLargeError
from bsq_ray.media.video_reader import probe, read_video
from bsq_ray.media.video_writer import VideoEncoder, even_size, write_video

RATE = Fraction(25)


@pytest.fixture(scope="module")
def frames(photos):
    """Four frames of 96 x 64 pixels: a photo that moves to the right."""
    pixels = np.asarray(photos[0].resize((96, 64)))
    return [np.ascontiguousarray(np.roll(pixels, 3 * number, 1)) for number in range(4)]


def encode(frames, container_format="mp4", color=BT709, encoder=None):
    file = io.BytesIO()
    assert write_video(file, container_format, frames, RATE, color, encoder) == len(frames)
    return file.getvalue()


def test_write_video_matroska_is_lossless(frames):
    """A Matroska file returns the same bytes, rate and color."""
    video = read_video(io.BytesIO(encode(frames, "matroska", SRGB)))
    assert video.frame_rate == RATE
    assert video.color[:2] == SRGB[:2]
    assert np.array_equal(list(video.frames), frames)


@pytest.mark.parametrize("size", [(64, 96), (63, 95)])
@pytest.mark.parametrize("color", [BT709, ColorDescription(9, 16, 9, 0), SRGB])
def test_write_video_mp4_keeps_size_color_and_pixels(frames, size, color):
    """An MP4 of even or odd size is close to the frames and carries their color tags."""
    cropped = [frame[: size[0], : size[1]] for frame in frames]
    video = read_video(io.BytesIO(encode(cropped, color=color)))
    assert video.color == color._replace(matrix=color.matrix or 1)
    decoded = np.stack(list(video.frames)).astype(int)
    assert decoded.shape[1:3] == size
    assert np.abs(decoded - np.stack(cropped)).mean() < 4


def test_read_video_above_max_pixels_raises(frames):
    """A video with larger frames than allowed is rejected from its header."""
    with pytest.raises(TooLargeError, match="96 x 64 pixels; at most 6143 are allowed"):
        read_video(io.BytesIO(encode(frames)), max_pixels=6143)


@pytest.mark.parametrize("read_all", [lambda file: list(read_video(file).frames), probe])
def test_readers_damaged_mp4_raises(frames, read_all):
    """A file that is overwritten in the middle raises an error after its readable frames."""
    data = bytearray(encode(frames * 5))
    damaged = slice(len(data) // 2, -len(data) // 4)
    data[damaged] = b"\xff" * len(data[damaged])
    with pytest.raises(ValueError, match=r"the video is damaged after \d+ decoded frames \(Invalid data"):
        read_all(io.BytesIO(data))


def test_write_video_unusable_encoder_raises(frames):
    """An error of the encoder becomes a `ValueError`."""
    with pytest.raises(ValueError, match="the video cannot be written"):
        encode(frames, encoder=VideoEncoder("libx264", {"crf": "no number"}))


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [((1080, 720), 255, (254, 170)), ((720, 1080), 255, (170, 254)), ((1920, 1080), 177, (176, 100))],
)
def test_even_size_rounds_odd_max_side_down(size, max_side, expected):
    """An odd `max_side` is rounded down to the next even size."""
    assert even_size(*size, max_side) == expected


@given(st.integers(2, 5000), st.integers(2, 5000), st.integers(8, 2000))
def test_even_size_is_even_and_keeps_aspect_ratio(width, height, max_side):
    """Sizes are even, at most `max_side`, and keep the aspect ratio."""
    size = even_size(width, height, max_side)
    assert all(side % 2 == 0 and side >= 2 for side in size)
    assert max(size) == max_side - max_side % 2
    scale = max(size) / max(width, height)
    assert all(abs(new - old * scale) <= 1 or new == 2 for new, old in zip(size, (width, height), strict=True))
