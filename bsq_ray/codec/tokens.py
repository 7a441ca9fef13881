"""Tokens of a group of tiles to bytes and back, by the prior's probabilities and a range coder (constriction).

    encode: logits in one pass ─▶ integer probabilities of the nodes on the paths ─▶ range coder
    decode: token by token with cached keys and values, all tiles of the group at once

Both visit the nodes in the same order: token, sub-token, depth, tile. Bytes of a group: the side information, which
knows its own length, then the range coder's 32-bit words, little-endian.

Shape suffixes: B tiles, N tokens, S sub-tokens of a token, k bits of a sub-token (depths of its tree), L bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import constriction
import numpy as np
import torch
from torch import Tensor

from bsq_ray.codec import probabilities
from bsq_ray.codec.side import read_side, write_side
from bsq_ray.models.prior import Prior, path_cost, path_nodes
from bsq_ray.models.quantizers.bits import bits_to_integers, integers_to_bits

_BERNOULLI = constriction.stream.model.Bernoulli(perfect=False)


@dataclass(frozen=True)
class Coded:
    """Bytes of a group, and what they consist of in bits."""

    data: bytes
    cross_entropy: float
    side: int


@torch.no_grad()
def encode_tokens(prior: Prior, bits_BNL: Tensor, tolerance: float) -> Coded:
    """Codes the tokens of a group of tiles.

    Args:
        bits_BNL: bool.
        tolerance: the largest difference that the decoder's logits may have, see `probabilities`.
    """
    sub_bits = prior.config.sub_bits
    sub_tokens_BNS = bits_to_integers(bits_BNL, sub_bits).to(prior.start.device)
    logits_BNSK = prior(sub_tokens_BNS)
    nodes_BNSk, taken_BNSk = path_nodes(sub_tokens_BNS, sub_bits)
    logits_NSkB = logits_BNSK.gather(-1, nodes_BNSk).permute(1, 2, 3, 0).double().cpu().numpy()
    taken_NSkB = taken_BNSk.permute(1, 2, 3, 0).cpu().numpy()
    steps, doubtful = probabilities.round_logits(logits_NSkB, tolerance)
    places = np.flatnonzero(doubtful)
    side = write_side(places, probabilities.is_upper(logits_NSkB.ravel()[places], steps.ravel()[places]))
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(taken_NSkB.ravel().astype(np.int32), _BERNOULLI, probabilities.probabilities(steps).ravel())
    words = coder.get_compressed().astype("<u4").tobytes()
    nats = float(path_cost(logits_BNSK, sub_tokens_BNS, sub_bits).double().sum())
    return Coded(side + words, nats / np.log(2), 8 * len(side))


@torch.no_grad()
def decode_tokens(prior: Prior, data: bytes, tiles: int) -> Tensor:
    """The bits (B, N, L) of a group.

    What comes out of bytes that no encoder wrote is arbitrary; callers compare a checksum.

    Raises:
        ValueError: the bytes cannot be those of such a group.
    """
    section = prior.config
    limit = tiles * section.tokens * section.bits
    places, upper, length = read_side(data, limit)
    if (len(data) - length) % 4:
        raise ValueError("the coded tokens are cut off")
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data[length:], "<u4").astype(np.uint32))
    decoding = prior.start_decoding(tiles)
    tokens_BNS = torch.zeros(tiles, section.tokens, section.sub_tokens, dtype=torch.long)
    visited = seen = 0
    for n in range(section.tokens):
        h_B1D = decoding.features()
        for s in range(section.sub_tokens):
            earlier_B1s = tokens_BNS[:, n : n + 1, :s].to(h_B1D.device)
            logits_BK = prior.node_logits(h_B1D, earlier_B1s)[:, 0].double().cpu().numpy()
            node_B = np.zeros(tiles, np.int64)
            value_B = np.zeros(tiles, np.int64)
            for depth in range(section.sub_bits):
                here_B = logits_BK[np.arange(tiles), node_B]
                steps_B, _ = probabilities.round_logits(here_B, 0.0)
                until = seen + int(np.searchsorted(places[seen:], visited + tiles))
                if until > seen:
                    tile = places[seen:until] - visited
                    steps_B[tile] = probabilities.settle(here_B[tile], upper[seen:until])
                    seen = until
                bit_B = _next_bits(coder, steps_B)
                value_B |= bit_B << depth
                node_B = 2 * node_B + 1 + bit_B
                visited += tiles
            tokens_BNS[:, n, s] = torch.from_numpy(value_B)
        decoding.push(tokens_BNS[:, n].to(h_B1D.device))
    return integers_to_bits(tokens_BNS, section.sub_bits)


def _next_bits(coder: constriction.stream.queue.RangeDecoder, steps_B: np.ndarray) -> np.ndarray:
    try:
        bits_B: np.ndarray = coder.decode(_BERNOULLI, probabilities.probabilities(steps_B)).astype(np.int64)
    except AssertionError as error:
        # How constriction reports bytes that its encoder cannot have written.
        raise Undecodable(str(error)) from error
    return bits_B


class Undecodable(ValueError):
    """The bytes are not what an encoder with these probabilities writes."""
