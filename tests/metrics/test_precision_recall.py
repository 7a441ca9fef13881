"""Precision and recall against a public implementation."""

import numpy as np
import pytest
import torch
from torchvision_stub import stub_torchvision_ops

from bsq_ray.metrics.precision_recall import precision_recall


def points(count, seed, shift=0.0, width=16):
    return np.random.default_rng(seed).normal(shift, 1, (count, width)).astype(np.float32)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_precision_recall_matches_torch_fidelity(shift):
    stub_torchvision_ops()
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, generated = points(120, 0), points(90, 1, shift)
    # The public function calls the first argument generated and the second one real.
    public = prc_features_to_metric(
        torch.from_numpy(generated), torch.from_numpy(real), prc_neighborhood=3, verbose=False
    )
    metrics = precision_recall(real, generated)
    assert metrics["precision"] == pytest.approx(public["precision"], abs=1e-6)
    assert metrics["recall"] == pytest.approx(public["recall"], abs=1e-6)


def test_precision_recall_copies_of_one_image_recall_little():
    """Copies of all images have precision and recall 1; copies of a single image have a low recall."""
    real = points(60, 2)
    assert precision_recall(real, real) == {"precision": 1.0, "recall": 1.0}
    same = real[:1] + np.random.default_rng(0).normal(0, 1e-3, (60, 16)).astype(np.float32)
    metrics = precision_recall(real, same)
    assert metrics["precision"] == 1.0
    assert metrics["recall"] < 0.1


def test_precision_recall_too_few_images_raises():
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(points(3, 0), points(10, 1))
