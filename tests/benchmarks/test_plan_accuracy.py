"""The plan against a real step: memory and time of the demo's presets on this processor, planned as if it were a card.

Its peak and bandwidth are measured in the same run, and so is how fast the demo's tokenizer reconstructs, from which
the plan's efficiency follows as it does for the A5000 from the one published figure.
"""

import statistics
import time

import psutil
import pytest
import torch
from training_steps import TrainingSteps

from bsq_ray.config import load_config
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.planning.activations import tokenizer_activation_bytes
from bsq_ray.planning.flops import tokenizer_forward_flops
from bsq_ray.planning.gpus import GPUSpec
from bsq_ray.planning.planner import make_plan

pytestmark = pytest.mark.benchmark
CPU = torch.device("cpu")
# ZeRO's buffers are reserved but not touched on a processor, so that they cannot be measured.
PLAIN = ["training.engine.kind=ddp", "training.engine.precision=bf16"]


def preset(name):
    return load_config(name, [*PLAIN, *(["loss.adversarial.start_step=0"] if name == "demo" else [])])


def min_time(call, times=5):
    def once():
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    call()
    return min(once() for _ in range(times))


def cpu_as_gpu_spec():
    """Its figures, as a card's data sheet would give them."""
    side, source = 2048, torch.empty(2**28, dtype=torch.uint8)
    peaks = {}
    for kind in (torch.bfloat16, torch.float32):
        left, right = torch.randn(side, side, dtype=kind), torch.randn(side, side, dtype=kind)
        peaks[kind] = 2 * side**3 / min_time(lambda left=left, right=right: left @ right) / 1e12
    target = torch.empty_like(source)
    bandwidth = 2 * len(source) / min_time(lambda: target.copy_(source)) / 1e9
    memory = psutil.virtual_memory().total / 2**30
    return GPUSpec("this processor", peaks[torch.bfloat16], peaks[torch.float32], memory, bandwidth, bandwidth)


def measured_efficiency(gpu_spec):
    """Share of the peak at which the demo's tokenizer reconstructs; the inverse of `reconstruction_rate`."""
    run = preset("demo")
    tokenizer, images = Tokenizer(run.model).eval(), torch.rand(16, 3, 64, 64) * 2 - 1
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        seconds = min_time(lambda: tokenizer(images)) / len(images)
    traffic = 2 * tokenizer_activation_bytes(run.model, half=True) / (gpu_spec.bandwidth * 1e9)
    return tokenizer_forward_flops(run.model) / (gpu_spec.bf16_tflops * 1e12) / (seconds - traffic)


def mean_step_seconds(training):
    """On average: what comes every sixteenth step is a sixteenth of it."""

    def timed(number):
        began = time.perf_counter()
        training.step(number)
        return time.perf_counter() - began

    return statistics.median(map(timed, (1, 2, 3))) * 15 / 16 + min(map(timed, (15, 15))) / 16


def peak_tensor_bytes(call):
    """Most bytes that tensors made by a call hold at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    current = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


@pytest.fixture(scope="module")
def cpu_spec():
    gpu_spec = cpu_as_gpu_spec()
    return gpu_spec, measured_efficiency(gpu_spec)


@pytest.mark.parametrize("name", ["demo", "masked-lm-demo", "prior-demo"])
def test_plan_accuracy(name, cpu_spec, record_measurement):
    gpu_spec, efficiency = cpu_spec
    steps = []

    def build_and_step():
        steps.append(TrainingSteps(preset(name), CPU))
        for number in (0, 1, 15):
            steps[0].step(number)

    peak_bytes = peak_tensor_bytes(build_and_step)
    seconds = mean_step_seconds(steps[0])
    plan = make_plan(preset(name), gpu_spec, 1, efficiency=efficiency)
    memory = plan.memory.total - plan.memory.overhead
    what = f"plan of {name} on this processor ({efficiency:.0%} of {gpu_spec.bf16_tflops:.2f} bf16 TFLOP/s)"
    record_measurement(f"{what}: time of a step", f"{plan.step_seconds:.3g} s", f"measured {seconds:.3g} s")
    record_measurement(f"{what}: memory", f"{memory / 1e6:.0f} MB", f"measured {peak_bytes / 1e6:.0f} MB")
