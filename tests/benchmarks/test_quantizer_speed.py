"""Quantisers: forward and backward with entropies for 8,192 tokens, beside vector-quantize-pytorch in the same run."""

import statistics
import timeit

import pytest
import torch

from bsq_ray import config
from bsq_ray.models.quantizers import build_quantizer

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


def ours(bits, **entropy):
    quantizer = build_quantizer(config.BSQ(bits=bits, entropy=config.Entropy(**entropy)))
    v = torch.randn(_BATCH, _TOKENS, bits, requires_grad=True)

    def step():
        result = quantizer(v)
        (result.codes_BNC.sum() + result.loss).backward()

    return step


def theirs(module, width):
    v = torch.randn(_BATCH, _TOKENS, width, requires_grad=True)

    def step():
        result = module(v)
        loss = result[2] if len(result) > 2 else 0
        (result[0].sum() + loss).backward()

    return step


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


def test_quantizer_speed(figure):
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    lfq = library.LFQ(codebook_size=2**9, num_codebooks=2, dim=18, spherical=True, entropy_loss_weight=0.1)
    fsq = library.FSQ(levels=[8, 8, 8, 5, 5, 5])
    steps = {f"BSQ {bits} bits, analytical": ours(bits) for bits in (18, 36, 64, 128)}
    steps["BSQ 18 bits, groups of 9"] = ours(18, estimate="group", group_size=9)
    steps["BSQ 18 bits, groups of 18"] = ours(18, estimate="group", group_size=18)
    steps["vector-quantize-pytorch LFQ 2 x 2^9"] = theirs(lfq.train(), 18)
    steps["vector-quantize-pytorch FSQ 6 channels"] = theirs(fsq.train(), 6)
    rows = milliseconds(steps)
    base = rows["BSQ 18 bits, analytical"]
    for name, value in rows.items():
        what = f"quantiser, forward + backward, {_BATCH * _TOKENS:,} tokens: {name}"
        figure(what, f"{value:.2f} ms, {peak_megabytes(steps[name]):.1f} MB", f"{value / base:.2f} x BSQ 18 bits")
