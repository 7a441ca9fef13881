"""Which reconstructions are shown: the true best and worst, and what stands for the median is near it."""

import numpy as np
import pytest

from bsq_ray.evaluation.plots.comparison_grid import Comparison, keep, pick

PIXELS = np.zeros((3, 3, 1, 1), np.uint8)


def comparisons(scores, first=0):
    return [Comparison(f"{first + n:06}", PIXELS, [score, 0.0], [0.0, 0.0]) for n, score in enumerate(scores)]


@pytest.mark.parametrize("count", [7, 13, 51])
def test_few_images_are_shown_by_their_exact_quantiles(count):
    scores = np.random.default_rng(0).permutation(count).astype(float).tolist()
    shown = [c.lpips[0] for c in pick(keep(comparisons(scores)), scores, 7)]
    assert shown[0] == 0
    assert shown[3] == np.median(scores)
    assert shown[-1] == count - 1
    assert shown == sorted(shown)


@pytest.mark.parametrize("workers", [1, 3])
def test_of_many_images_the_same_few_are_kept_however_they_arrive(workers):
    scores = np.linspace(0, 1, 3200).tolist()
    parts = []
    for rank in range(workers):
        part = []
        for start in range(rank * 3200 // workers, (rank + 1) * 3200 // workers, 32):
            end = min(start + 32, (rank + 1) * 3200 // workers)
            part = keep(part + comparisons(scores[start:end], start))
        parts += part
    kept = keep(parts)
    assert [c.key for c in kept] == [c.key for c in keep(comparisons(scores))]
    assert len(kept) <= 66
    shown = [c.lpips[0] for c in pick(kept, scores, 7)]
    assert (shown[0], shown[-1]) == (0, 1)
    assert shown[3] == pytest.approx(0.5, abs=0.05)


def test_fewer_images_than_columns_are_shown_once():
    scores = [0.3, 0.1]
    assert [c.lpips[0] for c in pick(comparisons(scores), scores, 7)] == [0.1, 0.3]
