"""Decoding 1,024 tokens with the prior: cached keys and values compared with full forward passes."""

import time

import pytest
import torch

from bsq_ray import Prior, config

pytestmark = pytest.mark.benchmark

TOKENS, TILES, SAMPLED = 1024, 4, 16


def test_cached_decoding_speed(record):
    model_config = config.PriorModelConfig(
        grid=(4, 16, 16), bits=18, sub_bits=9, width=256, layers=4, heads=4, dropout=0
    )
    prior = Prior(model_config).eval()
    sub_tokens_BNS = torch.randint(0, 512, (TILES, TOKENS, 2))
    with torch.no_grad():
        start = time.perf_counter()
        decoding = prior.start_decoding(TILES)
        for n in range(TOKENS):
            h_B1D = decoding.next_features()
            for s in range(2):
                prior.node_logits(h_B1D, sub_tokens_BNS[:, n : n + 1, :s])
            decoding.push(sub_tokens_BNS[:, n])
        cached_seconds = time.perf_counter() - start
        # Every 64th of 1,024 forward passes, one per token.
        start = time.perf_counter()
        for n in range(TOKENS // SAMPLED // 2, TOKENS, TOKENS // SAMPLED):
            prior(sub_tokens_BNS[:, : n + 1])
        uncached_seconds = (time.perf_counter() - start) * TOKENS / SAMPLED
    record("prior-decoding-cpu", "cached", seconds=cached_seconds)
    record("prior-decoding-cpu", "uncached", seconds=uncached_seconds)
