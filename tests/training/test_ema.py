"""The average of weights over the steps of a run."""

import pytest
import torch
from torch import nn

from bsq_ray.training.ema import EMA


def set_all(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_the_average_is_that_of_its_definition():
    module = nn.Linear(2, 2)
    set_all(module, 1.0)
    ema = EMA(module, 0.5)
    expected = 1.0
    for update, value in enumerate([2.0, 4.0, 8.0, 16.0]):
        set_all(module, value)
        ema.update(module)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
    assert ema.average["weight"][0, 0].item() == pytest.approx(expected)


def test_weights_in_half_precision_are_averaged_in_full():
    module = nn.Linear(2, 2).bfloat16()
    set_all(module, 1.0)
    ema = EMA(module, 0.999)
    ema.updates = 100_000
    for _ in range(10):
        set_all(module, 1.0078125)
        ema.update(module)
    # bf16 cannot hold so small a step.
    assert ema.average["weight"].dtype == torch.float32
    assert 1.00007 < ema.average["weight"][0, 0].item() < 1.00008


def test_a_restored_average_goes_on_as_if_it_had_not_stopped():
    module = nn.Linear(2, 2)
    whole, first = EMA(module, 0.9), EMA(module, 0.9)
    second = EMA(nn.Linear(2, 2), 0.9)
    for value in (2.0, 3.0):
        set_all(module, value)
        whole.update(module)
        first.update(module)
    second.load_state_dict(first.state_dict())
    set_all(module, 4.0)
    whole.update(module)
    second.update(module)
    assert torch.equal(whole.average["weight"], second.average["weight"])
