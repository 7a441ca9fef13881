"""Entropy coding: exact roundtrips on any machine, at the size given by the cross entropy."""

import copy

import pytest
import torch
from small_codecs import NoisyPrior

from bsq_ray import Prior, config
from bsq_ray.codec.bitstream import GroupBitstream
from bsq_ray.codec.entropy_coding import TokenEncoder, decode_tokens
from bsq_ray.codec.side_info import MAX_TOLERANCE_EXPONENT, choose_method, tolerance_of_method
from bsq_ray.models.prior import binary_tree_nodes
from bsq_ray.models.quantizers.bits import bits_to_integers


def random_bits(num_tiles, seed=0):
    return torch.rand(num_tiles, 16, 10, generator=torch.Generator().manual_seed(seed)) < 0.5


def decode(prior, data, num_tiles, num_tokens=16, **options):
    return decode_tokens(prior, [data], [num_tiles], 16, num_tokens, **options)[0]


@pytest.mark.parametrize("tiles", [1, 3, 16])
def test_decode_tokens_roundtrip(codec, tiles):
    coded = TokenEncoder(codec.prior).encode(random_bits(tiles))
    assert torch.equal(decode(codec.prior, coded.data, tiles), random_bits(tiles))


def test_decode_tokens_batch_size_does_not_matter(codec):
    for encoder_batch, decoder_batch in ((8, 1), (1, 8), (3, 16), (16, 5)):
        coded = TokenEncoder(codec.prior, encoder_batch).encode(random_bits(16))
        assert torch.equal(decode(codec.prior, coded.data, 16, batch_size=decoder_batch), random_bits(16))


def test_decode_tokens_several_groups_together(codec):
    groups = [random_bits(3, 1), random_bits(1, 2), random_bits(7, 3)]
    data = [TokenEncoder(codec.prior).encode(group).data for group in groups]
    decoded_groups = decode_tokens(codec.prior, data, [3, 1, 7], 16, 16)
    assert all(torch.equal(there, here) for there, here in zip(groups, decoded_groups, strict=True))


def test_decode_tokens_prefix_only(codec):
    coded = TokenEncoder(codec.prior).encode(random_bits(4))
    assert torch.equal(decode(codec.prior, coded.data, 4, 5), random_bits(4)[:, :5])


def test_decode_tokens_noisy_logits_within_tolerance(codec):
    """A decoder whose logits differ by less than the tolerance decodes the same tokens."""
    for seed in range(10):
        coded = TokenEncoder(codec.prior, max_exponent=8).encode(random_bits(16, seed))
        assert torch.equal(decode(NoisyPrior(codec.prior, 2.0**-8 - 1e-4), coded.data, 16), random_bits(16, seed))


def test_encoded_size_equals_cross_entropy_plus_side_info(codec):
    coded = TokenEncoder(codec.prior).encode(random_bits(400))
    # What the range coder rounds up to, and the grid of probabilities.
    assert 8 * len(coded.data) == pytest.approx(coded.cross_entropy_bits + coded.side_info_bits, rel=0.005)


def sharp_prior(factor):
    torch.manual_seed(0)
    prior = Prior(config.PriorModelConfig(grid=(1, 4, 4), bits=10, sub_bits=5, width=32, layers=2, heads=2, dropout=0))
    with torch.no_grad():
        for tree in prior.trees:
            tree.weight.mul_(factor)
    return prior.eval()


@pytest.mark.parametrize("factor", [1, 300, 3e3, 1e5, 1e6, 1e8])
def test_encoder_allows_for_the_error_of_its_model(factor):
    """A model with large logits, whose fp32 errors exceed 2^-14, gets a larger tolerance, and finally raw bits."""
    prior = sharp_prior(factor)
    coded = TokenEncoder(prior).encode(random_bits(16))
    for batch_size in (1, 5, 16):
        assert torch.equal(decode(prior, coded.data, 16, batch_size=batch_size), random_bits(16))
    noise = float(torch.finfo(torch.float32).eps) * factor / 4
    assert torch.equal(decode(NoisyPrior(prior, noise), coded.data, 16), random_bits(16))
    if factor >= 1e6:
        assert len(coded.data) <= 16 * 16 * 10 // 8 + 2


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_tolerance_is_eight_times_the_error_of_every_fifth_tile(batch_size):
    """Whatever the batch size, in which other tiles would be the fifth ones."""
    prior, bits_BNL = sharp_prior(3e3), random_bits(16)
    exact_prior = copy.deepcopy(prior).double()
    sub_tokens_BNS = bits_to_integers(bits_BNL, 5)
    nodes_BNSk, _ = binary_tree_nodes(sub_tokens_BNS, 5)
    with torch.no_grad():
        exact, rounded = (model(sub_tokens_BNS).gather(-1, nodes_BNSk).double() for model in (exact_prior, prior))
    errors_B = (exact - rounded).abs().amax((1, 2, 3))
    data = TokenEncoder(prior, batch_size).encode(bits_BNL).data
    method = choose_method(2 * float(errors_B[::5].max()), MAX_TOLERANCE_EXPONENT)
    assert GroupBitstream(data, 16, 16 * 16 * 10)._side_info.method == method
    assert 8 * float(errors_B[::5].max()) <= tolerance_of_method(method) < 16 * float(errors_B[::5].max())


def test_encoded_bytes_are_as_few_as_possible(codec):
    """The range coder ends on a byte: less than one byte above cross entropy and side information."""
    excess = []
    for seed in range(20):
        coded = TokenEncoder(codec.prior).encode(random_bits(1, seed))
        excess.append(8 * len(coded.data) - coded.cross_entropy_bits - coded.side_info_bits)
    assert sum(excess) / len(excess) < 8
    assert max(excess) < 16
