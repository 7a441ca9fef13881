"""Entropy coding of tokens with the prior's probabilities and a range coder (constriction).

    encode: logits in one pass ─▶ integer probabilities of the nodes on the paths ─▶ range coder
    decode: token by token with cached keys and values, all tiles of several groups at once

Both visit the nodes in the same order: token, sub-token, depth, tile. The bytes of a group are the side information,
which contains its own length, and the range coder's 32-bit words, little-endian.

Shape suffixes: B tiles, N tokens, S sub-tokens of a token, k bits of a sub-token (depths of its tree), K nodes of a
tree, L bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import constriction
import numpy as np
import torch
from torch import Tensor

from bsq_ray.codec import probabilities
from bsq_ray.codec.side_info import read_side_info, write_side_info
from bsq_ray.codec.timing import add_elapsed
from bsq_ray.models.prior import Prior, binary_tree_nodes
from bsq_ray.models.quantizers.bits import bits_to_integers, integers_to_bits

_BERNOULLI = constriction.stream.model.Bernoulli(perfect=False)
# Tokens in one pass if the caller does not set the batch size.
_TOKENS_PER_PASS = 8192


@dataclass(frozen=True)
class EncodedTokens:
    """Bytes of a group, the cross entropy of its tokens, and the size of its side information in bits."""

    data: bytes
    cross_entropy_bits: float
    side_info_bits: int


class BitstreamError(ValueError):
    """The bytes cannot come from an encoder with these probabilities."""


@contextmanager
def deterministic_fp32(device: torch.device) -> Iterator[None]:
    """Disable gradients, autocast and reduced-precision products of fp32 in the block, whatever the caller has set."""
    previous_precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(previous_precision)


def encode_tokens(
    prior: Prior,
    bits_BNL: Tensor,
    tolerance: float,
    batch_size: int | None = None,
    timings_s: dict[str, float] | None = None,
) -> EncodedTokens:
    """Encode the tokens of a group of tiles.

    Args:
        bits_BNL: bool; N may be less than the prior's tokens (the first frames).
        tolerance: maximum difference between the logits of encoder and decoder, see `probabilities`.
        batch_size: tiles in one pass through the prior.
        timings_s: the seconds of "prior" and "coder" are added to it.
    """
    timings_s = {} if timings_s is None else timings_s
    with add_elapsed(timings_s, "prior"):
        logits_NSkB, chosen_NSkB = _path_logits(prior, bits_BNL, batch_size)
    with add_elapsed(timings_s, "coder"):
        levels, is_ambiguous = probabilities.round_logits(logits_NSkB, tolerance)
        positions = np.flatnonzero(is_ambiguous)
        side_info = write_side_info(
            positions, probabilities.rounded_up(logits_NSkB.ravel()[positions], levels.ravel()[positions])
        )
        coder = constriction.stream.queue.RangeEncoder()
        coder.encode(chosen_NSkB.ravel(), _BERNOULLI, probabilities.probabilities_of_levels(levels).ravel())
        words = coder.get_compressed().astype("<u4").tobytes()
    signed = np.where(chosen_NSkB, -logits_NSkB, logits_NSkB)
    return EncodedTokens(side_info + words, float(np.logaddexp(0, signed).sum() / np.log(2)), 8 * len(side_info))


def _path_logits(prior: Prior, bits_BNL: Tensor, batch_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits (float64) and the chosen bits (int32) of the nodes on the paths, (N, S, k, B) each."""
    sub_bits, device = prior.config.sub_bits, prior.start.device
    batch_size = batch_size or max(1, _TOKENS_PER_PASS // bits_BNL.shape[1])
    logits, chosen = [], []
    with deterministic_fp32(device):
        for part_BNL in bits_BNL.split(batch_size):
            sub_tokens_BNS = bits_to_integers(part_BNL.to(device), sub_bits)
            nodes_BNSk, chosen_BNSk = binary_tree_nodes(sub_tokens_BNS, sub_bits)
            logits.append(prior(sub_tokens_BNS).gather(-1, nodes_BNSk).double().cpu().numpy())
            chosen.append(chosen_BNSk.to(torch.int32).cpu().numpy())
    logits_NSkB, chosen_NSkB = (np.concatenate(parts).transpose(1, 2, 3, 0) for parts in (logits, chosen))
    return logits_NSkB, chosen_NSkB


def decode_tokens(
    prior: Prior,
    payloads: Sequence[bytes],
    tile_counts: Sequence[int],
    num_coded_tokens: int,
    num_tokens: int,
    batch_size: int | None = None,
    timings_s: dict[str, float] | None = None,
    check_deadline: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Decode several groups together, token by token; return the bits (B, N, L) of each.

    Invalid bytes may decode to arbitrary tokens, so callers compare a checksum.

    Args:
        payloads: bytes of each group.
        tile_counts: number of tiles of each group.
        num_coded_tokens: tokens of a tile in the payloads.
        num_tokens: tokens of a tile to decode, the first ones (N).
        batch_size: tiles in one pass through the prior.
        timings_s: the seconds of "prior" and "coder" are added to it.
        check_deadline: called before each token; an exception raised by it stops the decoding.

    Raises:
        ValueError: the bytes cannot belong to such groups.
    """
    timings_s = {} if timings_s is None else timings_s
    model_config, device = prior.config, prior.start.device
    bitstreams = [
        _GroupBitstream(data, count, count * num_coded_tokens * model_config.bits)
        for data, count in zip(payloads, tile_counts, strict=True)
    ]
    num_tiles = sum(tile_counts)
    batch_sizes = [
        min(batch_size or num_tiles, num_tiles - start) for start in range(0, num_tiles, batch_size or num_tiles)
    ]
    boundaries = np.cumsum([0, *tile_counts])
    tokens_BNS = torch.zeros(num_tiles, num_tokens, model_config.num_sub_tokens, dtype=torch.long)
    with deterministic_fp32(device):
        decoders = [prior.start_decoding(size, num_tokens) for size in batch_sizes]
        for n in range(num_tokens):
            check_deadline()
            with add_elapsed(timings_s, "prior"):
                features = [decoder.next_features() for decoder in decoders]
            for s in range(model_config.num_sub_tokens):
                with add_elapsed(timings_s, "prior"):
                    earlier = tokens_BNS[:, n : n + 1, :s].to(device).split(batch_sizes)
                    parts = [prior.node_logits(h, previous) for h, previous in zip(features, earlier, strict=True)]
                    logits_BK = torch.cat(parts)[:, 0].double().cpu().numpy()
                with add_elapsed(timings_s, "coder"):
                    value_B = np.zeros(num_tiles, np.int64)
                    node_B = np.zeros(num_tiles, np.int64)
                    for depth in range(model_config.sub_bits):
                        node_logits_B = logits_BK[np.arange(num_tiles), node_B]
                        bit_B = np.concatenate(
                            [
                                stream.next_bits(node_logits_B[boundaries[g] : boundaries[g + 1]])
                                for g, stream in enumerate(bitstreams)
                            ]
                        )
                        value_B |= bit_B << depth
                        node_B = 2 * node_B + 1 + bit_B
                tokens_BNS[:, n, s] = torch.from_numpy(value_B)
            for decoder, part_BS in zip(decoders, tokens_BNS[:, n].to(device).split(batch_sizes), strict=True):
                decoder.push(part_BS)
    return list(integers_to_bits(tokens_BNS, model_config.sub_bits).split(list(tile_counts)))


class _GroupBitstream:
    """Bytes of one group, decoded one bit of each tile at a time."""

    def __init__(self, data: bytes, num_tiles: int, num_nodes: int) -> None:
        self._positions, self._round_up, side_info_bytes = read_side_info(data, num_nodes)
        if (len(data) - side_info_bytes) % 4:
            raise BitstreamError("the coded tokens are truncated")
        self._coder = constriction.stream.queue.RangeDecoder(
            np.frombuffer(data[side_info_bytes:], "<u4").astype(np.uint32)
        )
        self._num_tiles = num_tiles
        self._num_visited = self._next_position = 0

    def next_bits(self, logits_B: np.ndarray) -> np.ndarray:
        """Decode the next bit of each tile, given the logits (B,) of their nodes."""
        levels_B, _ = probabilities.round_logits(logits_B, 0.0)
        end = self._next_position
        while end < len(self._positions) and self._positions[end] < self._num_visited + self._num_tiles:
            end += 1
        if end > self._next_position:
            tile = self._positions[self._next_position : end] - self._num_visited
            levels_B[tile] = probabilities.round_with_side_info(
                logits_B[tile], self._round_up[self._next_position : end]
            )
            self._next_position = end
        self._num_visited += self._num_tiles
        try:
            bits_B: np.ndarray = self._coder.decode(_BERNOULLI, probabilities.probabilities_of_levels(levels_B)).astype(
                np.int64
            )
        except AssertionError as error:
            # constriction raises AssertionError for bytes that its encoder cannot write.
            raise BitstreamError(str(error)) from error
        return bits_B
