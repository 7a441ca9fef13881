"""The average of weights over the steps of a run."""

import pytest
import torch
from torch import nn

from bsq_ray.training.ema import EMA


def set_all(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_ema_update_matches_definition():
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


def test_ema_of_bf16_weights_is_fp32():
    """The average of bf16 weights is kept in fp32, which holds steps that bf16 cannot."""
    module = nn.Linear(2, 2).bfloat16()
    set_all(module, 1.0)
    ema = EMA(module, 0.999)
    ema.num_updates = 100_000
    for _ in range(10):
        set_all(module, 1.0078125)
        ema.update(module)
    # bf16 cannot hold so small a step.
    assert ema.average["weight"].dtype == torch.float32
    assert 1.00007 < ema.average["weight"][0, 0].item() < 1.00008


def test_ema_restored_continues_identically():
    """An average restored from its state dict continues exactly like one that was never interrupted."""
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
