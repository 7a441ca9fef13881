"""Growth of evaluations: sums of features with the number of images, nearest classes with the reference set."""

import time

import numpy as np
import psutil
import pytest
import torch

from bsq_ray.metrics.fid import FeatureStatistics
from bsq_ray.metrics.nearest import BlockSearch, NearestLabels

pytestmark = pytest.mark.benchmark
_BENCHMARK, _BATCH, _PART, _BLOCK = "growth-evaluation-cpu", 32, 8192, 8192
_QUERIES, _WIDTH, _NEIGHBORS = 1000, 1280, 5
_NUM_REFERENCES = {"10 k": 10_000, "100 k": 100_000, "1.28 M": 1_281_167}


def cpu_s(function):
    """Return the CPU seconds of a call in this thread."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


def make_part(features_ND, number):
    statistics = FeatureStatistics(features_ND.shape[1])
    for first in range(0, len(features_ND), _BATCH):
        keys = [f"{number}-{first + n}" for n in range(_BATCH)]
        statistics.update(features_ND[first : first + _BATCH], keys)
    return statistics


def test_growth_of_sums(record):
    """Tasks sum the features of parts of a set, and the driver adds the parts."""
    torch.set_num_threads(1)
    features_ND = np.random.default_rng(0).normal(size=(_PART, 2048)).astype(np.float32)
    parts = []
    part_s = cpu_s(lambda: parts.append(make_part(features_ND, 0)))
    for name, num_parts in (("10 k", 1), ("100 k", 12), ("1.28 M", 156)):
        merged = FeatureStatistics()
        merge_s = sum(cpu_s(lambda merged=merged: merged.merge(parts[0])) for _ in range(num_parts))
        record(
            _BENCHMARK,
            name,
            part_images_per_s=round(_PART / part_s),
            merge_images_per_s=round(num_parts * _PART / merge_s),
        )


def test_growth_of_nearest_classes(tmp_path, record):
    """Reference features are in a file that is mapped into memory; the process has one block in its own memory."""
    rng = np.random.default_rng(0)
    block_MD = rng.normal(size=(_BLOCK, _WIDTH)).astype(np.float32)
    queries_ND = rng.normal(size=(_QUERIES, _WIDTH)).astype(np.float32)
    for name, count in _NUM_REFERENCES.items():
        path = tmp_path / "classifier.npy"
        array = np.lib.format.open_memmap(path, "w+", np.float32, (count, _WIDTH))
        for first in range(0, count, _BLOCK):
            array[first : first + _BLOCK] = block_MD[: min(_BLOCK, count - first)]
        del array
        reference_MD, labels_M = np.load(path, mmap_mode="r"), np.zeros(count, np.int64)
        search, nearest = BlockSearch(queries_ND, _NEIGHBORS), NearestLabels(_QUERIES, _NEIGHBORS)
        process, peak_mb, start, cpu_start = psutil.Process(), 0.0, time.perf_counter(), time.process_time()
        before_mb = (process.memory_info().rss - process.memory_info().shared) / 1e6
        for first in range(0, count, _BLOCK):
            distances_Nk, indices_Nk = search(np.array(reference_MD[first : first + _BLOCK]))
            nearest.add(distances_Nk, indices_Nk, labels_M[first : first + _BLOCK], first)
            # Pages of the file can be dropped at any time, so they do not count.
            memory = process.memory_info()
            peak_mb = max(peak_mb, (memory.rss - memory.shared) / 1e6)
        nearest.majority()
        record(
            _BENCHMARK,
            name,
            nearest_wall_s=time.perf_counter() - start,
            nearest_cpu_s_per_1e9_pairs=(time.process_time() - cpu_start) / (count * _QUERIES) * 1e9,
            nearest_memory_mb=peak_mb - before_mb,
            file_gb=count * _WIDTH * 4 / 1e9,
        )
        path.unlink()
