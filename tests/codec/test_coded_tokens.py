"""Entropy coding: exact roundtrips on any machine, at the size given by the cross entropy."""

import pytest
import torch
from small_codecs import NoisyPrior

from bsq_ray.codec.entropy_coding import decode_tokens, encode_tokens

TOLERANCE = 2.0**-14


def random_bits(num_tiles, seed=0):
    return torch.rand(num_tiles, 16, 10, generator=torch.Generator().manual_seed(seed)) < 0.5


def decode(prior, data, num_tiles, num_tokens=16, **options):
    return decode_tokens(prior, [data], [num_tiles], 16, num_tokens, **options)[0]


@pytest.mark.parametrize("tiles", [1, 3, 16])
def test_decode_tokens_roundtrip(codec, tiles):
    coded = encode_tokens(codec.prior, random_bits(tiles), TOLERANCE)
    assert torch.equal(decode(codec.prior, coded.data, tiles), random_bits(tiles))


def test_decode_tokens_batch_size_does_not_matter(codec):
    for encoder_batch, decoder_batch in ((8, 1), (1, 8), (3, 16), (16, 5)):
        coded = encode_tokens(codec.prior, random_bits(16), TOLERANCE, encoder_batch)
        assert torch.equal(decode(codec.prior, coded.data, 16, batch_size=decoder_batch), random_bits(16))


def test_decode_tokens_several_groups_together(codec):
    groups = [random_bits(3, 1), random_bits(1, 2), random_bits(7, 3)]
    data = [encode_tokens(codec.prior, group, TOLERANCE).data for group in groups]
    decoded_groups = decode_tokens(codec.prior, data, [3, 1, 7], 16, 16)
    assert all(torch.equal(there, here) for there, here in zip(groups, decoded_groups, strict=True))


def test_decode_tokens_prefix_only(codec):
    coded = encode_tokens(codec.prior, random_bits(4), TOLERANCE)
    assert torch.equal(decode(codec.prior, coded.data, 4, 5), random_bits(4)[:, :5])


def test_decode_tokens_noisy_logits_within_tolerance(codec):
    """A decoder whose logits differ by less than the tolerance decodes the same tokens."""
    for seed in range(10):
        coded = encode_tokens(codec.prior, random_bits(16, seed), 2.0**-8)
        assert torch.equal(decode(NoisyPrior(codec.prior, 2.0**-8 - 1e-4), coded.data, 16), random_bits(16, seed))


def test_encoded_size_equals_cross_entropy_plus_side_info(codec):
    coded = encode_tokens(codec.prior, random_bits(400), TOLERANCE)
    # What the range coder rounds up to, and the grid of probabilities.
    assert 8 * len(coded.data) == pytest.approx(coded.cross_entropy_bits + coded.side_info_bits, rel=0.005)
