"""Training crops of several sizes: one size for each batch, in equal shares, the same for any number of workers."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from worker_batches import assert_resumes_exactly, assert_same_batches, batches_of

from bsq_ray import config
from bsq_ray.config import load_config
from bsq_ray.data.crop_sizes import CropSizeOrder
from bsq_ray.data.factory import build_source
from bsq_ray.data.mixture import share_ends
from bsq_ray.data.order import Order
from bsq_ray.data.transforms import sample_crop, train_transform

SIZES = ((64, 64), (48, 88), (88, 48))
BATCH_SIZE = 8
OVERRIDES = ("data.crop_sizes=[[64, 64], [48, 88], [88, 48]]", "data.interleave=2", "data.shuffle_block_size=4")
OVERRIDES += (f"training.batch_size={BATCH_SIZE}",)
RUN = load_config("demo-any-size", OVERRIDES)


@given(
    num_images=st.integers(1, 60),
    num_sizes=st.integers(1, 5),
    batch_size=st.integers(1, 8),
    start=st.integers(0, 10**9),
    length=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
)
def test_each_batch_has_one_size_and_images_keep_their_order(num_images, num_sizes, batch_size, start, length, seed):
    """Sizes have equal shares, and the images are those of a run without sizes."""
    images = Order((num_images,), seed, 2, 8)
    order = CropSizeOrder(images, num_images, share_ends([1] * num_sizes), seed, batch_size)
    positions_P = np.arange(start * batch_size, (start + length) * batch_size)
    epochs_P, samples_P = order.at(positions_P)
    size_BN = (samples_P // num_images).reshape(length, batch_size)
    assert (size_BN == size_BN[:, :1]).all()
    # Shares are exact for whole blocks of 1,024 batches.
    counts = np.bincount(size_BN[:, 0], minlength=num_sizes)
    assert len(counts) == num_sizes
    assert np.abs(counts - length / num_sizes).max() <= 1024 + 1
    expected_epochs_P, expected_images_P = images.at(positions_P)
    assert np.array_equal(epochs_P, expected_epochs_P)
    assert np.array_equal(samples_P % num_images, expected_images_P)


def test_batches_have_every_size_and_resume_exactly(photo_shards):
    """Batches after a position are those of an uninterrupted run, for other numbers of workers too."""
    source = build_source(RUN, photo_shards)
    whole = batches_of(source, RUN, 24)
    counts = Counter(tuple(batch.values_B.shape) for batch in whole)
    assert set(counts) == {(BATCH_SIZE, 3, *crop_hw) for crop_hw in SIZES}
    assert_resumes_exactly(source, RUN, whole, 6, 6)


@pytest.mark.ray
def test_batches_are_the_same_with_ray(ray_local, photo_shards):
    source = build_source(RUN, photo_shards)
    assert_same_batches(batches_of(source, RUN, 6, executor="ray"), batches_of(source, RUN, 6))


def test_mixtures_have_crop_sizes(photo_shards, held_out_shards, tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text(f"datasets:\n  - {{url: {photo_shards}, weight: 1}}\n  - {{url: {held_out_shards}, weight: 1}}\n")
    batches = batches_of(build_source(RUN, str(path)), RUN, 16)
    assert {tuple(batch.values_B.shape[2:]) for batch in batches} == set(SIZES)
    assert len({key for batch in batches for key in batch.keys}) > 20


def test_clips_have_crop_sizes(video_shards):
    """All frames of a clip have one crop; evaluations read squares."""
    run = load_config("demo-any-size", [*OVERRIDES, "model.frames=3"])
    source = build_source(run, video_shards)
    batches = batches_of(source, run, 24)
    assert {tuple(batch.values_B.shape) for batch in batches} == {(BATCH_SIZE, 3, 3, *crop_hw) for crop_hw in SIZES}
    assert_resumes_exactly(source, run, batches, 6, 6)
    assert source.evaluated.read_eval(range(2)).values_P.shape == (2, 3, 3, 64, 64)


def test_batches_of_images_and_clips_have_crop_sizes(photo_shards, video_shards, tmp_path):
    """Batches of each kind have every size."""
    path = tmp_path / "mixture.yaml"
    path.write_text(f"datasets:\n  - {{url: {photo_shards}, weight: 1}}\n  - {{url: {video_shards}, weight: 1}}\n")
    run = load_config("demo-any-size", [*OVERRIDES, "model.frames=3"])
    source = build_source(run, str(path))
    batches = batches_of(source, run, 40)
    shapes = {tuple(batch.values_B.shape[2:]) for batch in batches}
    assert shapes == {(frames, *crop_hw) for frames in (1, 3) for crop_hw in SIZES}
    assert source.evaluated.read_eval(range(2)).values_P.shape == (2, 3, 3, 64, 64)


def test_evaluations_read_squares(photo_shards):
    source = build_source(RUN, photo_shards)
    assert source.evaluated.read_eval(range(2)).values_P.shape == (2, 3, 64, 64)


@pytest.mark.parametrize("crop_hw", [(48, 88), (88, 48), (40, 104)])
@pytest.mark.parametrize("image_size", [(300, 200), (200, 300), (120, 120), (400, 90)])
def test_crop_is_part_of_the_resized_image(photos, crop_hw, image_size):
    """Against the literal transform: the smallest size that contains the crop, then its rectangle."""
    photo = photos[0].resize(image_size)
    crop = train_transform(photo, crop_hw, (1.0, 1.0), None, False, np.random.default_rng(3))
    factor = max(crop_hw[0] / photo.height, crop_hw[1] / photo.width)
    resized = photo.resize([round(side * factor) for side in photo.size], Image.Resampling.BILINEAR)
    rng = np.random.default_rng(3)
    rng.uniform()
    left, top = rng.integers(resized.width - crop_hw[1] + 1), rng.integers(resized.height - crop_hw[0] + 1)
    expected = np.asarray(resized.crop((left, top, left + crop_hw[1], top + crop_hw[0]))).transpose(2, 0, 1)
    assert crop.shape == (3, *crop_hw)
    assert np.abs(crop.astype(int) - expected).max() <= 1


def test_small_images_are_not_enlarged_beyond_the_limit():
    """The limit holds along the side that the crop needs most of; the crop always fits."""
    scales = [
        sample_crop((200, 60), (48, 88), (1.0, 8.0), 1.0, False, np.random.default_rng(seed)).resized_hw[0] / 60
        for seed in range(50)
    ]
    assert 0.8 <= min(scales) < 0.85 < 0.95 < max(scales) <= 1.01


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.crop_sizes=[[64, 64], [64, 64]]"], "listed twice"),
        (["data.crop_sizes=[[60, 68]]"], "60 x 68 is not a multiple of the patches of 8 pixels"),
        (["data.crop_sizes=[[64, 72]]"], "64 x 72 has 1.12 times the tokens of image_size 64"),
        (["data.crop_sizes=[[16, 256]]"], "16 x 256 is too small for LPIPS"),
        (["data.crop_sizes=[[48, 88]]", "loss.adversarial.weight=0.1"], "discriminator stylegan2 takes squares"),
        (
            ["data.crop_sizes=[[16, 256]]", "loss={perceptual_weight: 0, adversarial: {discriminator: patchgan}}"],
            "has a side of 16 pixels",
        ),
        (["data.crop_sizes=[[0, 64]]"], "greater than or equal to 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config("demo-any-size", overrides)


def test_models_of_one_size_have_no_crop_sizes():
    with pytest.raises(ValueError, match="set model.position to rotary"):
        load_config("demo", ["data.crop_sizes=[[64, 64]]"])


def test_sizes_without_lpips_can_be_smaller():
    run = load_config("demo-any-size", ["data.crop_sizes=[[16, 256]]", "loss.perceptual_weight=0"])
    assert isinstance(run, config.TokenizerConfig)
    assert run.data.crop_sizes == ((16, 256),)
