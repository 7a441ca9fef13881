"""Quantisers: forward and backward with entropies for 8,192 tokens, beside vector-quantize-pytorch in the same run."""

import time

import pytest
import torch

from bsq_ray import config
from bsq_ray.models.quantizers import build_quantizer

pytestmark = pytest.mark.benchmark
_BATCH, _TOKENS = 32, 256


def milliseconds(step, repeats=15):
    """Median time of a call, after warming up."""
    times = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return 1000 * sorted(times[3:])[repeats // 2]


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


def test_quantizer_speed():
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    lfq = library.LFQ(codebook_size=2**9, num_codebooks=2, dim=18, spherical=True, entropy_loss_weight=0.1)
    fsq = library.FSQ(levels=[8, 8, 8, 5, 5, 5])
    rows = {f"BSQ {bits} bits, analytical": milliseconds(ours(bits)) for bits in (18, 36, 64, 128)}
    rows["BSQ 18 bits, groups of 9"] = milliseconds(ours(18, estimate="group", group_size=9))
    rows["BSQ 18 bits, groups of 18"] = milliseconds(ours(18, estimate="group", group_size=18), repeats=3)
    rows["vector-quantize-pytorch LFQ 2 x 2^9"] = milliseconds(theirs(lfq.train(), 18), repeats=5)
    rows["vector-quantize-pytorch FSQ 6 channels"] = milliseconds(theirs(fsq.train(), 6))
    base = rows["BSQ 18 bits, analytical"]
    print(f"\nquantiser, {_BATCH * _TOKENS} tokens, forward + backward, {torch.get_num_threads()} threads")
    for name, value in rows.items():
        print(f"  {name:42s} {value:8.2f} ms   {value / base:6.2f} x BSQ 18")
