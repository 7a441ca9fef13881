"""Full training step: generator, LPIPS (VGG), discriminator, R1 averaged over its 16 steps, both optimizers.

Width 256, 6 + 6 layers, 128 px, batch 4, StyleGAN2 discriminator with channel base 32,768. The baseline is the same
step in naive PyTorch, see `NaiveTrainingSteps`.
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
    """Return the seconds of an average step and the peak memory of the process in GB."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    step = {"optimized": TrainingSteps, "naive": NaiveTrainingSteps}[kind](build_config(precision, compiled), CPU).step
    step(0)
    times = []
    for number in (1, 2, 15):
        start = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - start)
    average = min(times[:2]) * 15 / 16 + times[2] / 16
    return average, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def test_step_speed(record):
    cases = [
        ("naive", "fp32", False),
        ("optimized", "fp32", False),
        ("optimized", "fp32", True),
        ("naive", "bf16", False),
        ("optimized", "bf16", False),
        ("optimized", "bf16", True),
    ]
    measured = {}
    for case in cases:
        # Each case runs in its own process, because peak memory is measured per process.
        call = f"import sys; sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r}); import test_step_speed as t; "
        call += f"print(*t.measure(*{case!r}))"
        # Only the optimized steps run with the allocator settings of Ray workers.
        extra_env = malloc_env() if case[0] == "optimized" else {}
        environment = os.environ | extra_env
        done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True, env=environment)
        measured[case] = seconds, memory_gb = tuple(map(float, done.stdout.split()[-2:]))
        kind, precision, compiled = case
        if kind == "naive":
            continue
        naive_seconds, naive_gb = measured["naive", precision, False]
        values = {"step_s": seconds, "memory_gb": memory_gb, "naive_s": naive_seconds, "naive_gb": naive_gb}
        row_id = f"{precision}-{'compiled' if compiled else 'eager'}"
        record("training-step-cpu", row_id, **values, speedup=naive_seconds / seconds)
