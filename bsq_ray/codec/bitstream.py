"""The payload of a group: side information and nodes, coded by one range coder that ends on a byte.

    bits of the side information, at probability 1/2 · bits of the nodes, at the prior's probabilities

The range coder writes 32-bit words, most significant byte first. Of all byte strings that decode to the same bits when
they are continued by zeros, the shortest is stored.

Shape suffixes: B tiles, N tokens, S sub-tokens of a token, k bits of a sub-token.
"""

from __future__ import annotations

from dataclasses import dataclass

import constriction
import numpy as np

from bsq_ray.codec import format_v1, probabilities
from bsq_ray.codec.side_info import (
    RAW_METHOD,
    SideInfo,
    choose_shift,
    read_side_info,
    serialize_side_info,
    tolerance_of_method,
)

_BERNOULLI = constriction.stream.model.Bernoulli(perfect=False)
_HALF = constriction.stream.model.Bernoulli(0.5, perfect=False)


@dataclass(frozen=True)
class EncodedTokens:
    """Bytes of a group, the cross entropy of its tokens, and the size of its side information in bits."""

    data: bytes
    cross_entropy_bits: float
    side_info_bits: int


class BitstreamError(ValueError):
    """The bytes cannot come from an encoder with these probabilities."""


def encode_nodes(logits_NSkB: np.ndarray, chosen_NSkB: np.ndarray, method: int) -> EncodedTokens:
    """Encode the nodes of a group.

    Args:
        logits_NSkB: float64.
        chosen_NSkB: int32; the bit taken at each node.
        method: see `side_info`.
    """
    logits, chosen = logits_NSkB.ravel(), chosen_NSkB.ravel()
    if method == RAW_METHOD:
        side_info = SideInfo(method, 0, np.empty(0, np.int64), np.empty(0, bool))
        node_probabilities = np.full(len(logits), 0.5)
    else:
        shift = choose_shift(logits, method)
        levels, is_ambiguous = probabilities.round_logits(logits, tolerance_of_method(method), shift)
        positions = np.flatnonzero(is_ambiguous)
        round_up = probabilities.is_rounded_up(logits[positions], levels[positions], shift)
        side_info = SideInfo(method, shift, positions, round_up)
        node_probabilities = probabilities.probabilities_of_levels(levels, shift)
    prefix = serialize_side_info(side_info)
    symbols = np.concatenate([np.array(prefix, np.int32), chosen])
    data = _encode(symbols, np.concatenate([np.full(len(prefix), 0.5), node_probabilities]))
    signed = np.where(chosen, -logits, logits)
    return EncodedTokens(data, float(np.logaddexp(0, signed).sum() / np.log(2)), len(prefix))


def _encode(symbols: np.ndarray, symbol_probabilities: np.ndarray) -> bytes:
    """Return the shortest bytes that decode to these bits."""
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(symbols, _BERNOULLI, symbol_probabilities)
    data = coder.get_compressed().astype(">u4").tobytes()
    for size in range(max(0, len(data) - 8), len(data)):
        prefix = int.from_bytes(data[:size])
        for value in (prefix, prefix + 1):
            if value < 256**size and _decodes_to(value.to_bytes(size), symbols, symbol_probabilities):
                return value.to_bytes(size)
    return data


def _decodes_to(data: bytes, symbols: np.ndarray, symbol_probabilities: np.ndarray) -> bool:
    try:
        decoded = constriction.stream.queue.RangeDecoder(_words(data)).decode(_BERNOULLI, symbol_probabilities)
    except AssertionError:
        return False
    return bool((decoded == symbols).all())


def _words(data: bytes) -> np.ndarray:
    return np.frombuffer(data + bytes(-len(data) % 4), ">u4").astype(np.uint32)


class GroupBitstream:
    """Bytes of one group, decoded one bit of each tile at a time.

    Args:
        data: the payload.
        num_tiles: number of tiles of the group.
        num_nodes: number of coded nodes of all tiles.

    Raises:
        ValueError: the side information is damaged.
    """

    def __init__(self, data: bytes, num_tiles: int, num_nodes: int) -> None:
        self._num_tiles = num_tiles
        self._num_visited = self._next_position = 0
        self._coder, self._side_info = self._open(data, num_nodes)

    def _open(self, data: bytes, num_nodes: int) -> tuple[constriction.stream.queue.RangeDecoder, SideInfo]:
        coder = constriction.stream.queue.RangeDecoder(_words(data))
        try:
            # The range coder can continue with zeros after the last byte.
            side_info = read_side_info(lambda: int(coder.decode(_HALF)), num_nodes, 8 * len(data) + 64)
        except AssertionError as error:
            raise BitstreamError(str(error)) from error
        return coder, side_info

    def next_bits(self, logits_B: np.ndarray) -> np.ndarray:
        """Decode the next bit of each tile, given the logits (B,) of their nodes."""
        try:
            bits_B: np.ndarray = self._coder.decode(_BERNOULLI, self._node_probabilities(logits_B)).astype(np.int64)
        except AssertionError as error:
            # constriction raises AssertionError for bytes that its encoder cannot write.
            raise BitstreamError(str(error)) from error
        return bits_B

    def _node_probabilities(self, logits_B: np.ndarray) -> np.ndarray:
        side_info, end = self._side_info, self._next_position
        if side_info.method == RAW_METHOD:
            return np.full(self._num_tiles, 0.5)
        levels_B, _ = probabilities.round_logits(logits_B, 0.0, side_info.shift)
        while end < len(side_info.positions) and side_info.positions[end] < self._num_visited + self._num_tiles:
            end += 1
        if end > self._next_position:
            tile = side_info.positions[self._next_position : end] - self._num_visited
            levels_B[tile] = probabilities.round_with_side_info(
                logits_B[tile], side_info.round_up[self._next_position : end], side_info.shift
            )
            self._next_position = end
        self._num_visited += self._num_tiles
        return probabilities.probabilities_of_levels(levels_B, side_info.shift)


class GroupBitstreamV1(GroupBitstream):
    """Bytes of one group in version 1: side information in bytes of its own, then little-endian words."""

    def _open(self, data: bytes, num_nodes: int) -> tuple[constriction.stream.queue.RangeDecoder, SideInfo]:
        positions, round_up, start = format_v1.read_side_info(data, num_nodes)
        if (len(data) - start) % 4:
            raise BitstreamError("the coded tokens are truncated")
        words = np.frombuffer(data[start:], "<u4").astype(np.uint32)
        return constriction.stream.queue.RangeDecoder(words), SideInfo(0, 0, positions, round_up)
