"""Entropy coding of planes: exact roundtrips on any machine, in as few steps as the planes of the file need."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from small_codecs import NoisyPrior, save_nested_codec, save_nested_tokenizer

from bsq_ray import Codec, Prior
from bsq_ray.codec.container import read_container, write_container
from bsq_ray.codec.entropy_coding import TokenEncoder
from bsq_ray.codec.header import CODING_PRIOR, Header
from bsq_ray.codec.plane_decoding import decode_planes
from bsq_ray.codec.plane_index import plane_ranges
from bsq_ray.codec.rate import Rate
from bsq_ray.models.prior import PlaneDecoder

PLANE_BITS = (4, 4, 2)


@pytest.fixture(scope="module")
def plane_codec(tmp_path_factory):
    return Codec.from_pretrained(save_nested_codec(tmp_path_factory.mktemp("planes") / "prior"))


@pytest.fixture(scope="module")
def prior(plane_codec):
    return plane_codec.prior


@pytest.fixture(scope="module")
def photo(photos):
    """Five tiles in two groups."""
    return photos[0].resize((150, 30))


def random_bits(num_tiles, seed=0):
    return torch.rand(num_tiles, 16, 10, generator=torch.Generator().manual_seed(seed)) < 0.5


def encode(prior, bits_BNL, plane_bits=PLANE_BITS, **options):
    return [
        plane.data for plane in TokenEncoder(prior, **options).encode_planes(bits_BNL, plane_ranges(plane_bits), {})
    ]


def decode(prior, payloads_PG, tile_counts, plane_bits=PLANE_BITS, batch_size=None):
    return decode_planes(prior, payloads_PG, plane_bits, tile_counts, 16, batch_size, {}, lambda: None)


def test_decode_planes_several_groups_together(prior):
    groups = [random_bits(3, 1), random_bits(1, 2), random_bits(7, 3)]
    payloads_PG = list(zip(*(encode(prior, group) for group in groups), strict=True))
    decoded = decode(prior, payloads_PG, [3, 1, 7])
    assert all(torch.equal(there, here) for there, here in zip(groups, decoded, strict=True))


def test_decode_planes_batch_size_does_not_matter(prior):
    for encoder_batch, decoder_batch in ((8, 1), (1, 8), (8, 3)):
        payloads = encode(prior, random_bits(8), batch_size=encoder_batch)
        [decoded] = decode(prior, [[data] for data in payloads], [8], batch_size=decoder_batch)
        assert torch.equal(decoded, random_bits(8))


def test_decode_planes_noisy_logits_within_tolerance(prior):
    for seed in range(3):
        payloads = encode(prior, random_bits(8, seed), max_exponent=8)
        [decoded] = decode(NoisyPrior(prior, 2.0**-8 - 1e-4), [[data] for data in payloads], [8])
        assert torch.equal(decoded, random_bits(8, seed))


def test_planes_do_not_depend_on_later_planes(prior):
    """A plane has the same bytes in a file of fewer bits, if it ends there."""
    assert encode(prior, random_bits(4), (4, 4)) == encode(prior, random_bits(4))[:2]
    assert encode(prior, random_bits(4), (4, 2))[0] == encode(prior, random_bits(4))[0]


def test_plane_sizes_equal_cross_entropy_plus_side_info(prior):
    for plane in TokenEncoder(prior).encode_planes(random_bits(200), plane_ranges(PLANE_BITS), {}):
        expected = plane.cross_entropy_bits + plane.side_info_bits
        assert 8 * len(plane.data) == pytest.approx(expected, rel=0.005)


def test_decoding_steps_are_tokens_times_sub_tokens_of_file(plane_codec, photos, monkeypatch):
    """Files of fewer bits take fewer steps of the prior: one for each token and sub-token."""
    steps = []
    next_features = PlaneDecoder.next_features

    def count(self, earlier_B1s):
        steps.append(earlier_B1s.shape[-1])
        return next_features(self, earlier_B1s)

    monkeypatch.setattr(PlaneDecoder, "next_features", count)
    for num_bits in (2, 4, 10):
        steps.clear()
        plane_codec.decompress(plane_codec.compress(photos[0].resize((64, 32)), rate=Rate(num_bits)).data)
        assert steps == [plane for plane in range(num_bits // 2) for _ in range(16)]


def test_file_with_plane_prior_decodes_to_same_pixels_as_raw(plane_codec, photo, tmp_path):
    raw_codec = Codec.from_pretrained(save_nested_tokenizer(tmp_path, keep=(4, 8, 10)))
    for num_bits in (4, 6, 10):
        data = plane_codec.compress(photo, rate=Rate(num_bits)).data
        raw_data = raw_codec.compress(photo, rate=Rate(num_bits)).data
        assert plane_codec.decompress(data).tobytes() == raw_codec.decompress(raw_data).tobytes()
    region = (100, 5, 149, 30)
    expected = np.array(plane_codec.decompress(data))[5:30, 100:149]
    assert (np.array(plane_codec.decompress(data, region)) == expected).all()


def test_file_with_plane_prior_can_be_cut_anywhere(plane_codec, photo):
    data = plane_codec.compress(photo).data
    planes = read_container(data, plane_codec.token_format).planes
    ends = [int(planes.offsets_PG[plane, -1] + planes.sizes_PG[plane, -1]) for plane in range(3)]
    assert ends[-1] == len(data)
    with pytest.raises(ValueError, match="the file is truncated: its first 4 bits per token need"):
        plane_codec.decompress(data[: ends[0] - 1])
    for (end, next_end), num_bits in zip(pairwise(ends), (4, 8), strict=True):
        expected = plane_codec.decompress(plane_codec.compress(photo, rate=Rate(num_bits)).data).tobytes()
        for size in (end, next_end - 1):
            assert plane_codec.decompress(data[:size]).tobytes() == expected
        assert {plane_codec.available_bits(data[:size])[0] for size in range(end, next_end)} == {num_bits}


def test_plane_prior_rejects_rates_between_sub_tokens(plane_codec, photo):
    message = "tokens cannot be cut to 5 bits; use 2 to 10 in steps of 2, the bits of a sub-token of the prior"
    with pytest.raises(ValueError, match=message):
        plane_codec.compress(photo, rate=Rate(5))
    sizes = {k: len(plane_codec.compress(photo, rate=Rate(k)).data) for k in (6, 8)}
    compressed = plane_codec.compress(photo, rate=Rate(target_bytes=sizes[8] - 1))
    assert (compressed.num_bits, len(compressed.data)) == (6, sizes[6])


def test_plane_prior_logits_beyond_tolerance_raise(plane_codec, photo, monkeypatch):
    data = plane_codec.compress(photo).data
    monkeypatch.setattr(plane_codec, "prior", NoisyPrior(plane_codec.prior, 0.3))
    with pytest.raises(ValueError, match="group 0 does not match its checksum: .*logits differ"):
        plane_codec.decompress(data)


def test_plane_prior_needs_tokenizer_with_nested_bits(plane_codec, codec):
    with pytest.raises(ValueError, match=r"codes planes .* but its tokenizer has no nested bits"):
        Codec(codec.tokenizer, plane_codec.prior)


def test_prior_in_token_order_stores_all_nested_bits(plane_codec, codec, photo):
    """With a prior in the order of tokens, files of nested bits are those of other tokenizers."""
    both = Codec(plane_codec.tokenizer, codec.prior)
    data = both.compress(photo).data
    assert both.available_bits(data) == (10, 10)
    with pytest.raises(ValueError, match="and a prior with model.order plane"):
        both.compress(photo, rate=Rate(4))
    assert isinstance(codec.prior, Prior)
    with pytest.raises(ValueError, match="was written with the models"):
        plane_codec.decompress(data)


def test_decompress_other_coding_with_plane_prior_raises(plane_codec):
    """A damaged file that names the other coding raises the error of damaged files."""
    codec_format = plane_codec.token_format
    sizes = {"tile_size": codec_format.tile_size, "patch_size": codec_format.patch_size, "bits": codec_format.bits}
    header = Header(64, 32, CODING_PRIOR, 1, codec_format.model_key, **sizes)
    data = write_container(header, codec_format, [bytes(20)] * header.num_groups, [[0]] * header.num_groups)
    with pytest.raises(ValueError, match="it is coded token by token, and the prior codes planes"):
        plane_codec.decompress(data)
