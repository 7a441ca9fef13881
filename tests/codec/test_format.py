"""A second decoder, written from docs/reference/bsq-format.md, decodes the files of the codec."""

import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from small_codecs import save_clip_codec

from bsq_ray import Codec, Prior, Tokenizer
from bsq_ray.models.tokenizer import Tokens

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "bsq-format.md").read_text()


class BitReader:
    """Bits of bytes, one after the other."""

    def __init__(self, data, most_significant_first):
        order = range(7, -1, -1) if most_significant_first else range(8)
        self.bits = [byte >> n & 1 for byte in data for n in order]
        self.position = 0

    def read(self, count=1):
        value = 0
        for bit in self.bits[self.position : self.position + count]:
            value = value << 1 | bit
        self.position += count
        return value


def read_side_info(data):
    """Places with choices, and the bytes they took."""
    count = offset = 0
    while True:
        count |= (data[offset] & 127) << 7 * offset
        offset += 1
        if data[offset - 1] < 128:
            break
    parameter = data[offset]
    bits, position, choices = BitReader(data[offset + 1 :], True), -1, {}
    for _ in range(count):
        ones = 0
        while bits.read():
            ones += 1
        position += 1 + (ones << parameter | bits.read(parameter))
        choices[position] = bits.read()
    return choices, offset + 1 + -(-bits.position // 8)


class RangeDecoder:
    """The page's pseudo code."""

    def __init__(self, data):
        self.words = list(struct.unpack(f"<{len(data) // 4}I", data))
        self.lower, self.range = 0, 2**64 - 1
        self.point = self.next_word() << 32 | self.next_word()

    def next_word(self):
        return self.words.pop(0) if self.words else 0

    def decode_bit(self, p):
        c = ((2**16 - p) * (2**24 - 2) >> 16) + 1
        scale = self.range >> 24
        u = (self.point - self.lower) % 2**64 // scale
        assert u < 2**24
        bit = u >= c
        self.lower = (self.lower + scale * (c if bit else 0)) % 2**64
        self.range = scale * (2**24 - c if bit else c)
        if self.range < 2**32:
            self.lower = (self.lower << 32) % 2**64
            self.range <<= 32
            self.point = (self.point << 32 | self.next_word()) % 2**64
        return int(bit)


def probability(x, choice):
    """P of the page."""
    if choice is None:
        step = min(40, max(-40, math.floor(4 * x + 0.5)))
    else:
        step = min(39, max(-40, math.floor(4 * x))) + choice
    return round(2**16 / (1 + math.exp(-step / 4)))


def decode_payload(payload, logit, tiles, tokens, sub_tokens, k):
    """Bits (tile, token, bit) of a payload; `logit(bits so far, tile, token, sub-token, node)` evaluates the prior."""
    choices, length = read_side_info(payload)
    coder, number = RangeDecoder(payload[length:]), 0
    bits = np.zeros((tiles, tokens, sub_tokens * k), bool)
    for n in range(tokens):
        for s in range(sub_tokens):
            node = [0] * tiles
            for depth in range(k):
                for tile in range(tiles):
                    p = probability(logit(bits, tile, n, s, node[tile]), choices.get(number))
                    bit = coder.decode_bit(p)
                    bits[tile, n, s * k + depth] = bit
                    node[tile] = 2 * node[tile] + 1 + bit
                    number += 1
    return bits


def pack(bits):
    return np.packbits(bits.ravel(), bitorder="little").tobytes()


def read_file(data, prior):
    """Header fields, and the bits (GOP, row, column of tiles, token, bit)."""
    assert data[:5] == b"BSQ1\x01"
    kind, coding, _, width, height, tile, patch, size, group = struct.unpack_from("<BBBIIHBBB", data, 5)
    frames, t, header_size = (
        (*struct.unpack_from("<I", data, 37), *struct.unpack_from("<H", data, 49), 55)[:3] if kind else (1, 1, 37)
    )
    rows, columns, gops = -(-height // tile), -(-width // tile), -(-frames // t)
    across, down, side = -(-columns // group), -(-rows // group), tile // patch
    num_groups = gops * down * across
    end = header_size + num_groups * (8 + 4 * t)
    assert struct.unpack_from("<I", data, end)[0] == zlib.crc32(data[:end])
    offset = end + 4
    tokens = np.zeros((gops, rows, columns, t * side * side, size), bool)
    for g in range(num_groups):
        length, crc, *token_crcs = struct.unpack_from(f"<{2 + t}I", data, header_size + g * (8 + 4 * t))
        payload, offset = data[offset : offset + length], offset + length
        assert zlib.crc32(payload) == crc
        gop, row, column = g // (down * across), g // across % down * group, g % across * group
        part = tokens[gop, row : row + group, column : column + group]
        tiles = part.shape[0] * part.shape[1]
        if coding:
            bits = decode_payload(
                payload,
                logit_function(prior),
                tiles,
                t * side * side,
                prior.config.num_sub_tokens,
                prior.config.sub_bits,
            )
        else:
            bits = np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little")
            bits = bits[: tiles * t * side * side * size].astype(bool)
        part[:] = bits.reshape(part.shape)
        for f, token_crc in enumerate(token_crcs):
            frame_bits = part.reshape(tiles, t, side * side, size)[:, f]
            assert zlib.crc32(pack(frame_bits) + struct.pack("<IH", g, f) + data[:header_size]) == token_crc
    assert offset == len(data)
    return (width, height, frames, t, tile, patch), tokens


def logit_function(prior):
    """Logits by a parallel pass over all tiles, once for each sub-token."""
    cache = {}
    k = prior.config.sub_bits

    def logit(bits, tile, n, s, node):
        if (n, s) not in cache:
            values = bits.reshape(*bits.shape[:2], -1, k) @ (1 << np.arange(k))
            with torch.no_grad():
                cache[n, s] = prior(torch.from_numpy(values))[:, n, s].double().numpy()
        return cache[n, s][tile, node]

    return logit


def decode_frames(tokens, header_fields, tokenizer):
    """Frames of one GOP, uint8 (T, H, W, 3)."""
    width, height, _, t, tile, patch = header_fields
    rows, columns, _, size = tokens.shape
    side = tile // patch
    grid = tokens.reshape(rows, columns, t, side, side, size).transpose(2, 0, 3, 1, 4, 5)
    grid = grid.reshape(t, rows * side, columns * side, size)
    result = np.zeros((t, 3, rows * tile, columns * tile))
    for top in (0, side // 2) if rows > 1 else (0,):
        for left in (0, side // 2) if columns > 1 else (0,):
            for r in range(top, rows * side - side + 1, side):
                for c in range(left, columns * side - side + 1, side):
                    bits = torch.from_numpy(grid[:, r : r + side, c : c + side].reshape(1, -1, size).copy())
                    pixels = tokenizer.decode(Tokens(bits, (t, side, side))).double().numpy()[0]
                    pixels = pixels.reshape(3, t, tile, tile).transpose(1, 0, 2, 3)
                    target = slice(r * patch, r * patch + tile), slice(c * patch, c * patch + tile)
                    weight = blend_weights(rows * tile, tile, patch, top)[:, None] * blend_weights(
                        columns * tile, tile, patch, left
                    )
                    result[:, :, target[0], target[1]] += pixels * weight[target]
    values = np.clip(np.rint(127.5 * (result + 1)), 0, 255).astype(np.uint8)
    return values[:, :, :height, :width].transpose(0, 2, 3, 1)


def blend_weights(length, tile, patch, shift):
    result = []
    for pixel in range(length):
        p = pixel + 0.5
        s = round(p / tile) * tile
        weight = 1 if s == 0 or s >= length else (1 - math.cos(math.pi * min(1, abs(p - s) / patch))) / 2
        result.append(1 - weight if shift else weight)
    return np.array(result)


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
            header_fields, tokens = read_file(data, prior)
            assert decode_frames(tokens[0], header_fields, tokenizer)[0].tobytes() == codec.decompress(data).tobytes()


def test_reference_decoder_decodes_clips(tmp_path, photos):
    folder = save_clip_codec(tmp_path / "prior")
    codec, tokenizer = Codec.from_pretrained(folder), Tokenizer.from_pretrained(f"{folder}/tokenizer").double()
    frames = [np.asarray(photo.resize((40, 20))) for photo in photos[:6]]
    data = codec.compress_clip(frames, 25).data
    header_fields, tokens = read_file(data, Prior.from_pretrained(folder))
    decoded = np.concatenate([decode_frames(gop, header_fields, tokenizer) for gop in tokens])[:6]
    assert (decoded == np.stack(list(codec.decompress_clip(data)))).all()


def test_format_page_probabilities_are_correct():
    for step, expected in re.findall(r"P\((-?\d+)\) = (\d+)", PAGE):
        assert probability(int(step) / 4, None) == int(expected)


def test_format_page_raw_example_decodes():
    header_fields, tokens = read_file(example("raw"), None)
    assert header_fields == (20, 10, 1, 1, 16, 8)
    assert (tokens[0, 0] @ (1 << np.arange(4))).tolist() == [[1, 2, 4, 8], [15, 0, 9, 6]]
    from bsq_ray.codec.container import read_container

    assert read_container(example("raw")).payload(0) == pack(tokens[0, 0])


@pytest.mark.parametrize("logit_error", [0.0, 2.0**-8, -(2.0**-8)])
def test_format_page_prior_example_decodes(logit_error):
    """Also with logits that differ by as much as is allowed for."""
    logits = {0: -0.8, 1: 0.6249, 4: 3.0}
    bits = decode_payload(
        example("prior"), lambda bits, tile, n, s, node: logits[node] + logit_error * 0.999, 1, 1, 1, 3
    )
    assert bits.ravel().tolist() == [False, True, True]
    choices, _ = read_side_info(example("prior"))
    assert choices == {1: 0}


def test_format_page_prior_example_matches_encoder():
    import constriction

    from bsq_ray.codec import probabilities
    from bsq_ray.codec.side_info import write_side_info

    logits = np.array([-0.8, 0.6249, 3.0])
    levels, is_ambiguous = probabilities.round_logits(logits, 2.0**-8)
    positions = np.flatnonzero(is_ambiguous)
    side_info = write_side_info(positions, probabilities.rounded_up(logits[positions], levels[positions]))
    coder = constriction.stream.queue.RangeEncoder()
    model = constriction.stream.model.Bernoulli(perfect=False)
    coder.encode(np.array([0, 1, 1], np.int32), model, probabilities.probabilities_of_levels(levels))
    assert side_info + coder.get_compressed().astype("<u4").tobytes() == example("prior")
    assert levels.tolist() == [-3, 2, 12]
    assert probabilities.probability_table()[levels + 40].tolist() == [21025, 40793, 62428]
