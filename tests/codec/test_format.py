"""The second decoder, written from docs/reference/bsq-format.md, decodes the files of the codec."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from second_decoder import (
    RangeDecoder,
    decode_frames,
    decode_payload,
    pack,
    probability,
    read_file,
    read_side_info,
    token_format,
)
from small_codecs import PRIOR_CONFIG, save_clip_codec, save_nested_codec, save_nested_tokenizer, save_prior
from small_models import save_tokenizer

from bsq_ray import Codec, Prior, Tokenizer
from bsq_ray.codec import probabilities
from bsq_ray.codec.bitstream import encode_nodes
from bsq_ray.codec.container import read_container
from bsq_ray.codec.header import TokenFormat
from bsq_ray.codec.rate import Rate
from bsq_ray.model_export import export_model
from bsq_ray.models.tokenizer import Tokens

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "bsq-format.md").read_text()


def example(name):
    """The bytes of an example of the page."""
    return bytes.fromhex(re.search(rf"<!-- example: {name} -->\n```\n(.*?)```", PAGE, re.S)[1])


def test_reference_decoder_decodes_images(codec_folder, photos):
    codec = Codec.from_pretrained(codec_folder)
    tokenizer = Tokenizer.from_pretrained(f"{codec_folder}/tokenizer").double()
    for prior in (Prior.from_pretrained(codec_folder), None):
        codec = Codec.from_pretrained(codec_folder if prior else f"{codec_folder}/tokenizer")
        for size in ((100, 40), (30, 20)):
            data = codec.compress(photos[0].resize(size)).data
            header_fields, tokens = read_file(data, token_format(codec), prior)
            assert decode_frames(tokens[0], header_fields, tokenizer)[0].tobytes() == codec.decompress(data).tobytes()


def test_reference_decoder_decodes_clips(tmp_path, photos):
    folder = save_clip_codec(tmp_path / "prior")
    codec, tokenizer = Codec.from_pretrained(folder), Tokenizer.from_pretrained(f"{folder}/tokenizer").double()
    frames = [np.asarray(photo.resize((40, 20))) for photo in photos[:6]]
    data = codec.compress_clip(frames, 25).data
    header_fields, tokens = read_file(data, token_format(codec), Prior.from_pretrained(folder))
    decoded = np.concatenate([decode_frames(gop, header_fields, tokenizer) for gop in tokens])[:6]
    assert (decoded == np.stack(list(codec.decompress_clip(data)))).all()


def test_reference_decoder_reads_tiles_of_a_prior(tmp_path, photos):
    """A tokenizer for images of any size has tiles as large as its prior's grid."""
    tokenizer_url = save_tokenizer(tmp_path / "tokenizer", 0, position="rotary", attention_radius=3, position_period=2)
    export_model(save_prior(tmp_path / "prior", tokenizer_url), str(tmp_path / "small"), "float32", prior_side=2)
    codec, prior = Codec.from_pretrained(str(tmp_path / "small")), Prior.from_pretrained(str(tmp_path / "small"))
    data = codec.compress(photos[0].resize((70, 40))).data
    header_fields, tokens = read_file(data, token_format(codec), prior)
    assert header_fields[-2:] == (16, 8)
    rows, columns, _, size = tokens.shape[1:]
    grid = tokens[0].reshape(rows, columns, 2, 2, size).transpose(0, 2, 1, 3, 4).reshape(1, -1, size)
    tokenizer = Tokenizer.from_pretrained(tokenizer_url).double()
    pixels = tokenizer.decode(Tokens(torch.from_numpy(grid.copy()), (1, 2 * rows, 2 * columns)))[0]
    expected = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)[:40, :70].numpy()
    assert (np.asarray(codec.decompress(data)) == expected).all()


def test_reference_decoder_reads_clips_of_any_size(tmp_path, photos):
    """The frames of a group are decoded together, as a whole."""
    url = save_tokenizer(tmp_path / "tokenizer", 0, 2, position="rotary", attention_radius=3, position_period=2)
    folder = save_prior(tmp_path / "prior", url, PRIOR_CONFIG.model_copy(update={"grid": (2, 4, 4)}))
    codec, prior = Codec.from_pretrained(folder), Prior.from_pretrained(folder)
    data = codec.compress_clip([np.asarray(photo.resize((70, 40))) for photo in photos[:2]], 25).data
    header_fields, tokens = read_file(data, token_format(codec), prior)
    assert header_fields == (70, 40, 2, 2, 32, 8)
    rows, columns, _, size = tokens.shape[1:]
    grid = tokens[0].reshape(rows, columns, 2, 4, 4, size).transpose(2, 0, 3, 1, 4, 5).reshape(1, -1, size)
    tokenizer = Tokenizer.from_pretrained(url).double()
    [pixels] = tokenizer.decode(Tokens(torch.from_numpy(grid.copy()), (2, 4 * rows, 4 * columns)))
    expected = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0)[:, :40, :70].numpy()
    assert (np.stack(list(codec.decompress_clip(data))) == expected).all()


