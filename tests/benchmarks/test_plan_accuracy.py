"""The plan against a real step: memory and time of the demo's presets on this processor, planned as if it were a card.

Its peak and bandwidth are measured in the same run, and so is how fast the demo's tokenizer reconstructs, from which
the plan's efficiency follows as it does for the A5000 from the one published figure.
"""

import statistics
import time

import psutil
import pytest
import torch
from training_steps import Training

from bsq_ray.config import load_config
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.planning.activations import tokenizer_bytes
from bsq_ray.planning.flops import tokenizer_forward
from bsq_ray.planning.gpus import GPU
from bsq_ray.planning.planner import plan

pytestmark = pytest.mark.benchmark
CPU = torch.device("cpu")
# ZeRO's buffers are reserved but not touched on a processor, so that they cannot be measured.
PLAIN = ["training.engine.kind=ddp", "training.engine.precision=bf16"]


def preset(name):
    return load_config(name, [*PLAIN, *(["loss.adversarial.start_step=0"] if name == "demo" else [])])


def fastest(call, times=5):
    def once():
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    call()
    return min(once() for _ in range(times))


def this_processor():
    """Its figures, as a card's data sheet would give them."""
    side, copied = 2048, torch.empty(2**28, dtype=torch.uint8)
    peaks = {}
    for kind in (torch.bfloat16, torch.float32):
        left, right = torch.randn(side, side, dtype=kind), torch.randn(side, side, dtype=kind)
        peaks[kind] = 2 * side**3 / fastest(lambda left=left, right=right: left @ right) / 1e12
    other = torch.empty_like(copied)
    bandwidth = 2 * len(copied) / fastest(lambda: other.copy_(copied)) / 1e9
    memory = psutil.virtual_memory().total / 2**30
    return GPU("this processor", peaks[torch.bfloat16], peaks[torch.float32], memory, bandwidth, bandwidth)


def efficiency(card):
    """Share of the peak at which the demo's tokenizer reconstructs; the inverse of `reconstruction_rate`."""
    run = preset("demo")
    tokenizer, images = Tokenizer(run.model).eval(), torch.rand(16, 3, 64, 64) * 2 - 1
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        seconds = fastest(lambda: tokenizer(images)) / len(images)
    traffic = 2 * tokenizer_bytes(run.model, half=True) / (card.bandwidth * 1e9)
    return tokenizer_forward(run.model) / (card.bf16_tflops * 1e12) / (seconds - traffic)


def seconds_of_a_step(training):
    """On average: what comes every sixteenth step is a sixteenth of it."""

    def timed(number):
        began = time.perf_counter()
        training.step(number)
        return time.perf_counter() - began

    return statistics.median(map(timed, (1, 2, 3))) * 15 / 16 + min(map(timed, (15, 15))) / 16


def most_held(call):
    """Most bytes that tensors made by a call hold at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.fixture(scope="module")
def card():
    found = this_processor()
    return found, efficiency(found)


@pytest.mark.parametrize("name", ["demo", "masked-lm-demo", "prior-demo"])
def test_plan_accuracy(name, card, figure):
    found, reached = card
    kept = []

    def build_and_step():
        kept.append(Training(preset(name), CPU))
        for number in (0, 1, 15):
            kept[0].step(number)

    held = most_held(build_and_step)
    seconds = seconds_of_a_step(kept[0])
    planned = plan(preset(name), found, 1, efficiency=reached)
    memory = planned.memory.total - planned.memory.overhead
    what = f"plan of {name} on this processor ({reached:.0%} of {found.bf16_tflops:.2f} bf16 TFLOP/s)"
    figure(f"{what}: time of a step", f"{planned.step_seconds:.3g} s", f"measured {seconds:.3g} s")
    figure(f"{what}: memory", f"{memory / 1e6:.0f} MB", f"measured {held / 1e6:.0f} MB")
