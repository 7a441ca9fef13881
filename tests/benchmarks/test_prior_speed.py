"""The prior's decoding: cached keys and values against computing every token's past anew, at 1,024 tokens."""

import time

import pytest
import torch

from bsq_ray import Prior, config

pytestmark = pytest.mark.benchmark

TOKENS, TILES, SAMPLED = 1024, 4, 16


def test_cached_decoding_speed(record_measurement):
    section = config.PriorModelConfig(grid=(4, 16, 16), bits=18, sub_bits=9, width=256, layers=4, heads=4, dropout=0)
    prior = Prior(section).eval()
    sub_tokens_BNS = torch.randint(0, 512, (TILES, TOKENS, 2))
    with torch.no_grad():
        began = time.perf_counter()
        decoding = prior.start_decoding(TILES)
        for n in range(TOKENS):
            h_B1D = decoding.features()
            for s in range(2):
                prior.node_logits(h_B1D, sub_tokens_BNS[:, n : n + 1, :s])
            decoding.push(sub_tokens_BNS[:, n])
        cached = time.perf_counter() - began
        # Every 64th of the 1,024 passes over what came before, one for each token and not for each sub-token.
        began = time.perf_counter()
        for n in range(TOKENS // SAMPLED // 2, TOKENS, TOKENS // SAMPLED):
            prior(sub_tokens_BNS[:, : n + 1])
        uncached_seconds = (time.perf_counter() - began) * TOKENS / SAMPLED
    what = f"prior, width 256, 4 layers, {TILES} tiles of {TOKENS:,} tokens, decoding"
    record_measurement(
        what,
        f"{cached:.3g} s",
        f"without cache {uncached_seconds:.3g} s, {uncached_seconds / cached:.0f} times as long",
    )
