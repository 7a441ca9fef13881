"""Decoding with the prior: cached keys and values, compared with full passes and with a masked language model."""

import time

import pytest
import torch

from bsq_ray import Prior, config
from bsq_ray.models.masked_lm import MaskedLM

pytestmark = pytest.mark.benchmark

TOKENS, TILES, SAMPLED = 1024, 4, 16
# Passes of a masked language model that codes a group of tokens in each (M2T; Mentzer et al., 2023).
MASKED_PASSES = 12


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


@pytest.mark.parametrize("num_tiles", [1, 8, 96])
def test_masked_decoding_speed(num_tiles, record):
    """8 x 8 tokens per tile; 96 tiles are a photo of 768 x 512 pixels. Models of equal size, best of three."""
    sizes = {"grid": (1, 8, 8), "bits": 18, "sub_bits": 9, "width": 256, "layers": 6, "heads": 4, "dropout": 0}
    prior = Prior(config.PriorModelConfig(**sizes)).eval()
    masked_lm = MaskedLM(config.MaskedLMModelConfig(**sizes, num_classes=1)).eval()
    sub_tokens_BNS = torch.randint(0, 512, (num_tiles, 64, 2))
    classes_BC = masked_lm.class_weights(torch.ones(num_tiles))

    def decode_with_prior():
        decoding = prior.start_decoding(num_tiles)
        for n in range(64):
            h_B1D = decoding.next_features()
            for s in range(2):
                prior.node_logits(h_B1D, sub_tokens_BNS[:, n : n + 1, :s])
            decoding.push(sub_tokens_BNS[:, n])

    def decode_with_masked_lm():
        for _ in range(MASKED_PASSES):
            masked_lm(sub_tokens_BNS, classes_BC)

    def best_seconds(decode):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            decode()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    with torch.no_grad():
        prior_s, masked_s = best_seconds(decode_with_prior), best_seconds(decode_with_masked_lm)
    columns = {"prior_s": prior_s, "masked_s": masked_s, "ratio": masked_s / prior_s}
    record("masked-decoding-cpu", f"tiles-{num_tiles}", **columns)
