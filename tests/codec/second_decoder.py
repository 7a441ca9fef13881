"""A second decoder of `.bsq` files, written from docs/reference/bsq-format.md alone."""

import hashlib
import math
import struct
import zlib

import numpy as np
import torch

from bsq_ray.models.tokenizer import Tokens


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


def read_exp_golomb(next_bit):
    zeros = 0
    while not next_bit():
        zeros += 1
    value = 1
    for _ in range(zeros):
        value = 2 * value + next_bit()
    return value - 1


def read_side_info(next_bit):
    """Method, shift of the grid in levels, and choices by position."""
    method = read_exp_golomb(next_bit)
    if method == 11:
        return method, 0, {}
    index, count, parameter = read_exp_golomb(next_bit), read_exp_golomb(next_bit), max(0, 10 - method)
    shift = sum((index >> n & 1) / 2 ** (n + 1) for n in range(8))
    position, choices = -1, {}
    for _ in range(count):
        gap = 0
        while next_bit():
            gap += 1
        for _ in range(parameter):
            gap = 2 * gap + next_bit()
        position += 1 + gap
        choices[position] = next_bit()
    return method, shift, choices


class RangeDecoder:
    """The page's pseudo code."""

    def __init__(self, data):
        self.words = list(struct.unpack(f">{-(-len(data) // 4)}I", data + bytes(-len(data) % 4)))
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


def probability(x, choice, shift=0):
    """P of the page."""
    y = min(40, max(-40, 4 * x - shift))
    level = math.floor(y + 0.5) if choice is None else min(39, math.floor(y)) + choice
    return round(2**16 / (1 + math.exp(-(level + shift) / 4)))


def decode_payload(payload, logit, tiles, tokens, sub_tokens, k):
    """Bits (tile, token, bit) of a payload; `logit(bits so far, tile, token, sub-token, node)` evaluates the prior."""
    coder, number = RangeDecoder(payload), 0
    method, shift, choices = read_side_info(lambda: coder.decode_bit(2**15))
    bits = np.zeros((tiles, tokens, sub_tokens * k), bool)
    for n in range(tokens):
        for s in range(sub_tokens):
            node = [0] * tiles
            for depth in range(k):
                for tile in range(tiles):
                    x = logit(bits, tile, n, s, node[tile])
                    p = 2**15 if method == 11 else probability(x, choices.get(number), shift)
                    bit = coder.decode_bit(p)
                    bits[tile, n, s * k + depth] = bit
                    node[tile] = 2 * node[tile] + 1 + bit
                    number += 1
    return bits


def decode_plane_payload(payload, logit, bits, sub_tokens, k):
    """Decode a plane of some sub-tokens into bits (tile, token, bit), after the planes before it."""
    coder, number = RangeDecoder(payload), 0
    method, shift, choices = read_side_info(lambda: coder.decode_bit(2**15))
    for s in sub_tokens:
        for n in range(bits.shape[1]):
            node = [0] * len(bits)
            for depth in range(k):
                for tile in range(len(bits)):
                    x = logit(bits, tile, n, s, node[tile])
                    p = 2**15 if method == 11 else probability(x, choices.get(number), shift)
                    bit = coder.decode_bit(p)
                    bits[tile, n, s * k + depth] = bit
                    node[tile] = 2 * node[tile] + 1 + bit
                    number += 1


def pack(bits):
    return np.packbits(bits.ravel(), bitorder="little").tobytes()


def read_varint(data, offset):
    value = shift = 0
    while True:
        value |= (data[offset] & 127) << shift
        shift, offset = shift + 7, offset + 1
        if data[offset - 1] < 128:
            return value, offset


def group_tiles(tokens, g, down, across, group):
    """The tiles of a group, as a view."""
    gop, row, column = g // (down * across), g // across % down * group, g % across * group
    return tokens[gop, row : row + group, column : column + group]