@pytest.mark.parametrize("num_bits", [4, 7, 9])
def test_reference_decoder_decodes_planes(tmp_path, photos, num_bits):
    """Also files that are cut inside their last plane."""
    codec = Codec.from_pretrained(save_nested_tokenizer(tmp_path))
    tokenizer = Tokenizer.from_pretrained(str(tmp_path)).double()
    data = codec.compress(photos[0].resize((150, 40)), rate=Rate(num_bits)).data
    for part in (data, data[:-1]) if num_bits > 4 else (data,):
        header_fields, tokens = read_file(part, token_format(codec), None)
        assert tokens.shape[-1] == codec.available_bits(part)[0]
        assert decode_frames(tokens[0], header_fields, tokenizer)[0].tobytes() == codec.decompress(part).tobytes()


def test_reference_decoder_decodes_planes_with_prior(tmp_path, photos):
    folder = save_nested_codec(tmp_path / "prior")
    codec, prior = Codec.from_pretrained(folder), Prior.from_pretrained(folder)
    tokenizer = Tokenizer.from_pretrained(f"{folder}/tokenizer").double()
    data = codec.compress(photos[0].resize((70, 20)), rate=Rate(6)).data
    for part, num_bits in ((data, 6), (data[:-1], 4)):
        header_fields, tokens = read_file(part, token_format(codec), prior)
        assert tokens.shape[-1] == num_bits
        assert decode_frames(tokens[0], header_fields, tokenizer)[0].tobytes() == codec.decompress(part).tobytes()


def test_format_page_planes_example_decodes():
    for size, num_bits in ((None, 4), (-1, 3)):
        data = example("planes")[:size]
        header_fields, tokens = read_file(data, EXAMPLE_FORMAT, None)
        assert header_fields == (20, 10, 1, 1, 16, 8)
        values = np.array([[1, 2, 4, 8], [15, 0, 9, 6]]) % 2**num_bits
        assert (tokens[0, 0] @ (1 << np.arange(num_bits)) == values).all()
        planes = read_container(data, TokenFormat(*EXAMPLE_FORMAT)).planes
        assert planes.payload(0, 0) == pack(tokens[0, 0][..., :3])


def test_format_page_probabilities_are_correct():
    for step, expected in re.findall(r"P\((-?\d+)\) = (\d+)", PAGE):
        assert probability(int(step) / 4, None) == int(expected)


EXAMPLE_FORMAT = (16, 8, 4, b"tokenizer of the format page ...", b"")


def test_format_page_raw_example_decodes():
    header_fields, tokens = read_file(example("raw"), EXAMPLE_FORMAT, None)
    assert header_fields == (20, 10, 1, 1, 16, 8)
    assert (tokens[0, 0] @ (1 << np.arange(4))).tolist() == [[1, 2, 4, 8], [15, 0, 9, 6]]
    assert read_container(example("raw"), TokenFormat(*EXAMPLE_FORMAT)).payload(0) == pack(tokens[0, 0])


EXAMPLE_LOGITS = {0: -0.8, 1: 0.6249, 4: 3.0}


@pytest.mark.parametrize("logit_error", [0.0, 2.0**-8, -(2.0**-8)])
def test_format_page_prior_example_decodes(logit_error):
    """Also with logits that differ by as much as is allowed for."""
    for name, choices in (("prior", {}), ("prior-unshifted", {1: 0})):
        bits = decode_payload(
            example(name), lambda *node: EXAMPLE_LOGITS[node[-1]] + logit_error * 0.999, 1, 1, 1, 3
        )  # fmt: skip
        assert bits.ravel().tolist() == [False, True, True]
        coder = RangeDecoder(example(name))
        assert read_side_info(lambda coder=coder: coder.decode_bit(2**15)) == (6, 0 if choices else 0.25, choices)


def test_format_page_prior_example_matches_encoder(monkeypatch):
    logits, chosen = np.array(list(EXAMPLE_LOGITS.values())), np.array([0, 1, 1], np.int32)
    assert encode_nodes(logits, chosen, 6).data == example("prior")
    monkeypatch.setattr("bsq_ray.codec.bitstream.choose_shift", lambda *_: 0)
    assert encode_nodes(logits, chosen, 6).data == example("prior-unshifted")


def test_format_page_levels_are_correct():
    for shift, levels, expected in ((0, [-3, 2, 12], [21025, 40793, 62428]), (2, [-3, 2, 12], [21928, 41748, 62608])):
        assert probabilities.round_logits(np.array(list(EXAMPLE_LOGITS.values())), 0.0, shift)[0].tolist() == levels
        assert probabilities.probability_table(shift)[np.array(levels) + 40].tolist() == expected
