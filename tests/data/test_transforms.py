"""Training crops, evaluation images, and conversion to tensors, on real photos."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision_stub import stub_torchvision_ops

from bsq_ray.data.transforms import eval_transform, sample_crop, to_float, to_uint8, train_transform


@pytest.fixture
def photo(photos):
    return photos[0]


def test_train_transform_equals_resize_then_crop(photo):
    """Against the literal transform: resize the short side, cut the square."""
    crop = train_transform(photo, (64, 64), (1.0, 1.0), None, False, np.random.default_rng(3))
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
    crops = [
        train_transform(photo, (32, 32), (1.0, 2.0), None, True, np.random.default_rng(seed)) for seed in (1, 1, 2)
    ]
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])
    square = photo.resize((32, 32))
    plain = train_transform(square, (32, 32), (1.0, 1.0), None, False, np.random.default_rng(0))
    flipped_crops = [
        train_transform(square, (32, 32), (1.0, 1.0), None, True, np.random.default_rng(seed)) for seed in range(20)
    ]
    mirrored = [np.array_equal(crop, plain[:, :, ::-1]) for crop in flipped_crops]
    assert 4 < sum(mirrored) < 16


def test_max_enlargement_ends_the_range_of_small_images(photo):
    """A small photo is not enlarged beyond the limit, and every photo reaches the size of a crop."""
    small, tiny = photo.resize((96, 80)), photo.resize((24, 20))
    sizes = [
        [
            sample_crop(image.size, (32, 32), (1.0, 8.0), limit, False, np.random.default_rng(seed)).resized_hw[0]
            for seed in range(50)
        ]
        for image, limit in ((small, None), (small, 1.0), (small, 2.0), (tiny, 1.0))
    ]
    assert max(sizes[0]) > 200
    assert 32 <= min(sizes[1]) < 40 < 75 < max(sizes[1]) <= 80
    assert 130 < max(sizes[2]) <= 160
    assert set(sizes[3]) == {32}


def test_eval_transform_interpolation_changes_result(photo):
    """Lanczos and bilinear interpolation give different evaluation images."""
    lanczos, bilinear = eval_transform(photo, 64, "lanczos"), eval_transform(photo, 64, "bilinear")
    assert lanczos.shape == (3, 64, 64)
    assert np.abs(lanczos.astype(int) - bilinear).mean() > 0.5


@pytest.mark.parametrize("interpolation", ["lanczos", "bilinear"])
def test_eval_transform_equals_torchvision(photo, interpolation):
    """The pixels are those of torchvision's Resize and CenterCrop, for sizes with all roundings."""
    stub_torchvision_ops()
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    rng = np.random.default_rng(0)
    sizes = [(500, 334), (334, 500), (640, 427), (500, 375), (64, 64), (64, 97), (129, 64), (3, 200), (1, 1), (65, 64)]
    sizes += [tuple(size) for size in rng.integers(20, 300, (60, 2)).tolist()]
    for image_size in sizes:
        size = int(rng.integers(16, 80))
        image = photo.resize(image_size)
        reference = Compose([Resize(size, InterpolationMode(interpolation)), CenterCrop(size)])(image)
        cropped = eval_transform(image, size, interpolation)
        assert np.array_equal(cropped.transpose(1, 2, 0), np.asarray(reference)), (image_size, size)


def test_to_float_and_to_uint8_are_inverse():
    """`to_uint8` inverts `to_float` and clamps values outside [-1, 1]."""
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_float(values).min() == -1
    assert to_float(values).max() == 1
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
