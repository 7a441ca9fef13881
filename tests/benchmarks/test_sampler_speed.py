"""Throughput of sampling in 32 guided steps, and the sampler's overhead over the model's forward passes."""

import time

import pytest
import torch

from bsq_ray.config import SamplingConfig, load_config
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.models.sampling import sample

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize(("preset", "batch", "steps"), [("masked-lm-demo", 16, 32), ("imagenet128-masked-lm", 2, 32)])
def test_sampler_speed(preset, batch, steps, record):
    model = MaskedLM(load_config(preset).model).eval()
    classes_BC = model.class_weights(torch.zeros(batch, dtype=torch.long))
    forward_seconds = 0.0

    def timed(tokens_BNS, classes_BC):
        nonlocal forward_seconds
        start = time.perf_counter()
        logits = model(tokens_BNS, classes_BC)
        forward_seconds += time.perf_counter() - start
        return logits

    with torch.autocast("cpu", torch.bfloat16):
        sample(model, classes_BC, SamplingConfig(steps=2), seed=0)
        start = time.perf_counter()
        sample(model, classes_BC, SamplingConfig(steps=steps), seed=0, predict=timed)
    total_seconds = time.perf_counter() - start
    overhead = total_seconds / forward_seconds - 1
    record("sampler-cpu", preset, batch=batch, images_per_s=batch / total_seconds, overhead=overhead)
