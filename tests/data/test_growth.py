"""Costs that must not grow with the data set: ratios between sizes, with wide margins for a loaded node."""

import pickle
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from linked_shards import link_shards

from bsq_ray import config
from bsq_ray.data.file_list import list_files
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.order import Order
from bsq_ray.data.sample_index import IndexCache


def fastest_s(function, rounds=7):
    """Return the shortest time of several calls in seconds, after one to warm up."""
    function()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


@pytest.fixture(scope="module")
def linked(photo_shards, tmp_path_factory):
    """Manifests of 50 and of 5,000 shards with the same samples."""
    return [link_shards(photo_shards, tmp_path_factory.mktemp("linked"), count) for count in (50, 5000)]


def test_order_at_is_flat_in_the_number_of_shards():
    """A chunk in a data set of 1,000,000 shards takes as long as in one of 1,000."""

    def chunk_s(num_shards):
        order = Order(np.full(num_shards, 100), seed=0, interleave=16, shuffle_block_size=512)
        positions_P = np.arange(5000, 5256)
        return fastest_s(lambda: order.at(positions_P))

    assert chunk_s(1_000_000) < 4 * chunk_s(1000) + 1e-3


def test_pickled_source_does_not_grow(linked):
    """A task receives a reference of constant size, and the process that receives it opens the data set once."""
    small, large = (pickle.dumps(ImageSource(manifest, config.DataConfig(), 32)) for manifest in linked)
    assert abs(len(large) - len(small)) < 100
    assert len(large) < 5000
    assert pickle.loads(large).manifest is pickle.loads(large).manifest
    assert pickle.loads(large).num_samples == linked[1].num_samples


def test_reading_images_is_flat_in_the_number_of_shards(linked):
    """Images of the last shards of a large data set are read as fast as those of a small one."""

    num_read = min(64, linked[0].num_samples)

    def read_s(manifest):
        source = ImageSource(manifest, config.DataConfig(), 32)
        samples_P = np.arange(manifest.num_samples - num_read, manifest.num_samples)
        return fastest_s(lambda: source.read(samples_P, samples_P * 0, seed=0), rounds=3)

    small_s, large_s = map(read_s, linked)
    assert large_s < 4 * small_s + 5e-2


def test_read_manifest_makes_no_object_per_sample(linked):
    """Opening a data set takes tens of bytes per shard, whatever the number of samples."""
    manifest = read_manifest(linked[1].url)
    assert manifest.rows.nbytes < 150 * manifest.num_shards
    assert manifest.shard_starts.nbytes < 10 * manifest.num_shards


def test_index_cache_keeps_few_indexes_open(linked):
    """A process that reads all shards keeps the most recently used open."""
    cache, manifest = IndexCache(max_open=3), linked[0]
    shards = [cache.get(manifest.url, manifest.shard_row(number)) for number in (0, 1, 2, 0, 3)]
    assert cache.get(manifest.url, manifest.shard_row(0)) is shards[0]
    assert cache.get(manifest.url, manifest.shard_row(1)) is not shards[1]


def test_list_files_takes_little_memory_per_file(tmp_path):
    """A listing holds its files as columns: under 200 bytes a file, and so does the plan of a packing."""
    for number in range(20):
        (tmp_path / f"class-{number}").mkdir()
        for name in range(200):
            (tmp_path / f"class-{number}" / f"{name:012}.jpg").touch()
    tracemalloc.start()
    before_bytes, arrow_bytes = tracemalloc.get_traced_memory()[0], pa.total_allocated_bytes()
    listed = list_files(str(tmp_path), "images", (".jpg",))
    held_bytes = tracemalloc.get_traced_memory()[0] - before_bytes + pa.total_allocated_bytes() - arrow_bytes
    tracemalloc.stop()
    assert len(listed.names) == 4000
    assert held_bytes < 200 * 4000
    assert listed.urls == sorted(str(path) for path in tmp_path.rglob("*.jpg"))


def test_open_reference_changed_data_set_raises(photo_shards, tmp_path):
    """A task that was sent a data set never reads another one in its place."""
    sent = pickle.dumps(link_shards(photo_shards, tmp_path / "set", 2))
    (tmp_path / "set" / "manifest.parquet").unlink()
    for path in (tmp_path / "set").iterdir():
        path.unlink()
    link_shards(photo_shards, tmp_path / "set", 3)
    with pytest.raises(ValueError, match="changed while it was used"):
        pickle.loads(sent)
