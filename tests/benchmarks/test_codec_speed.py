"""The codec: where the time of an image goes, and the range coder beside torchac."""

import time

import constriction
import numpy as np
import pytest
import torch

from bsq_ray import Codec, Prior, Tokenizer
from bsq_ray.codec import probabilities
from bsq_ray.config import load_config

pytestmark = pytest.mark.benchmark

# Binary decisions of an image of 768 x 512 pixels in 8 x 8 patches of 18 bits.
DECISIONS = 96 * 64 * 18


def best_time(times, work):
    """Shortest time of several, seconds, and what was made."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        made = work()
        seconds.append(time.perf_counter() - began)
    return min(seconds), made


def test_range_coder_speed_against_torchac(record_measurement):
    """The same bits with the same probabilities."""
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
    what = f"range coder, {DECISIONS:,} decisions of a 768 x 512 px image, encode / decode"
    record_measurement(
        what,
        f"{1e3 * encode_ours:.1f} / {1e3 * decode_ours:.1f} ms, {4 * len(words):,} bytes",
        f"torchac {1e3 * encode_theirs:.1f} / {1e3 * decode_theirs:.1f} ms, {len(data):,} bytes",
    )


@pytest.mark.parametrize(
    ("tokenizer", "prior", "size"),
    [("demo", "prior-demo", (768, 512)), ("imagenet128-bsq18", "imagenet128-prior", (128, 128))],
)
def test_codec_time_breakdown(tokenizer, prior, size, photos, record_measurement, tmp_path):
    Prior(load_config(prior).model).save_pretrained(str(tmp_path))
    Tokenizer(load_config(tokenizer).model).save_pretrained(str(tmp_path / "tokenizer"))
    codec = Codec.from_pretrained(str(tmp_path))
    photo = photos[0].resize(size)
    codec.compress(photo.crop((0, 0, 64, 64)))
    coded = codec.compress(photo)
    decoding = {}
    codec.decompress(coded.data, seconds=decoding)
    what = f"compressing {size[0]} x {size[1]} px, {prior}"
    record_measurement(what, _format_stages(coded.seconds), f"decompressing: {_format_stages(decoding)}")


def _format_stages(seconds):
    return ", ".join(f"{name} {1e3 * spent:.0f} ms" for name, spent in seconds.items())
