"""Precision and recall as in a public implementation; classes by the nearest images."""

import numpy as np
import pytest
import torch

from bsq_ray.metrics.precision_recall import nearest_labels, precision_recall
from bsq_ray.metrics.torchvision_stub import prepare_torchvision


def points(count, seed, shift=0.0, width=16):
    return np.random.default_rng(seed).normal(shift, 1, (count, width)).astype(np.float32)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_precision_and_recall_are_those_of_torch_fidelity(shift):
    prepare_torchvision()
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, drawn = points(120, 0), points(90, 1, shift)
    # The public function calls the first argument generated and the second one real.
    public = prc_features_to_metric(torch.from_numpy(drawn), torch.from_numpy(real), prc_neighborhood=3, verbose=False)
    found = precision_recall(real, drawn)
    assert found["precision"] == pytest.approx(public["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(public["recall"], abs=1e-6)


def test_copies_are_precise_and_one_of_them_alone_recalls_little():
    real = points(60, 2)
    assert precision_recall(real, real) == {"precision": 1.0, "recall": 1.0}
    same = real[:1] + np.random.default_rng(0).normal(0, 1e-3, (60, 16)).astype(np.float32)
    found = precision_recall(real, same)
    assert found["precision"] == 1.0
    assert found["recall"] < 0.1


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(points(3, 0), points(10, 1))


def test_the_nearest_images_vote_and_the_nearer_wins_a_tie():
    known = np.array([[0.0], [1.0], [2.0], [10.0], [11.0]])
    labels = np.array([0, 0, 1, 1, 2])
    assert nearest_labels(np.array([[0.2], [10.6]]), known, labels, 3).tolist() == [0, 1]
    assert nearest_labels(np.array([[10.9]]), known, labels, 2).tolist() == [2]
