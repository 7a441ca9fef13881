"""Sums of features: merged parts equal the whole set, and few features take little space."""

import pickle
import time
from itertools import pairwise

import numpy as np
import pytest

from bsq_ray.metrics.fid import KID_SUBSET_SIZE, FeatureStatistics, frechet_distance

_WIDTH = 16


def make_statistics(features_ND, keys, batch_size=32):
    statistics = FeatureStatistics(features_ND.shape[1])
    for first in range(0, len(keys), batch_size):
        statistics.update(features_ND[first : first + batch_size], keys[first : first + batch_size])
    return statistics


@pytest.fixture(scope="module")
def features_ND():
    return np.random.default_rng(0).normal(1, 2, (5000, _WIDTH)).astype(np.float32)


@pytest.mark.parametrize("sizes", [[5000], [2500, 2500], [10, 4000, 990], [100] * 50, [0, 5000]])
def test_merge_of_parts_equals_the_whole_set(features_ND, sizes):
    """The result does not depend on the number of parts; the subset for KID is the same images."""
    keys = [f"image-{n}" for n in range(len(features_ND))]
    merged, edges = FeatureStatistics(_WIDTH), np.cumsum([0, *sizes])
    for first, end in pairwise(edges):
        part = make_statistics(features_ND[first:end], keys[first:end])
        merged.merge(pickle.loads(pickle.dumps(part)))
    doubles_ND = features_ND.astype(np.float64)
    assert merged.num_samples == 5000
    np.testing.assert_allclose(merged.mean(), doubles_ND.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance(), np.cov(doubles_ND.T), rtol=1e-9, atol=1e-12)
    whole = make_statistics(features_ND, keys, batch_size=5000)
    assert np.array_equal(merged.kid_subset(), whole.kid_subset())
    assert len(merged.kid_subset()) == KID_SUBSET_SIZE
    assert frechet_distance(merged, whole) == pytest.approx(0, abs=1e-9)


def test_pickled_statistics_of_a_batch_are_its_features():
    """A batch of 32 images with 2,048 features takes 0.3 MB, not the 33 MB of the products."""
    features_ND = np.ones((32, 2048), np.float32)
    statistics = make_statistics(features_ND, [str(n) for n in range(32)])
    assert len(pickle.dumps(statistics)) < features_ND.nbytes + 10_000


def test_update_cost_per_image_is_flat_in_the_set():
    """Images added to a large set take as long as those added to a small one."""
    rng, statistics = np.random.default_rng(0), FeatureStatistics(256)

    def add_s():
        times = []
        for _ in range(3):
            start = time.process_time()
            for _ in range(16):
                features_ND = rng.normal(size=(32, 256)).astype(np.float32)
                statistics.update(features_ND, [f"{rng.integers(2**60)}" for _ in range(32)])
            times.append(time.process_time() - start)
        return min(times)

    small_s = add_s()
    for _ in range(20):
        add_s()
    assert add_s() < 4 * small_s + 5e-2
