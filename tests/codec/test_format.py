"""A second decoder, written from docs/bsq-format.md without the codec's code: it reads what the codec writes."""

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

PAGE = (Path(__file__).parents[2] / "docs" / "bsq-format.md").read_text()


class Bits:
    """Bits of bytes, one after the other."""

    def __init__(self, data, most_significant_first):
        order = range(7, -1, -1) if most_significant_first else range(8)
        self.bits = [byte >> n & 1 for byte in data for n in order]
        self.at = 0

    def take(self, count=1):
        value = 0
        for bit in self.bits[self.at : self.at + count]:
            value = value << 1 | bit
        self.at += count
        return value


def read_side(data):
    """Places with choices, and the bytes they took."""
    count = at = 0
    while True:
        count |= (data[at] & 127) << 7 * at
        at += 1
        if data[at - 1] < 128:
            break
    parameter = data[at]
    bits, place, choices = Bits(data[at + 1 :], True), -1, {}
    for _ in range(count):
        ones = 0
        while bits.take():
            ones += 1
        place += 1 + (ones << parameter | bits.take(parameter))
        choices[place] = bits.take()
    return choices, at + 1 + -(-bits.at // 8)


class RangeDecoder:
    """The page's pseudo code."""

    def __init__(self, data):
        self.words = list(struct.unpack(f"<{len(data) // 4}I", data))
        self.lower, self.range = 0, 2**64 - 1
        self.point = self.word() << 32 | self.word()

    def word(self):
        return self.words.pop(0) if self.words else 0

    def bit(self, p):
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
            self.point = (self.point << 32 | self.word()) % 2**64
        return int(bit)


def probability(x, choice):
    """P of the page."""
    if choice is None:
        step = min(40, max(-40, math.floor(4 * x + 0.5)))
    else:
        step = min(39, max(-40, math.floor(4 * x))) + choice
    return round(2**16 / (1 + math.exp(-step / 4)))


def walk(payload, logit, tiles, tokens, sub_tokens, k):
    """Bits (tile, token, bit) of a payload; `logit(bits so far, tile, token, sub-token, node)` asks the prior."""
    choices, length = read_side(payload)
    coder, number = RangeDecoder(payload[length:]), 0
    bits = np.zeros((tiles, tokens, sub_tokens * k), bool)
    for n in range(tokens):
        for s in range(sub_tokens):
            node = [0] * tiles
            for depth in range(k):
                for tile in range(tiles):
                    p = probability(logit(bits, tile, n, s, node[tile]), choices.get(number))
                    bit = coder.bit(p)
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
    frames, t, head = (
        (*struct.unpack_from("<I", data, 37), *struct.unpack_from("<H", data, 49), 55)[:3] if kind else (1, 1, 37)
    )
    rows, columns, gops = -(-height // tile), -(-width // tile), -(-frames // t)
    across, down, side = -(-columns // group), -(-rows // group), tile // patch
    count = gops * down * across
    end = head + count * (8 + 4 * t)
    assert struct.unpack_from("<I", data, end)[0] == zlib.crc32(data[:end])
    at = end + 4
    tokens = np.zeros((gops, rows, columns, t * side * side, size), bool)
    for g in range(count):
        length, crc, *checks = struct.unpack_from(f"<{2 + t}I", data, head + g * (8 + 4 * t))
        payload, at = data[at : at + length], at + length
        assert zlib.crc32(payload) == crc
        gop, row, column = g // (down * across), g // across % down * group, g % across * group
        part = tokens[gop, row : row + group, column : column + group]
        tiles = part.shape[0] * part.shape[1]
        if coding:
            bits = walk(payload, asking(prior), tiles, t * side * side, prior.config.sub_tokens, prior.config.sub_bits)
        else:
            bits = np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little")
            bits = bits[: tiles * t * side * side * size].astype(bool)
        part[:] = bits.reshape(part.shape)
        for f, check in enumerate(checks):
            of_frame = part.reshape(tiles, t, side * side, size)[:, f]
            assert zlib.crc32(pack(of_frame) + struct.pack("<IH", g, f) + data[:head]) == check
    assert at == len(data)
    return (width, height, frames, t, tile, patch), tokens


def asking(prior):
    """Logits by a parallel pass over all tiles, once for each sub-token."""
    known = {}
    k = prior.config.sub_bits

    def logit(bits, tile, n, s, node):
        if (n, s) not in known:
            values = bits.reshape(*bits.shape[:2], -1, k) @ (1 << np.arange(k))
            with torch.no_grad():
                known[n, s] = prior(torch.from_numpy(values))[:, n, s].double().numpy()
        return known[n, s][tile, node]

    return logit


def picture(tokens, facts, tokenizer):
    """Frames of one GOP, uint8 (T, H, W, 3)."""
    width, height, _, t, tile, patch = facts
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
                    place = slice(r * patch, r * patch + tile), slice(c * patch, c * patch + tile)
                    weight = weights(rows * tile, tile, patch, top)[:, None] * weights(
                        columns * tile, tile, patch, left
                    )
                    result[:, :, place[0], place[1]] += pixels * weight[place]
    values = np.clip(np.rint(127.5 * (result + 1)), 0, 255).astype(np.uint8)
    return values[:, :, :height, :width].transpose(0, 2, 3, 1)


def weights(length, tile, patch, shift):
    found = []
    for pixel in range(length):
        p = pixel + 0.5
        s = round(p / tile) * tile
        own = 1 if s == 0 or s >= length else (1 - math.cos(math.pi * min(1, abs(p - s) / patch))) / 2
        found.append(1 - own if shift else own)
    return np.array(found)


def example(name):
    """The bytes of an example of the page."""
    return bytes.fromhex(re.search(rf"<!-- example: {name} -->\n```\n(.*?)```", PAGE, re.S)[1])


def test_the_second_decoder_reads_images(codec_folder, photos):
    codec = Codec.from_pretrained(codec_folder)
    tokenizer = Tokenizer.from_pretrained(f"{codec_folder}/tokenizer").double()
    for prior in (Prior.from_pretrained(codec_folder), None):
        codec = Codec.from_pretrained(codec_folder if prior else f"{codec_folder}/tokenizer")
        for size in ((100, 40), (30, 20)):
            data = codec.compress(photos[0].resize(size)).data
            facts, tokens = read_file(data, prior)
            assert picture(tokens[0], facts, tokenizer)[0].tobytes() == codec.decompress(data).tobytes()


def test_the_second_decoder_reads_clips(tmp_path, photos):
    folder = save_clip_codec(tmp_path / "prior")
    codec, tokenizer = Codec.from_pretrained(folder), Tokenizer.from_pretrained(f"{folder}/tokenizer").double()
    frames = [np.asarray(photo.resize((40, 20))) for photo in photos[:6]]
    data = codec.compress_clip(frames, 25).data
    facts, tokens = read_file(data, Prior.from_pretrained(folder))
    found = np.concatenate([picture(gop, facts, tokenizer) for gop in tokens])[:6]
    assert (found == np.stack(list(codec.decompress_clip(data)))).all()


def test_the_pages_probabilities():
    for step, expected in re.findall(r"P\((-?\d+)\) = (\d+)", PAGE):
        assert probability(int(step) / 4, None) == int(expected)


def test_the_example_without_a_prior():
    facts, tokens = read_file(example("raw"), None)
    assert facts == (20, 10, 1, 1, 16, 8)
    assert (tokens[0, 0] @ (1 << np.arange(4))).tolist() == [[1, 2, 4, 8], [15, 0, 9, 6]]
    from bsq_ray.codec.container import read_container

    assert read_container(example("raw")).payload(0) == pack(tokens[0, 0])


@pytest.mark.parametrize("off", [0.0, 2.0**-8, -(2.0**-8)])
def test_the_example_with_a_prior(off):
    """Also with logits that differ by as much as is allowed for."""
    logits = {0: -0.8, 1: 0.6249, 4: 3.0}
    bits = walk(example("prior"), lambda bits, tile, n, s, node: logits[node] + off * 0.999, 1, 1, 1, 3)
    assert bits.ravel().tolist() == [False, True, True]
    choices, _ = read_side(example("prior"))
    assert choices == {1: 0}


def test_the_example_with_a_prior_is_what_the_encoder_writes():
    import constriction

    from bsq_ray.codec import probabilities
    from bsq_ray.codec.side_info import write_side

    logits = np.array([-0.8, 0.6249, 3.0])
    steps, doubtful = probabilities.round_logits(logits, 2.0**-8)
    places = np.flatnonzero(doubtful)
    side = write_side(places, probabilities.is_upper(logits[places], steps[places]))
    coder = constriction.stream.queue.RangeEncoder()
    model = constriction.stream.model.Bernoulli(perfect=False)
    coder.encode(np.array([0, 1, 1], np.int32), model, probabilities.probabilities(steps))
    assert side + coder.get_compressed().astype("<u4").tobytes() == example("prior")
    assert steps.tolist() == [-3, 2, 12]
    assert probabilities.table()[steps + 40].tolist() == [21025, 40793, 62428]
