"""Quantisers, forward and backward with entropies, ours and those of vector-quantize-pytorch."""

import pytest
import torch

from bsq_ray import config
from bsq_ray.models.quantizers import build_quantizer

WIDTHS = (18, 36, 64, 128)


def bsq_step(shape, device, bits, **entropy):
    quantizer = build_quantizer(config.BSQConfig(bits=bits, entropy=config.EntropyConfig(**entropy)))
    v = torch.randn(*shape, bits, device=device, requires_grad=True)

    def step():
        result = quantizer(v)
        (result.codes_BNC.sum() + result.loss).backward()

    return step


def library_step(shape, device, module, width):
    module = module.to(device)
    v = torch.randn(*shape, width, device=device, requires_grad=True)

    def step():
        result = module(v)
        loss = result[2] if len(result) > 2 else 0
        (result[0].sum() + loss).backward()

    return step


def quantizer_steps(shape, device):
    """By name, the first being what the others are compared with.

    Args:
        shape: batch and tokens.
    """
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    lfq = library.LFQ(codebook_size=2**9, num_codebooks=2, dim=18, spherical=True, entropy_loss_weight=0.1)
    fsq = library.FSQ(levels=[8, 8, 8, 5, 5, 5])
    steps = {f"BSQ {bits} bits, analytical": bsq_step(shape, device, bits) for bits in WIDTHS}
    steps["BSQ 18 bits, groups of 9"] = bsq_step(shape, device, 18, estimate="group", group_size=9)
    steps["BSQ 18 bits, groups of 18"] = bsq_step(shape, device, 18, estimate="group", group_size=18)
    steps["vector-quantize-pytorch LFQ 2 x 2^9"] = library_step(shape, device, lfq.train(), 18)
    steps["vector-quantize-pytorch FSQ 6 channels"] = library_step(shape, device, fsq.train(), 6)
    return steps
