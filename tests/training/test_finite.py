"""What is told of a loss that is not finite."""

import math

import pytest
import torch
from small_runs import RecordingReporter, local_worker

from bsq_ray.training.nonfinite import PhaseLoss, find_nonfinite


@pytest.mark.parametrize(
    ("terms", "total", "what"),
    [
        ({"reconstruction": 1.0, "perceptual": math.nan}, math.nan, "the loss (perceptual)"),
        ({"reconstruction": math.inf, "perceptual": math.nan}, math.nan, "the loss (perceptual, reconstruction)"),
        ({"reconstruction": 3e38, "perceptual": 3e38}, math.inf, "the sum of the loss's terms"),
    ],
)
def test_find_nonfinite_names_terms_or_sum(terms, total, what):
    """The nonfinite terms are named; if every term is finite, their sum is named."""
    fine = PhaseLoss(torch.tensor(1.0), {name: torch.tensor(1.0) for name in terms}, ["fine"])
    bad = PhaseLoss(torch.tensor(total), {name: torch.tensor(value) for name, value in terms.items()}, ["a", "b"])
    assert find_nonfinite([fine, bad], local_worker(RecordingReporter())) == (what, ["a", "b"])
    assert find_nonfinite([fine], local_worker(RecordingReporter())) is None
