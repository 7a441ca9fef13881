"""Which reconstructions are shown: the true best and worst, and what stands for the median is near it."""

import numpy as np
import pytest

from bsq_ray.evaluation.plots.comparison_grid import Comparison, select_by_quantile, subsample

PIXELS = np.zeros((3, 3, 1, 1), np.uint8)


def comparisons(scores, first=0):
    return [Comparison(f"{first + n:06}", PIXELS, [score, 0.0], [0.0, 0.0]) for n, score in enumerate(scores)]


@pytest.mark.parametrize("count", [7, 13, 51])
def test_select_by_quantile_few_images_is_exact(count):
    scores = np.random.default_rng(0).permutation(count).astype(float).tolist()
    selected = [c.lpips[0] for c in select_by_quantile(subsample(comparisons(scores)), scores, 7)]
    assert selected[0] == 0
    assert selected[3] == np.median(scores)
    assert selected[-1] == count - 1
    assert selected == sorted(selected)


@pytest.mark.parametrize("workers", [1, 3])
def test_subsample_is_independent_of_number_of_workers(workers):
    """The same few of many images are selected for any number of workers."""
    scores = np.linspace(0, 1, 3200).tolist()
    parts = []
    for rank in range(workers):
        part = []
        for start in range(rank * 3200 // workers, (rank + 1) * 3200 // workers, 32):
            end = min(start + 32, (rank + 1) * 3200 // workers)
            part = subsample(part + comparisons(scores[start:end], start))
        parts += part
    subset = subsample(parts)
    assert [c.key for c in subset] == [c.key for c in subsample(comparisons(scores))]
    assert len(subset) <= 66
    selected = [c.lpips[0] for c in select_by_quantile(subset, scores, 7)]
    assert (selected[0], selected[-1]) == (0, 1)
    assert selected[3] == pytest.approx(0.5, abs=0.05)


def test_select_by_quantile_returns_each_image_once():
    scores = [0.3, 0.1]
    assert [c.lpips[0] for c in select_by_quantile(comparisons(scores), scores, 7)] == [0.1, 0.3]
