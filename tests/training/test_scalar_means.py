"""Means of scalars, summed on the device."""

import pytest
import torch

from bsq_ray.training.scalar_means import ScalarMeans


def test_scalar_means_are_over_the_additions_of_a_name():
    """A scalar that some steps do not have is averaged over the others."""
    scalars = ScalarMeans()
    for step in range(4):
        scalars.add({"loss": torch.tensor(float(step))} | ({"r1": torch.tensor(step + 0.5)} if step % 2 else {}))
    assert scalars.pop() == {"loss": 1.5, "r1": 2.5}


def test_scalar_means_start_anew_after_pop():
    scalars = ScalarMeans()
    scalars.add({"loss": torch.tensor(1.0)})
    scalars.pop()
    assert scalars.pop() == {}
    scalars.add({"loss": torch.tensor(3.0)})
    assert scalars.pop() == {"loss": 3.0}


def test_scalar_means_of_many_steps_are_exact():
    """The sum is fp64: a thousand additions of 0.1 in fp32 do not lose digits."""
    scalars = ScalarMeans()
    for _ in range(1000):
        scalars.add({"loss": torch.tensor(0.1)})
    assert scalars.pop()["loss"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-14)
