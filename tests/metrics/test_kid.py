"""KID of reconstructions: images are never compared with their own reconstruction."""

import numpy as np
import pytest

from bsq_ray.evaluation.reconstruction.image_metrics import ImageReconstructionMetrics
from bsq_ray.metrics.fid import FeatureStatistics, kernel_distance, paired_kernel_distance

_WIDTH = 16


def features(count, seed):
    return np.random.default_rng(seed).normal(size=(count, _WIDTH))


def reconstructions(original_ND, seed):
    return 1.05 * original_ND + 0.1 * np.random.default_rng(seed).normal(size=original_ND.shape)


def statistics(features_ND):
    result = FeatureStatistics(_WIDTH)
    result.update(features_ND, [f"{n:03}" for n in range(len(features_ND))])
    return result


def test_kid_of_perfect_reconstructions_is_zero():
    """The estimator for independent sets is negative here, and the metric of the evaluation is not."""
    original_ND = features(40, 0)
    assert kernel_distance(original_ND, original_ND) < -0.1
    metrics = ImageReconstructionMetrics.distribution_metrics(statistics(original_ND), statistics(original_ND))
    assert metrics["kid"] == pytest.approx(0, abs=1e-12)
    assert metrics["kid_standard_error"] == pytest.approx(0, abs=1e-12)


def test_paired_kernel_distance_matches_explicit_sum():
    x, y = features(5, 1), features(5, 2)

    def kernel(a, b):
        return (a @ b / _WIDTH + 1) ** 3

    def h(i, j):
        return kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i])

    expected = np.mean([h(i, j) for i in range(5) for j in range(5) if i != j])
    assert paired_kernel_distance(x, y).value == pytest.approx(expected)
    assert paired_kernel_distance(x, y).num_samples == 5


def test_paired_kernel_distance_mean_is_independent_of_count():
    """Few images give the same mean as many; the standard error is the spread over sets of images."""
    few = [paired_kernel_distance(x, reconstructions(x, n + 1000)) for n in range(300) for x in [features(20, n)]]
    many = [paired_kernel_distance(x, reconstructions(x, n + 1000)).value for n in range(5) for x in [features(800, n)]]
    values = np.array([each.value for each in few])
    spread = values.std(ddof=1)
    assert values.mean() == pytest.approx(np.mean(many), abs=4 * spread / np.sqrt(len(few)))
    # The jackknife overestimates the variance of few images.
    assert 0.9 < np.sqrt(np.mean([each.standard_error**2 for each in few])) / spread < 1.6


def test_paired_kernel_distance_of_two_images_has_no_error():
    assert paired_kernel_distance(features(2, 0), features(2, 1)).standard_error is None
    with pytest.raises(ValueError, match="at least two images"):
        paired_kernel_distance(features(1, 0), features(1, 1))
