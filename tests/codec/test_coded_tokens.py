"""Entropy coding: tokens come back exactly, on whatever machine, in the size that their cross entropy says."""

import pytest
import torch
from small_codecs import Disturbed

from bsq_ray.codec.entropy_coding import decode_tokens, encode_tokens

TOLERANCE = 2.0**-14


def bits(tiles, seed=0):
    return torch.rand(tiles, 16, 10, generator=torch.Generator().manual_seed(seed)) < 0.5


def decoded(prior, data, tiles, wanted=16, **options):
    return decode_tokens(prior, [data], [tiles], 16, wanted, **options)[0]


@pytest.mark.parametrize("tiles", [1, 3, 16])
def test_tokens_come_back(codec, tiles):
    coded = encode_tokens(codec.prior, bits(tiles), TOLERANCE)
    assert torch.equal(decoded(codec.prior, coded.data, tiles), bits(tiles))


def test_batches_of_either_side_do_not_matter(codec):
    for batch_there, batch_here in ((8, 1), (1, 8), (3, 16), (16, 5)):
        coded = encode_tokens(codec.prior, bits(16), TOLERANCE, batch_there)
        assert torch.equal(decoded(codec.prior, coded.data, 16, batch=batch_here), bits(16))


def test_groups_of_several_images_are_decoded_together(codec):
    groups = [bits(3, 1), bits(1, 2), bits(7, 3)]
    data = [encode_tokens(codec.prior, group, TOLERANCE).data for group in groups]
    found = decode_tokens(codec.prior, data, [3, 1, 7], 16, 16)
    assert all(torch.equal(there, here) for there, here in zip(groups, found, strict=True))


def test_the_first_tokens_alone_can_be_decoded(codec):
    coded = encode_tokens(codec.prior, bits(4), TOLERANCE)
    assert torch.equal(decoded(codec.prior, coded.data, 4, 5), bits(4)[:, :5])


def test_another_machine_decodes_the_same_tokens_within_the_tolerance(codec):
    for seed in range(10):
        coded = encode_tokens(codec.prior, bits(16, seed), 2.0**-8)
        assert torch.equal(decoded(Disturbed(codec.prior, 2.0**-8 - 1e-4), coded.data, 16), bits(16, seed))


def test_the_size_is_the_cross_entropy_and_the_side_information(codec):
    coded = encode_tokens(codec.prior, bits(400), TOLERANCE)
    # What the range coder rounds up to, and the grid of probabilities.
    assert 8 * len(coded.data) == pytest.approx(coded.cross_entropy + coded.side, rel=0.005)
