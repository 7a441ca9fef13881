"""Features of large reference sets: block by block, in this process and in tasks."""

from dataclasses import replace

import numpy as np

from bsq_ray.evaluation.generation.features import Features, Workers, nearest_classes


class RecordedArray:
    """Rows of an array, with the largest number of rows that were read together."""

    def __init__(self, values):
        self.values, self.max_rows = values, 0

    def __getitem__(self, rows):
        self.max_rows = max(self.max_rows, len(self.values[rows]))
        return self.values[rows]


def make_features(num_images, seed, width=16):
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, 5, num_images)
    classifier_NC = (np.eye(5, width)[labels_N] + 0.3 * rng.normal(size=(num_images, width))).astype(np.float32)
    return Features(
        rng.normal(size=(num_images, 32)).astype(np.float32), classifier_NC, labels_N, np.arange(num_images)
    )


def test_nearest_classes_reads_one_block_at_a_time():
    """Memory does not grow with the reference set."""
    images, reference = make_features(50, 0), make_features(30_000, 1)
    recorded = RecordedArray(reference.classifier_NC)
    predicted_N = nearest_classes(images, replace(reference, classifier_NC=recorded), 5, Workers())
    assert recorded.max_rows <= 8192
    assert (predicted_N == images.labels_N).mean() > 0.8


def test_statistics_read_one_block_at_a_time():
    features = make_features(20_000, 2)
    recorded = RecordedArray(features.inception_ND)
    recorded.shape = features.inception_ND.shape
    statistics = replace(features, inception_ND=recorded).statistics(Workers())
    assert recorded.max_rows <= 8192
    np.testing.assert_allclose(statistics.covariance(), np.cov(features.inception_ND.astype(np.float64).T), atol=1e-9)


def test_features_in_files_equal_those_in_memory(tmp_path):
    features = make_features(100, 3)
    stored = Features.allocate(100, tmp_path)
    parts = [replace(features, inception_ND=np.ones((100, 2048)), classifier_NC=np.full((100, 1280), 2))]
    for first in (40, 0):
        rows = slice(first, 100 if first else 40)
        stored.fill(first, Features(*(values[rows] for values in vars(parts[0]).values())))
    del stored
    opened = Features.open(tmp_path)
    assert isinstance(opened.inception_ND, np.memmap)
    assert opened.labels_N.tolist() == features.labels_N.tolist()
    assert opened.ranks_N.tolist() == list(range(100))
    assert (opened.inception_ND == 1).all()
    assert (opened.classifier_NC == 2).all()


def test_large_reference_with_tasks_equals_local(ray_local):
    images, reference = make_features(300, 4), make_features(20_000, 5)
    local, tasks = Workers(), Workers(2)
    assert np.array_equal(nearest_classes(images, reference, 5, local), nearest_classes(images, reference, 5, tasks))
    np.testing.assert_allclose(reference.statistics(local).covariance(), reference.statistics(tasks).covariance())
    assert np.array_equal(reference.statistics(local).kid_subset(), reference.statistics(tasks).kid_subset())
