"""Quantisers: forward and backward with entropies for 8,192 tokens, beside vector-quantize-pytorch in the same run."""

import statistics
import timeit

import pytest
import torch
from quantizer_steps import quantizer_steps

pytestmark = pytest.mark.benchmark
_BATCH, _TOKENS = 32, 256


def milliseconds(steps, rounds=9, calls=5):
    """Time of each step: the median over rounds, in which the steps take turns, of the least of a few calls."""
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            times[name].append(min(timeit.repeat(step, number=1, repeat=calls)))
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def peak_megabytes(step):
    """Most memory that tensors made by a call hold at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def test_quantizer_speed(record_measurement):
    steps = quantizer_steps((_BATCH, _TOKENS), torch.device("cpu"))
    rows = milliseconds(steps)
    base = rows["BSQ 18 bits, analytical"]
    for name, value in rows.items():
        what = f"quantiser, forward + backward, {_BATCH * _TOKENS:,} tokens: {name}"
        record_measurement(
            what, f"{value:.2f} ms, {peak_megabytes(steps[name]):.1f} MB", f"{value / base:.2f} x BSQ 18 bits"
        )
