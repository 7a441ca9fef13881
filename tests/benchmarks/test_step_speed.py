"""One full training step: generator, LPIPS (VGG), discriminator, R1 amortised over its 16 steps, both optimisers.

Width 256, 6 + 6 layers, 128 px, batch 4, StyleGAN2 discriminator with channel base 32,768. The neighbour is the same
step spelt without care, see `CarelessTraining`.
"""

import os
import resource
import subprocess
import sys
import time

import pytest
import torch
from training_steps import NaiveTrainingSteps, TrainingSteps

from bsq_ray import config
from bsq_ray.runtime.malloc import malloc_env

pytestmark = pytest.mark.benchmark
_SIZE, _BATCH = 128, 4
CPU = torch.device("cpu")


def build_config(precision, compiled):
    engine = config.EngineConfig(kind="ddp", precision=precision, compile=compiled)
    sizes = {"width": 256, "layers": 6, "heads": 4}
    return config.TokenizerConfig(
        name="step",
        model=config.TokenizerModelConfig(
            encoder=config.TransformerConfig(**sizes), decoder=config.DecoderConfig(**sizes)
        ),
        training=config.TrainingConfig(engine=engine, batch_size=_BATCH),
    )


def measure(kind, precision, compiled):
    """Seconds of an average step, and the process's peak memory in GB."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    step = {"careful": TrainingSteps, "careless": NaiveTrainingSteps}[kind](build_config(precision, compiled), CPU).step
    step(0)
    times = []
    for number in (1, 2, 15):
        began = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - began)
    average = min(times[:2]) * 15 / 16 + times[2] / 16
    return average, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def test_step_speed(record_measurement):
    cases = [
        ("careless", "fp32", False),
        ("careful", "fp32", False),
        ("careful", "fp32", True),
        ("careless", "bf16", False),
        ("careful", "bf16", False),
        ("careful", "bf16", True),
    ]
    seconds = {}
    for case in cases:
        # A process of its own for each, so that peak memory is its own.
        call = f"import sys; sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r}); import test_step_speed as t; "
        call += f"print(*t.measure(*{case!r}))"
        # Ours as Ray's workers are started; the neighbour as any process.
        extra_env = malloc_env() if case[0] == "careful" else {}
        environment = os.environ | extra_env
        done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True, env=environment)
        value, memory = map(float, done.stdout.split()[-2:])
        seconds[case] = value
        kind, precision, compiled = case
        name = "careless neighbour" if kind == "careless" else "bsq_ray"
        name += f", {precision}, {'compiled' if compiled else 'eager'}"
        ratio = seconds["careless", precision, False] / value
        what = f"full training step, {_SIZE} px, batch {_BATCH}: {name}"
        record_measurement(what, f"{value:.2f} s, {memory:.2f} GB", f"{ratio:.2f} x the careless neighbour's speed")
