"""Tokens of a group of tiles to bytes and back, by the prior's probabilities and a range coder (constriction).

    encode: logits in one pass ─▶ integer probabilities of the nodes on the paths ─▶ range coder
    decode: token by token with cached keys and values, all tiles of many groups at once

Both visit the nodes in the same order: token, sub-token, depth, tile. Bytes of a group: the side information, which
knows its own length, then the range coder's 32-bit words, little-endian.

Shape suffixes: B tiles, N tokens, S sub-tokens of a token, k bits of a sub-token (depths of its tree), K nodes of a
tree, L bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import constriction
import numpy as np
import torch
from torch import Tensor

from bsq_ray.codec import probabilities
from bsq_ray.codec.side_info import read_side, write_side
from bsq_ray.models.prior import Prior, path_nodes
from bsq_ray.models.quantizers.bits import bits_to_integers, integers_to_bits

_BERNOULLI = constriction.stream.model.Bernoulli(perfect=False)
# Tokens in one pass where the caller does not say how many tiles.
_PASS = 8192


@dataclass(frozen=True)
class Coded:
    """Bytes of a group, and what they consist of in bits."""

    data: bytes
    cross_entropy: float
    side: int


class Undecodable(ValueError):
    """The bytes are not what an encoder with these probabilities writes."""


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds the time spent inside to a part."""
    began = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """fp32 as it is written: no autocast and no reduced precision of products, whatever the caller has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def encode_tokens(
    prior: Prior,
    bits_BNL: Tensor,
    tolerance: float,
    batch: int | None = None,
    seconds: dict[str, float] | None = None,
) -> Coded:
    """Codes the tokens of a group of tiles.

    Args:
        bits_BNL: bool; N may be less than the prior's tokens (the first frames).
        tolerance: the largest difference that the decoder's logits may have, see `probabilities`.
        batch: tiles that go through the prior at once.
        seconds: "prior" and "coder" are added to it.
    """
    seconds = {} if seconds is None else seconds
    with timed(seconds, "prior"):
        logits_NSkB, taken_NSkB = _path_logits(prior, bits_BNL, batch)
    with timed(seconds, "coder"):
        steps, doubtful = probabilities.round_logits(logits_NSkB, tolerance)
        places = np.flatnonzero(doubtful)
        side = write_side(places, probabilities.is_upper(logits_NSkB.ravel()[places], steps.ravel()[places]))
        coder = constriction.stream.queue.RangeEncoder()
        coder.encode(taken_NSkB.ravel(), _BERNOULLI, probabilities.probabilities(steps).ravel())
        words = coder.get_compressed().astype("<u4").tobytes()
    signed = np.where(taken_NSkB, -logits_NSkB, logits_NSkB)
    return Coded(side + words, float(np.logaddexp(0, signed).sum() / np.log(2)), 8 * len(side))


def _path_logits(prior: Prior, bits_BNL: Tensor, batch: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Logits (float64) of the nodes that the tokens pass, and the bits taken there (int32), in the order of coding."""
    sub_bits, device = prior.config.sub_bits, prior.start.device
    batch = batch or max(1, _PASS // bits_BNL.shape[1])
    logits, taken = [], []
    with plain_arithmetic(device):
        for part_BNL in bits_BNL.split(batch):
            sub_tokens_BNS = bits_to_integers(part_BNL.to(device), sub_bits)
            nodes_BNSk, taken_BNSk = path_nodes(sub_tokens_BNS, sub_bits)
            logits.append(prior(sub_tokens_BNS).gather(-1, nodes_BNSk).double().cpu().numpy())
            taken.append(taken_BNSk.to(torch.int32).cpu().numpy())
    logits_NSkB, taken_NSkB = (np.concatenate(parts).transpose(1, 2, 3, 0) for parts in (logits, taken))
    return logits_NSkB, taken_NSkB


def decode_tokens(
    prior: Prior,
    payloads: Sequence[bytes],
    tiles: Sequence[int],
    coded: int,
    wanted: int,
    batch: int | None = None,
    seconds: dict[str, float] | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """The bits (B, N, L) of several groups, step by step together.

    What comes out of bytes that no encoder wrote is arbitrary; callers compare a checksum.

    Args:
        payloads: of each group.
        tiles: of each group.
        coded: tokens of a tile that the payloads hold.
        wanted: tokens of a tile to decode, the first ones (N).
        batch: tiles that go through the prior at once.
        seconds: "prior" and "coder" are added to it.
        check: called before each token; what it raises ends the work.

    Raises:
        ValueError: the bytes cannot be those of such groups.
    """
    seconds = {} if seconds is None else seconds
    section, device = prior.config, prior.start.device
    streams = [_Stream(data, count, count * coded * section.bits) for data, count in zip(payloads, tiles, strict=True)]
    total = sum(tiles)
    sizes = [min(batch or total, total - start) for start in range(0, total, batch or total)]
    edges = np.cumsum([0, *tiles])
    tokens_BNS = torch.zeros(total, wanted, section.sub_tokens, dtype=torch.long)
    with plain_arithmetic(device):
        passes = [prior.start_decoding(size, wanted) for size in sizes]
        for n in range(wanted):
            check()
            with timed(seconds, "prior"):
                features = [decoding.features() for decoding in passes]
            for s in range(section.sub_tokens):
                with timed(seconds, "prior"):
                    earlier = tokens_BNS[:, n : n + 1, :s].to(device).split(sizes)
                    parts = [prior.node_logits(h, before) for h, before in zip(features, earlier, strict=True)]
                    logits_BK = torch.cat(parts)[:, 0].double().cpu().numpy()
                with timed(seconds, "coder"):
                    value_B = np.zeros(total, np.int64)
                    node_B = np.zeros(total, np.int64)
                    for depth in range(section.sub_bits):
                        here_B = logits_BK[np.arange(total), node_B]
                        bit_B = np.concatenate(
                            [stream.next_bits(here_B[edges[g] : edges[g + 1]]) for g, stream in enumerate(streams)]
                        )
                        value_B |= bit_B << depth
                        node_B = 2 * node_B + 1 + bit_B
                tokens_BNS[:, n, s] = torch.from_numpy(value_B)
            for decoding, part_BS in zip(passes, tokens_BNS[:, n].to(device).split(sizes), strict=True):
                decoding.push(part_BS)
    return list(integers_to_bits(tokens_BNS, section.sub_bits).split(list(tiles)))


class _Stream:
    """The bytes of one group, read bit by bit of all its tiles."""

    def __init__(self, data: bytes, tiles: int, nodes: int) -> None:
        self._places, self._upper, length = read_side(data, nodes)
        if (len(data) - length) % 4:
            raise Undecodable("the coded tokens are cut off")
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data[length:], "<u4").astype(np.uint32))
        self._tiles = tiles
        self._visited = self._seen = 0

    def next_bits(self, logits_B: np.ndarray) -> np.ndarray:
        """The bits taken at a node of each tile."""
        steps_B, _ = probabilities.round_logits(logits_B, 0.0)
        seen = self._seen
        while seen < len(self._places) and self._places[seen] < self._visited + self._tiles:
            seen += 1
        if seen > self._seen:
            tile = self._places[self._seen : seen] - self._visited
            steps_B[tile] = probabilities.settle(logits_B[tile], self._upper[self._seen : seen])
            self._seen = seen
        self._visited += self._tiles
        try:
            bits_B: np.ndarray = self._coder.decode(_BERNOULLI, probabilities.probabilities(steps_B)).astype(np.int64)
        except AssertionError as error:
            # How constriction reports bytes that its encoder cannot have written.
            raise Undecodable(str(error)) from error
        return bits_B
