"""Mixtures of data sets: shares follow the weights, every sample appears once per epoch, and runs resume exactly."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsq_ray import config, storage
from bsq_ray.data.factory import build_source
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.mixture import MixtureOrder, read_mixture, store_mixture
from bsq_ray.data.order import Order
from bsq_ray.data.stream import evaluation_batches, training_batches

RUN = config.TokenizerConfig(
    name="mixture",
    model=config.TokenizerModelConfig(image_size=32),
    data=config.DataConfig(interleave=2, shuffle_block_size=4),
)


def make_order(sizes, weights, seed=0):
    ends = np.rint(np.cumsum(weights) / np.sum(weights) * 2**30).astype(int)
    return MixtureOrder(tuple(Order((size,), seed, 2, 8) for size in sizes), tuple(ends.tolist()), seed)


@given(
    parts=st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 10)), min_size=1, max_size=5),
    start=st.integers(0, 10**12),
    length=st.integers(1, 3000),
)
def test_mixture_order_follows_the_weights_at_any_position(parts, start, length):
    """Any range has the shares of the weights, and every data set is read in its own order without a gap."""
    sizes, weights = zip(*parts, strict=True)
    order = make_order(sizes, weights)
    epochs_P, samples_P = order.at(np.arange(start, start + length))
    starts = np.cumsum([0, *sizes])
    for number, (size, weight) in enumerate(parts):
        is_mine = (samples_P >= starts[number]) & (samples_P < starts[number + 1])
        # Shares are exact for whole blocks of 1,024 positions.
        assert abs(is_mine.sum() - length * weight / sum(weights)) <= 1024 + 1
        keys = list(zip(epochs_P[is_mine].tolist(), samples_P[is_mine].tolist(), strict=True))
        assert len(set(keys)) == len(keys)
        counts = Counter(epochs_P[is_mine].tolist())
        assert all(counts[epoch] == size for epoch in sorted(counts)[1:-1])


@given(st.integers(0, 5000), st.integers(1, 2000), st.integers(0, 2**31))
def test_mixture_order_is_independent_of_start(start, length, seed):
    """The order at a position does not depend on the position where reading starts."""
    order = make_order((30, 50, 7), (0.5, 0.3, 0.2), seed)
    whole = np.stack(order.at(np.arange(start + length)))
    assert np.array_equal(whole[:, start:], np.stack(order.at(np.arange(start, start + length))))


def test_mixture_order_mixes_the_data_sets_for_every_rank():
    """Neither the seed nor the number of workers gives a worker a single data set."""
    order = make_order((1000, 1000), (1, 1))
    _, samples_P = order.at(np.arange(4096))
    for rank in range(4):
        assert 0.4 < (samples_P[rank::4] < 1000).mean() < 0.6
    _, other_P = make_order((1000, 1000), (1, 1), seed=1).at(np.arange(4096))
    assert not np.array_equal(samples_P < 1000, other_P < 1000)


@pytest.fixture
def mixture_file(photo_shards, held_out_shards, tmp_path):
    """A file that gives the held-out photos three quarters."""
    path = tmp_path / "mixture.yaml"
    path.write_text(f"datasets:\n  - {{url: {photo_shards}, weight: 1}}\n  - {{url: {held_out_shards}, weight: 3}}\n")
    return str(path)


def keys_of(source, count, rank=0, world_size=1, position=0):
    stream = training_batches(
        source, RUN.data, batch_size=8, rank=rank, world_size=world_size, seed=1, position=position
    )
    return [batch.keys for batch in islice(stream, count)]


def test_training_batches_of_a_mixture_count_each_key(mixture_file, photo_shards, held_out_shards):
    """Over 1,024 samples every key appears as often as the weights require, whatever the number of workers."""
    source = build_source(RUN, mixture_file)
    batches = keys_of(source, 128)
    counts = Counter(key for keys in batches for key in keys)
    for url, share in ((photo_shards, 256), (held_out_shards, 768)):
        keys = [key for shard in read_manifest(url).shards for key in shard.keys]
        assert sum(counts[key] for key in keys) == share
        assert {counts[key] for key in keys} <= {share // len(keys), share // len(keys) + 1}
    workers = [keys_of(source, 10, rank, 2) for rank in range(2)]
    for whole, left, right in zip(batches, *workers, strict=False):
        assert (whole[0::2], whole[1::2]) == (left, right)


def test_training_batches_of_a_mixture_resume_exactly(mixture_file):
    """A run that starts at a position reads what an uninterrupted run reads there, on other workers too."""
    source = build_source(RUN, mixture_file)
    batches = keys_of(source, 12)
    assert keys_of(source, 6, position=6 * 8) == batches[6:]
    resumed = [keys_of(source, 6, rank, 4, position=6 * 8) for rank in range(4)]
    assert [[key for row in zip(*step, strict=True) for key in row] for step in zip(*resumed, strict=True)] == batches[
        6:
    ]


def test_mixture_crops_equal_those_of_the_data_set_alone(mixture_file, photo_shards):
    """A sample has the crop that it has in a run of its data set alone."""
    mixture, alone = build_source(RUN, mixture_file), build_source(RUN, photo_shards)
    samples_P = np.array([3, alone.num_samples + 1, 0])
    block = mixture.read(samples_P, np.array([5, 0, 2]), seed=1)
    own = alone.read(samples_P[[0, 2]], np.array([5, 2]), seed=1)
    assert np.array_equal(block.values_P[[0, 2]], own.values_P)
    assert [block.keys[0], block.keys[2]] == own.keys


def test_evaluation_batches_of_a_mixture_cover_all_data_sets(mixture_file, photo_shards, held_out_shards):
    """Evaluation reads every sample of every data set once."""
    keys = [key for batch in evaluation_batches(build_source(RUN, mixture_file), 5) for key in batch.keys]
    assert keys == [k for url in (photo_shards, held_out_shards) for s in read_manifest(url).shards for k in s.keys]


def test_mixture_without_weights_uses_sizes(photo_shards, held_out_shards, tmp_path):
    """Without weights every sample is read equally often; the hash depends on weights and data sets."""
    path = tmp_path / "sizes.yaml"
    path.write_text(f"datasets: [{{url: {photo_shards}}}, {{url: {held_out_shards}}}]\n")
    source = build_source(RUN, str(path))
    assert source.weights == tuple(read_manifest(url).num_samples for url in (photo_shards, held_out_shards))
    path.write_text(f"datasets: [{{url: {photo_shards}, weight: 1}}, {{url: {held_out_shards}, weight: 1}}]\n")
    assert build_source(RUN, str(path)).hash != source.hash


def test_read_mixture_resolves_relative_paths(tmp_path):
    """Relative paths start at the folder of the file; the stored file works from anywhere."""
    (tmp_path / "m.yaml").write_text("datasets: [{url: a/b}, {url: 's3://bucket/c'}, {url: /d}]\n")
    stored = store_mixture(str(tmp_path / "m.yaml"), str(tmp_path / "run" / "data.yaml"))
    assert [each.url for each in read_mixture(stored).datasets] == [f"{tmp_path}/a/b", "s3://bucket/c", "/d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: []", "datasets"),
        ("datasets: [{url: a, weight: 0}]", "weight"),
        ("datasets: [{url: a, weight: -1}]", "weight"),
        ("datasets: [{url: a, wait: 1}]", "wait"),
        ("datasets: [{weight: 1}]", "url"),
        ("datasets: [{url: a, weight: 1}, {url: b}]", "give every data set a weight, or none"),
        ("datasets: [{url: a}, {url: a}]", "listed twice"),
        ("data: []", "data"),
        ("[a, b]", "expected keys and values"),
        ("datasets: [{url: nowhere}]", "is not a packed data set"),
    ],
)
def test_build_source_invalid_mixture_raises(tmp_path, text, message):
    """An invalid file raises an error that names the file or the key."""
    storage.write_bytes(str(tmp_path / "m.yaml"), text.encode())
    with pytest.raises(ValueError, match=message):
        build_source(RUN, str(tmp_path / "m.yaml"))
