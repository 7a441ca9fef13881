"""Time of the codec by stage, and the range coder compared with torchac."""

import copy
import time

import constriction
import numpy as np
import pytest
import torch

from bsq_ray import Codec, Prior, Tokenizer, config
from bsq_ray.codec import probabilities
from bsq_ray.config import load_config
from bsq_ray.models.quantizers.bits import bits_to_integers

pytestmark = pytest.mark.benchmark

# Binary decisions of an image of 768 x 512 pixels in 8 x 8 patches of 18 bits.
DECISIONS = 96 * 64 * 18


def best_time(times, work):
    """Return the minimum time of several calls in seconds, and the last result."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def test_range_coder_speed_against_torchac(record):
    """Both coders code the same bits with the same probabilities."""
    import torchac

    rng = np.random.default_rng(0)
    odds = probabilities.probabilities_of_levels(rng.normal(0, 12, DECISIONS).round().clip(-40, 40).astype(np.int64))
    bits = (rng.random(DECISIONS) < odds).astype(np.int32)
    bernoulli = constriction.stream.model.Bernoulli(perfect=False)

    def encode():
        coder = constriction.stream.queue.RangeEncoder()
        coder.encode(bits, bernoulli, odds)
        return coder.get_compressed()

    encode_ours, words = best_time(5, encode)
    decode_ours, ours = best_time(5, lambda: constriction.stream.queue.RangeDecoder(words).decode(bernoulli, odds))
    zeros = 1 - torch.from_numpy(odds)
    cdf = torch.stack([torch.zeros_like(zeros), zeros, torch.ones_like(zeros)], 1).float()
    symbols = torch.from_numpy(bits).to(torch.int16)
    encode_theirs, data = best_time(5, lambda: torchac.encode_float_cdf(cdf, symbols, check_input_bounds=False))
    decode_theirs, theirs = best_time(5, lambda: torchac.decode_float_cdf(cdf, data))
    assert np.array_equal(ours, bits)
    assert torch.equal(theirs, symbols)
    ours_ms, theirs_ms = (1e3 * encode_ours, 1e3 * decode_ours), (1e3 * encode_theirs, 1e3 * decode_theirs)
    record("range-coder-cpu", "bsq-ray", encode_ms=ours_ms[0], decode_ms=ours_ms[1], bytes=4 * len(words))
    record("range-coder-cpu", "torchac", encode_ms=theirs_ms[0], decode_ms=theirs_ms[1], bytes=len(data))


@pytest.mark.parametrize(
    ("case", "tokenizer", "prior", "size"),
    [
        ("demo", "demo", "prior-demo", (768, 512)),
        ("imagenet128", "imagenet128-bsq18", "imagenet128-prior", (128, 128)),
    ],
)
def test_codec_time_breakdown(case, tokenizer, prior, size, photos, record, tmp_path):
    Prior(load_config(prior).model).save_pretrained(str(tmp_path))
    Tokenizer(load_config(tokenizer).model).save_pretrained(str(tmp_path / "tokenizer"))
    codec = Codec.from_pretrained(str(tmp_path))
    photo = photos[0].resize(size)
    codec.compress(photo.crop((0, 0, 64, 64)))
    compressed = codec.compress(photo)
    decoding_s = {}
    codec.decompress(compressed.data, timings_s=decoding_s)
    for direction, timings_s in (("compress", compressed.timings_s), ("decompress", decoding_s)):
        record(
            "codec-time-cpu", f"{case}-{direction}", **{f"{name}_ms": 1e3 * spent for name, spent in timings_s.items()}
        )


@pytest.mark.parametrize(
    ("layers", "width", "side", "bits", "scale"),
    [(2, 32, 4, 10, 15), (2, 32, 4, 10, 250), (4, 128, 8, 18, 40), (4, 128, 8, 18, 400), (12, 768, 8, 18, 40)],
)
def test_logit_errors_of_passes_and_decoding(layers, width, side, bits, scale, record):
    """Errors of fp32 logits against fp64, in one pass and token by token, in units of the tolerance 2^-14."""
    torch.manual_seed(0)
    num_tokens, num_sub_tokens = side * side, 2
    model_config = config.PriorModelConfig(
        grid=(1, side, side), bits=bits, sub_bits=bits // 2, width=width, layers=layers, heads=width // 32, dropout=0
    )
    prior = Prior(model_config).eval()
    with torch.no_grad():
        for tree in prior.trees:
            tree.weight.mul_(scale)
    reference = copy.deepcopy(prior).double()
    sub_tokens_BNS = bits_to_integers(torch.rand(1, num_tokens, bits) < 0.5, bits // 2)

    def decode():
        decoder, logits = prior.start_decoding(1, num_tokens), []
        for n in range(num_tokens):
            h_B1D, token_BNS = decoder.next_features(), sub_tokens_BNS[:, n : n + 1]
            logits.append(torch.stack([prior.node_logits(h_B1D, token_BNS[..., :s]) for s in range(num_sub_tokens)], 2))
            decoder.push(sub_tokens_BNS[:, n])
        return torch.cat(logits, 1).double()

    with torch.no_grad():
        exact, one_pass, by_token = reference(sub_tokens_BNS).double(), prior(sub_tokens_BNS).double(), decode()
    one_pass_error, by_token_error = (2**14 * float((logits - exact).abs().max()) for logits in (one_pass, by_token))
    record(
        "logit-errors-cpu", f"{layers}x{width}-{num_tokens}-scale-{scale}", logit_std=float(exact.std()),
        one_pass_error=one_pass_error, by_token_error=by_token_error,
    )  # fmt: skip
    assert by_token_error < 4 * one_pass_error