def read_file(data, token_format, prior):
    """Header fields, and the bits (GOP, row, column of tiles, token, bit); of a cut file, those of its whole planes."""
    tile, patch, size, tokenizer_id, prior_id = token_format
    assert data[:4] == b"BSQ1"
    assert data[4] & 7 == 2
    is_clip, coding, group = data[4] >> 3 & 1, data[4] >> 4 & 3, 2 ** (data[4] >> 6)
    width, offset = read_varint(data, 5)
    height, offset = read_varint(data, offset)
    width, height, frames, t = width + 1, height + 1, 1, 1
    image_width = width
    if is_clip:
        frames, offset = read_varint(data, offset)
        t, offset = read_varint(data, offset)
        for _ in range(2):
            _, offset = read_varint(data, offset)
        offset += 4
    assert data[offset : offset + 2] == hashlib.sha256(tokenizer_id + prior_id).digest()[:2]
    offset, planes, with_prior = offset + 2, [], coding == 1
    if coding == 2:
        count, with_prior = data[offset] & 127, data[offset] >> 7
        planes, offset = list(data[offset + 1 : offset + 1 + count]), offset + 1 + count
    header = data[:offset]
    rows, columns, gops = -(-height // tile), -(-width // tile), -(-frames // t)
    across, down, side = -(-columns // group), -(-rows // group), tile // patch
    num_groups, lengths = gops * down * across, []
    bound_ids = struct.pack("<HBB", tile, patch, size) + tokenizer_id + prior_id
    if coding == 2:
        for _ in range(len(planes) * num_groups):
            length, offset = read_varint(data, offset)
            lengths.append(length)
        assert struct.unpack_from("<I", data, offset)[0] == zlib.crc32(data[:offset])
        offset += 4
        assert offset + 4 * len(lengths) + sum(lengths) >= len(data)
        tokens, num_bits = np.zeros((gops, rows, columns, t * side * side, size), bool), 0
        logits = {g: logit_function(prior) if with_prior else None for g in range(num_groups)}
        for p, width in enumerate(planes):
            plane_lengths = lengths[p * num_groups : (p + 1) * num_groups]
            if offset + 4 * num_groups + sum(plane_lengths) > len(data):
                break
            for g, length in enumerate(plane_lengths):
                check, payload = struct.unpack_from("<I", data, offset)[0], data[offset + 4 : offset + 4 + length]
                offset += 4 + length
                part = group_tiles(tokens, g, down, across, group)
                bits = part.reshape(-1, t * side * side, size)
                plane = slice(num_bits, num_bits + width)
                if with_prior:
                    k = prior.config.sub_bits
                    decode_plane_payload(payload, logits[g], bits, range(plane.start // k, plane.stop // k), k)
                else:
                    values = np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little")
                    bits[..., plane] = values[: bits[..., plane].size].reshape(bits[..., plane].shape)
                part[:] = bits.reshape(part.shape)
                bound = struct.pack("<IHI", g, p, length) + header + bound_ids
                assert zlib.crc32(pack(bits[..., plane]) + bound) == check
            num_bits += width
        return (image_width, height, frames, t, tile, patch), tokens[..., :num_bits]
    if num_groups > 1:
        for _ in range(num_groups - 1):
            length, offset = read_varint(data, offset)
            lengths.append(length)
        assert struct.unpack_from("<I", data, offset)[0] == zlib.crc32(data[:offset])
        offset += 4
    tokens = np.zeros((gops, rows, columns, t * side * side, size), bool)
    for g in range(num_groups):
        checks = struct.unpack_from(f"<{t}I", data, offset)
        offset += 4 * t
        end = offset + lengths[g] if g < num_groups - 1 else len(data)
        payload, offset = data[offset:end], end
        part = group_tiles(tokens, g, down, across, group)
        tiles = part.shape[0] * part.shape[1]
        if with_prior:
            bits = decode_payload(
                payload, logit_function(prior), tiles, t * side * side, prior.config.num_sub_tokens,
                prior.config.sub_bits,
            )  # fmt: skip
        else:
            bits = np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little")
            bits = bits[: tiles * t * side * side * size].astype(bool)
        part[:] = bits.reshape(part.shape)
        for f, check in enumerate(checks):
            packed = pack(part.reshape(tiles, t, side * side, size)[:, f])
            bound = struct.pack("<IHI", g, f, len(payload)) + header + bound_ids
            assert zlib.crc32(packed + bound) == check
    return (width, height, frames, t, tile, patch), tokens


def token_format(codec):
    """Return sides of a tile and of a patch, bits of a token, and the ids: all that the models determine."""
    prior_id = bytes.fromhex(codec.prior.model_id) if codec.prior else b""
    model_config = codec.tokenizer.config
    tile = model_config.image_size
    if codec.prior and model_config.position == "rotary":
        tile = codec.prior.config.grid[1] * model_config.patch_size
    sizes = tile, model_config.patch_size, codec.tokenizer.quantizer.bits
    return *sizes, bytes.fromhex(codec.tokenizer.model_id), prior_id


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
