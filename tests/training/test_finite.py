"""What is told of a loss that is not finite."""

import math

import pytest
import torch
from small_runs import Listener, in_this_process

from bsq_ray.training.nonfinite import Loss, unlike_numbers


@pytest.mark.parametrize(
    ("terms", "total", "what"),
    [
        ({"reconstruction": 1.0, "perceptual": math.nan}, math.nan, "the loss (perceptual)"),
        ({"reconstruction": math.inf, "perceptual": math.nan}, math.nan, "the loss (perceptual, reconstruction)"),
        ({"reconstruction": 3e38, "perceptual": 3e38}, math.inf, "the sum of the loss's terms"),
    ],
)
def test_the_terms_that_are_not_finite_are_named_and_else_their_sum(terms, total, what):
    fine = Loss(torch.tensor(1.0), {name: torch.tensor(1.0) for name in terms}, ["fine"])
    bad = Loss(torch.tensor(total), {name: torch.tensor(value) for name, value in terms.items()}, ["a", "b"])
    assert unlike_numbers([fine, bad], in_this_process(Listener())) == (what, ["a", "b"])
    assert unlike_numbers([fine], in_this_process(Listener())) is None
