"""Decoding and the two transforms, on real photographs."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bsq_ray.data.transforms import (
    DECODE_ERRORS,
    decode_image,
    eval_transform,
    to_float,
    to_rgb,
    to_uint8,
    train_transform,
)


def encode(image, file_format, **options):
    data = io.BytesIO()
    image.save(data, file_format, **options)
    return data.getvalue()


@pytest.fixture
def photo(photos):
    return photos[0]


def test_decode_image_scaled_jpeg_stays_close_to_full(photo):
    """Scaled JPEG decoding keeps at least twice the target size and barely changes the result."""
    data = encode(photo.resize((1024, 768)), "JPEG", quality=95)
    whole, scaled = decode_image(data), decode_image(data, short_side=64)
    assert min(scaled.size) >= 128
    assert scaled.size < whole.size
    difference = np.abs(
        eval_transform(whole, 64, "bilinear").astype(int) - eval_transform(scaled, 64, "bilinear").astype(int)
    )
    assert difference.mean() < 2


def test_decode_image_unusual_modes_become_upright_rgb(photo):
    """Rotated, gray, transparent, CMYK and 16-bit images become upright RGB."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(encode(photo, "JPEG", exif=exif))
    assert turned.size == photo.size[::-1]
    assert decode_image(encode(photo.convert("CMYK"), "JPEG")).mode == "RGB"
    assert decode_image(encode(photo.convert("L"), "PNG")).mode == "RGB"
    transparent = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert decode_image(encode(transparent, "PNG")).getpixel((3, 3)) == (255, 255, 255)
    deep = Image.fromarray(np.full((16, 16), 32768, np.uint16))
    assert to_rgb(deep).getpixel((0, 0)) == pytest.approx((127, 127, 127), abs=1)


@pytest.mark.parametrize("data", [b"", b"this is text", b"\xff\xd8\xff\xe0 half a header"])
def test_decode_image_invalid_data_raises_decode_error(data):
    """Data that is not an image raises one of `DECODE_ERRORS`."""
    with pytest.raises(DECODE_ERRORS):
        decode_image(data)


def test_train_transform_equals_resize_then_crop(photo):
    """Against the literal transform: resize the short side, cut the square."""
    crop = train_transform(photo, 64, (1.0, 1.0), False, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    rng.uniform()
    factor = 64 / min(photo.size)
    resized = photo.resize([round(side * factor) for side in photo.size], Image.Resampling.BILINEAR)
    left, top = rng.integers(resized.width - 63), rng.integers(resized.height - 63)
    expected = np.asarray(resized.crop((left, top, left + 64, top + 64))).transpose(2, 0, 1)
    assert crop.shape == (3, 64, 64)
    difference = np.abs(crop.astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_train_transform_is_reproducible_and_flips(photo):
    """The training transform depends only on its random generator and flips half of the crops if enabled."""
    crops = [train_transform(photo, 32, (1.0, 2.0), True, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])
    square = photo.resize((32, 32))
    plain = train_transform(square, 32, (1.0, 1.0), False, np.random.default_rng(0))
    flipped_crops = [train_transform(square, 32, (1.0, 1.0), True, np.random.default_rng(seed)) for seed in range(20)]
    mirrored = [np.array_equal(crop, plain[:, :, ::-1]) for crop in flipped_crops]
    assert 4 < sum(mirrored) < 16


def test_eval_transform_interpolation_changes_result(photo):
    """Lanczos and bilinear interpolation give different evaluation images."""
    lanczos, bilinear = eval_transform(photo, 64, "lanczos"), eval_transform(photo, 64, "bilinear")
    assert lanczos.shape == (3, 64, 64)
    assert np.abs(lanczos.astype(int) - bilinear).mean() > 0.5


def test_to_float_and_to_uint8_are_inverse():
    """`to_uint8` inverts `to_float` and clamps values outside [-1, 1]."""
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_float(values).min() == -1
    assert to_float(values).max() == 1
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
