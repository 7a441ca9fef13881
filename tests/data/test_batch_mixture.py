"""Images and clips in one run: each batch is of one kind, shares follow the weights, and runs resume exactly."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worker_batches import assert_resumes_exactly, assert_same_batches, batches_of

from bsq_ray import config
from bsq_ray.data.batch_mixture import BatchMixtureOrder
from bsq_ray.data.factory import build_source
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.mixture import MixtureOrder, share_ends
from bsq_ray.data.order import Order

FRAMES, BATCH_SIZE = 4, 8
RUN = config.TokenizerConfig(
    name="mixture",
    model=config.TokenizerModelConfig(image_size=32, frames=FRAMES),
    data=config.DataConfig(interleave=2, shuffle_block_size=4),
    training=config.TrainingConfig(batch_size=BATCH_SIZE),
)


def make_order(num_images, num_clips, weights, batch_size, seed):
    orders = tuple(
        MixtureOrder((Order((size,), seed, 2, 8),), share_ends([1]), seed) for size in (num_images, num_clips)
    )
    return BatchMixtureOrder(orders, num_images, share_ends(weights), seed, batch_size)


@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    weights=st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)),
    batch_size=st.integers(1, 8),
    start=st.integers(0, 10**9),
    length=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
)
def test_batch_kinds_follow_weights_at_any_position(sizes, weights, batch_size, start, length, seed):
    """Batches are of one kind in the shares of the weights, and each kind is read in its own order without a gap."""
    order = make_order(*sizes, weights, batch_size, seed)
    epochs_P, samples_P = order.at(np.arange(start * batch_size, (start + length) * batch_size))
    is_image_P = samples_P < sizes[0]
    is_image_BN = is_image_P.reshape(length, batch_size)
    assert (is_image_BN.all(1) | ~is_image_BN.any(1)).all()
    # Shares are exact for whole blocks of 1,024 batches.
    assert abs(is_image_BN[:, 0].sum() - length * weights[0] / sum(weights)) <= 1024 + 1
    for is_mine_P, size in ((is_image_P, sizes[0]), (~is_image_P, sizes[1])):
        keys = list(zip(epochs_P[is_mine_P].tolist(), samples_P[is_mine_P].tolist(), strict=True))
        assert len(set(keys)) == len(keys)
        counts = Counter(epochs_P[is_mine_P].tolist())
        assert all(counts[epoch] == size for epoch in sorted(counts)[1:-1])


def test_batch_kinds_are_mixed_and_depend_on_seed():
    """Neither kind comes in long runs, and another seed gives another order."""
    kinds = [make_order(9, 9, (1, 1), 4, seed).at(np.arange(0, 4096, 4))[1] < 9 for seed in (0, 1)]
    assert not np.array_equal(*kinds)
    assert 400 < np.count_nonzero(np.diff(kinds[0])) < 620


@pytest.fixture
def mixture_file(photo_shards, video_shards, tmp_path):
    """A file with one batch of images in four."""
    path = tmp_path / "mixture.yaml"
    path.write_text(f"datasets:\n  - {{url: {photo_shards}, weight: 1}}\n  - {{url: {video_shards}, weight: 3}}\n")
    return str(path)


def test_batches_of_images_and_clips_count_each_key(mixture_file, photo_shards, video_shards):
    """Images are clips of one frame, and over 64 batches each data set is read in its own order."""
    source = build_source(RUN, mixture_file)
    batches = batches_of(source, RUN, 64)
    assert {tuple(batch.values_B.shape) for batch in batches} == {(8, 3, 1, 32, 32), (8, 3, FRAMES, 32, 32)}
    image_keys = {key for shard in read_manifest(photo_shards).shards for key in shard.keys}
    counts = Counter()
    for batch in batches:
        is_image = {key in image_keys for key in batch.keys}
        assert is_image == {batch.values_B.shape[2] == 1}
        counts.update(batch.keys)
    num_image_batches = sum(batch.values_B.shape[2] == 1 for batch in batches)
    assert 8 <= num_image_batches <= 24
    image_counts = [counts[key] for key in image_keys]
    assert sum(image_counts) == 8 * num_image_batches
    assert max(image_counts) - min(image_counts) <= 1


def test_batches_of_images_and_clips_resume_exactly(mixture_file):
    """Batches after a position are those of an uninterrupted run, for other numbers of workers too."""
    source = build_source(RUN, mixture_file)
    whole = batches_of(source, RUN, 12)
    assert len({batch.values_B.shape[2] for batch in whole[6:]}) == 2
    assert_resumes_exactly(source, RUN, whole, 6, 6)


@pytest.mark.ray
def test_batches_of_images_and_clips_are_the_same_with_ray(ray_local, mixture_file):
    source = build_source(RUN, mixture_file)
    assert_same_batches(batches_of(source, RUN, 8, executor="ray"), batches_of(source, RUN, 8))


def test_evaluations_of_a_mixture_read_the_clips(mixture_file, video_shards):
    evaluated = build_source(RUN, mixture_file).evaluated
    assert evaluated.num_samples == build_source(RUN, video_shards).num_samples
    assert evaluated.read_eval(range(2)).values_P.shape == (2, 3, FRAMES, 32, 32)


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        ({"causal": False}, {}, "only a causal model takes an image"),
        ({}, {"adversarial": {"discriminator": "stylegan2-3d"}}, "stylegan2-3d scores whole clips"),
        ({"frames": 1}, {}, "contains videos, but mixture takes images"),
    ],
)
def test_images_and_clips_rejected_by_other_models(mixture_file, model, loss, message):
    settings = {"image_size": 32, "frames": FRAMES, **model}
    run = config.TokenizerConfig(
        name="mixture", model=config.TokenizerModelConfig(**settings), loss=config.TokenizerLossConfig(**loss)
    )
    with pytest.raises(ValueError, match=message):
        build_source(run, mixture_file)


def test_mixture_of_images_alone_is_rejected_by_video_model(photo_shards, tmp_path):
    path = tmp_path / "images.yaml"
    path.write_text(f"datasets: [{{url: {photo_shards}}}]\n")
    with pytest.raises(ValueError, match="contains images, but mixture trains on clips of 4 frames"):
        build_source(RUN, str(path))
