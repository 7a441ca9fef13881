"""Growth of opening and reading a data set with its number of samples: the same images behind 2 to 100,000 shards."""

import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from linked_shards import link_shards

from bsq_ray import config
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.order import Order
from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.data.stream import training_batches

pytestmark = pytest.mark.benchmark
_CROP, _BATCH, _SHARD_SAMPLES = 64, 32, 1000
_NUM_SHARDS = {"2 k": 2, "1.28 M": 1281, "12.8 M": 12_810, "100 M": 100_000}
_WARM_UP, _TIMED, _ROUNDS = 2000, 5000, 2
_CHUNKS, _CHUNK_SAMPLES = 12, 256
_MEMORY_CODE = """
import sys
import psutil
from bsq_ray.data.manifest import read_manifest
before = psutil.Process().memory_info().rss
manifest = read_manifest(sys.argv[1])
manifest.locate(manifest.num_samples - 1)
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


@pytest.fixture(scope="module")
def manifests(photos, tmp_path_factory):
    """Manifests of data sets of each size, by name."""
    folder, url = tmp_path_factory.mktemp("images"), str(tmp_path_factory.mktemp("shard"))
    for number in range(_SHARD_SAMPLES):
        photos[number % len(photos)].resize((96, 80)).save(folder / f"{number}.jpg")
    pack_images(str(folder), url, PackOptions(shard_mb=10_000, num_workers=0))
    return {name: link_shards(url, tmp_path_factory.mktemp("linked"), count) for name, count in _NUM_SHARDS.items()}


def loader(manifest):
    data_config = config.DataConfig()
    source = ImageSource(manifest, data_config, _CROP)
    return training_batches(source, data_config, batch_size=_BATCH, rank=0, world_size=1, seed=0, executor="ray")


def measure(batches):
    """Return images per second in steady state."""
    for _ in range(_WARM_UP // _BATCH):
        next(batches)
    start = time.perf_counter()
    for _ in range(_TIMED // _BATCH):
        next(batches)
    rate = _TIMED / (time.perf_counter() - start)
    batches.close()
    return rate


def test_growth_of_opening_and_order(manifests, record):
    for name, manifest in manifests.items():
        start = time.perf_counter()
        read_manifest(manifest.url)
        open_s = time.perf_counter() - start
        memory = subprocess.run([sys.executable, "-c", _MEMORY_CODE, manifest.url], capture_output=True, text=True)
        order, positions_P = Order(manifest.shard_sizes, 0, 16, 512), np.arange(5000, 5256)
        order.at(positions_P)
        start = time.thread_time()
        for _ in range(20):
            order.at(positions_P)
        record(
            "growth-data-cpu",
            name,
            open_s=open_s,
            memory_mb=float(memory.stdout),
            pickled_bytes=len(pickle.dumps(ImageSource(manifest, config.DataConfig(), _CROP))),
            order_ms=(time.thread_time() - start) / 20 * 1e3,
        )


def test_growth_of_reading_in_one_thread(manifests, record):
    """The CPU time of a thread depends little on the load of the node."""
    sources = {name: ImageSource(manifest, config.DataConfig(), _CROP) for name, manifest in manifests.items()}
    orders = {name: source.order(0, config.DataConfig()) for name, source in sources.items()}
    times = {name: [] for name in manifests}
    for first in range(0, _CHUNKS * _CHUNK_SAMPLES, _CHUNK_SAMPLES):
        for name, source in sources.items():
            start = time.thread_time()
            epochs_P, samples_P = orders[name].at(np.arange(first, first + _CHUNK_SAMPLES))
            source.read(samples_P, epochs_P, seed=0)
            times[name].append(time.thread_time() - start)
    rates = {name: _CHUNK_SAMPLES / min(each) for name, each in times.items()}
    for name, rate in rates.items():
        record("growth-data-cpu", name, thread_images_per_s=round(rate), thread_ratio=rate / rates["2 k"])


def test_growth_of_reading_with_ray_data(manifests, ray_local, record):
    # The workers of Ray start before anything is measured.
    measure(loader(manifests["2 k"]))
    for name, manifest in manifests.items():
        start = time.perf_counter()
        batches = loader(manifest)
        next(batches)
        record("growth-data-cpu", name, first_batch_s=time.perf_counter() - start)
        batches.close()
    # Sizes take turns, because the load of a shared node changes.
    rounds = [{name: measure(loader(manifest)) for name, manifest in manifests.items()} for _ in range(_ROUNDS)]
    rates = {name: max(each[name] for each in rounds) for name in manifests}
    for name, rate in rates.items():
        record("growth-data-cpu", name, ray_images_per_s=round(rate), ray_ratio=rate / rates["2 k"])
