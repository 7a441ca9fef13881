"""Time and memory of quantizers for 8,192 tokens, compared with vector-quantize-pytorch in the same run."""

import statistics
import timeit

import pytest
import torch
from quantizer_steps import quantizer_steps

pytestmark = pytest.mark.benchmark
_BATCH, _TOKENS = 32, 256


def milliseconds(steps, rounds=9, calls=5):
    """Return the time of each step: the median over rounds of the minimum of a few calls; steps alternate."""
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            times[name].append(min(timeit.repeat(step, number=1, repeat=calls)))
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def peak_megabytes(step):
    """Return the peak memory of the tensors that a call allocates, MB."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def test_quantizer_speed(record):
    steps = quantizer_steps((_BATCH, _TOKENS), torch.device("cpu"))
    for row_id, step_ms in milliseconds(steps).items():
        record("quantizer-cpu", row_id, ms=step_ms, mb=peak_megabytes(steps[row_id]))
