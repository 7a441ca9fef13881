"""Sampling: images per second in 32 guided steps, and what the sampler costs beside the model's forward passes."""

import time

import pytest
import torch

from bsq_ray.config import SamplingConfig, load_config
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.models.sampling import sample

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize(("preset", "batch", "steps"), [("masked-lm-demo", 16, 32), ("imagenet128-masked-lm", 2, 32)])
def test_sampler_speed(preset, batch, steps, record_measurement):
    model = MaskedLM(load_config(preset).model).eval()
    classes_BC = model.class_weights(torch.zeros(batch, dtype=torch.long))
    inside = 0.0

    def timed(tokens_BNS, classes_BC):
        nonlocal inside
        began = time.perf_counter()
        logits = model(tokens_BNS, classes_BC)
        inside += time.perf_counter() - began
        return logits

    with torch.autocast("cpu", torch.bfloat16):
        sample(model, classes_BC, SamplingConfig(steps=2), seed=0)
        began = time.perf_counter()
        sample(model, classes_BC, SamplingConfig(steps=steps), seed=0, predict=timed)
    whole = time.perf_counter() - began
    what = f"drawing, {preset}, {batch} images in {steps} guided steps, bf16"
    record_measurement(what, f"{batch / whole:.3g} images/s", f"the forward passes alone + {whole / inside - 1:.1%}")
