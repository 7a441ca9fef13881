"""Decoding and the two transforms, on real photographs."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bsq_ray.data.transforms import (
    DECODE_ERRORS,
    decode_image,
    evaluation_image,
    to_float,
    to_rgb,
    to_uint8,
    training_crop,
)


def encoded(image, file_format, **options):
    data = io.BytesIO()
    image.save(data, file_format, **options)
    return data.getvalue()


@pytest.fixture
def photo(photos):
    return photos[0]


def test_scaled_decoding_keeps_twice_the_target_and_hardly_changes_the_result(photo):
    data = encoded(photo.resize((1024, 768)), "JPEG", quality=95)
    whole, scaled = decode_image(data), decode_image(data, short_side=64)
    assert min(scaled.size) >= 128
    assert scaled.size < whole.size
    difference = np.abs(
        evaluation_image(whole, 64, "bilinear").astype(int) - evaluation_image(scaled, 64, "bilinear").astype(int)
    )
    assert difference.mean() < 2


def test_orientation_grey_alpha_cmyk_and_sixteen_bits_become_upright_rgb(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(encoded(photo, "JPEG", exif=exif))
    assert turned.size == photo.size[::-1]
    assert decode_image(encoded(photo.convert("CMYK"), "JPEG")).mode == "RGB"
    assert decode_image(encoded(photo.convert("L"), "PNG")).mode == "RGB"
    transparent = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert decode_image(encoded(transparent, "PNG")).getpixel((3, 3)) == (255, 255, 255)
    deep = Image.fromarray(np.full((16, 16), 32768, np.uint16))
    assert to_rgb(deep).getpixel((0, 0)) == pytest.approx((127, 127, 127), abs=1)


@pytest.mark.parametrize("data", [b"", b"this is text", b"\xff\xd8\xff\xe0 half a header"])
def test_what_is_no_image_raises_one_of_the_decode_errors(data):
    with pytest.raises(DECODE_ERRORS):
        decode_image(data)


def test_training_crop_is_resize_then_crop(photo):
    """Against the literal transform: resize the short side, cut the square."""
    crop = training_crop(photo, 64, (1.0, 1.0), False, np.random.default_rng(3))
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


def test_training_crop_is_a_function_of_its_generator_and_flips_when_asked(photo):
    crops = [training_crop(photo, 32, (1.0, 2.0), True, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])
    square = photo.resize((32, 32))
    plain = training_crop(square, 32, (1.0, 1.0), False, np.random.default_rng(0))
    seen = [training_crop(square, 32, (1.0, 1.0), True, np.random.default_rng(seed)) for seed in range(20)]
    mirrored = [np.array_equal(crop, plain[:, :, ::-1]) for crop in seen]
    assert 4 < sum(mirrored) < 16


def test_the_filter_of_the_evaluation_matters(photo):
    lanczos, bilinear = evaluation_image(photo, 64, "lanczos"), evaluation_image(photo, 64, "bilinear")
    assert lanczos.shape == (3, 64, 64)
    assert np.abs(lanczos.astype(int) - bilinear).mean() > 0.5


def test_floats_and_bytes_are_inverse():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_float(values).min() == -1
    assert to_float(values).max() == 1
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
