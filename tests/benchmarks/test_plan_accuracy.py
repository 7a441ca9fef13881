"""Accuracy of plans: predicted and measured memory and time of a step of the demo presets on this CPU.

The CPU's peak throughput and memory bandwidth are measured in the same run. The plan's efficiency follows from the
speed at which the demo's tokenizer reconstructs, as the default efficiency follows from a published measurement.
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
# On a CPU, ZeRO's buffers are reserved but not written, so they cannot be measured.
PLAIN = ["training.engine.kind=ddp", "training.engine.precision=bf16"]


def preset(name):
    return load_config(name, [*PLAIN, *(["loss.adversarial.start_step=0"] if name == "demo-gan" else [])])


def min_time(call, times=5):
    def once():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    call()
    return min(once() for _ in range(times))


def cpu_as_gpu_spec():
    """Return the measured properties of the CPU."""
    side, source = 2048, torch.empty(2**28, dtype=torch.uint8)
    peaks = {}
    for kind in (torch.bfloat16, torch.float32):
        left, right = torch.randn(side, side, dtype=kind), torch.randn(side, side, dtype=kind)
        peaks[kind] = 2 * side**3 / min_time(lambda left=left, right=right: left @ right) / 1e12
    target = torch.empty_like(source)
    bandwidth = 2 * len(source) / min_time(lambda: target.copy_(source)) / 1e9
    memory = psutil.virtual_memory().total / 2**30
    return GPUSpec("this CPU", peaks[torch.bfloat16], peaks[torch.float32], memory, bandwidth, bandwidth)


def measured_efficiency(gpu_spec):
    """Return the fraction of the peak at which the demo's tokenizer reconstructs; inverts `reconstruction_rate`."""
    run = preset("demo-gan")
    tokenizer, images = Tokenizer(run.model).eval(), torch.rand(16, 3, 64, 64) * 2 - 1
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        seconds = min_time(lambda: tokenizer(images)) / len(images)
    traffic = 2 * tokenizer_activation_bytes(run.model, half=True) / (gpu_spec.memory_gb_per_s * 1e9)
    return tokenizer_forward_flops(run.model) / (gpu_spec.bf16_tflops * 1e12) / (seconds - traffic)


def mean_step_seconds(training):
    """Return the seconds of an average step; R1 runs in every sixteenth step."""

    def timed(number):
        start = time.perf_counter()
        training.step(number)
        return time.perf_counter() - start

    return statistics.median(map(timed, (1, 2, 3))) * 15 / 16 + min(map(timed, (15, 15))) / 16


def peak_tensor_bytes(call):
    """Return the peak memory of the tensors that a call allocates, bytes."""
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


@pytest.mark.parametrize("name", ["demo-gan", "masked-lm-demo", "prior-demo"])
def test_plan_accuracy(name, cpu_spec, record):
    gpu_spec, efficiency = cpu_spec
    steps = []

    def build_and_step():
        steps.append(TrainingSteps(preset(name), CPU))
        for number in (0, 1, 15):
            steps[0].step(number)

    peak_bytes = peak_tensor_bytes(build_and_step)
    seconds = mean_step_seconds(steps[0])
    plan = make_plan(preset(name), gpu_spec, 1, efficiency=efficiency)
    predicted_bytes = plan.memory.total - plan.memory.overhead
    record(
        "planner-cpu",
        name,
        predicted_mb=predicted_bytes / 1e6,
        measured_mb=peak_bytes / 1e6,
        memory_ratio=predicted_bytes / peak_bytes,
        predicted_s=plan.step_s,
        measured_s=seconds,
        time_ratio=plan.step_s / seconds,
    )
