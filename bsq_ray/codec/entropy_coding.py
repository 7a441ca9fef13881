"""Entropy coding of tokens with the prior's probabilities and a range coder (constriction).

    encode: logits in one pass, in fp64 ─▶ integer probabilities of the nodes on the paths ─▶ range coder
    decode: token by token with cached keys and values, all tiles of several groups at once, in fp32

Both visit the nodes in the same order: token, sub-token, depth, tile. Planes have an order and a decoder of their own,
see `plane_decoding.py`. `bitstream.py` specifies the bytes of a group.

The encoder's logits are those of fp64. Their difference from fp32 is the error that a decoder makes. The encoder
measures it on every fifth tile of a group, and chooses a tolerance of at least eight times the largest difference.

Shape suffixes: B tiles, N tokens, S sub-tokens of a token, k bits of a sub-token (depths of its tree), K nodes of a
tree, L bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from bsq_ray.codec.bitstream import EncodedTokens, GroupBitstream, encode_nodes
from bsq_ray.codec.side_info import MAX_TOLERANCE_EXPONENT, choose_method
from bsq_ray.codec.timing import add_elapsed
from bsq_ray.models.prior import Prior, binary_tree_nodes
from bsq_ray.models.quantizers.bits import bits_to_integers, integers_to_bits

# Tokens in one pass if the caller does not set the batch size.
_TOKENS_PER_PASS = 8192
# The error of fp32 is measured on every fifth tile, the diagonal of a group of 4 x 4, because it costs a pass in fp32.
# Other tiles may have a larger error, so the measured one is doubled.
_TILES_PER_ERROR, _ERROR_FACTOR = 5, 2


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


class TokenEncoder:
    """Encodes the tokens of groups of tiles.

    Args:
        prior: in fp32. The first group makes a copy in fp64.
        batch_size: tiles in one pass through the prior; None chooses by the number of tokens.
        max_exponent: the tolerance is at least 2^-max_exponent, at most 14.
    """

    def __init__(self, prior: Prior, batch_size: int | None = None, max_exponent: int = MAX_TOLERANCE_EXPONENT) -> None:
        self._prior, self._batch_size, self._max_exponent = prior, batch_size, max_exponent
        self._reference_prior: Prior | None = None

    def encode(self, bits_BNL: Tensor, timings_s: dict[str, float] | None = None) -> EncodedTokens:
        """Encode a group.

        Args:
            bits_BNL: bool; N may be less than the prior's tokens (the first frames).
            timings_s: the seconds of "prior" and "coder" are added to it.
        """
        timings_s = {} if timings_s is None else timings_s
        with add_elapsed(timings_s, "prior"):
            logits_NSkB, chosen_NSkB, error = self._path_logits(bits_BNL)
        with add_elapsed(timings_s, "coder"):
            return encode_nodes(logits_NSkB, chosen_NSkB, choose_method(error, self._max_exponent))

    def encode_planes(
        self, bits_BNL: Tensor, ranges: Sequence[tuple[int, int]], timings_s: dict[str, float]
    ) -> list[EncodedTokens]:
        """Encode planes of a group, with a prior in the order "plane".

        Args:
            bits_BNL: bool; all tokens of the group.
            ranges: first bit of each plane and the bit after its last one, multiples of a sub-token's bits.
            timings_s: the seconds of "prior" and "coder" are added to it.
        """
        with add_elapsed(timings_s, "prior"):
            num_bits = max(stop for _, stop in ranges)
            logits_NSkB, chosen_NSkB, error = self._path_logits(bits_BNL[..., :num_bits])
        method, sub_bits = choose_method(error, self._max_exponent), self._prior.config.sub_bits
        with add_elapsed(timings_s, "coder"):
            planes = [slice(start // sub_bits, stop // sub_bits) for start, stop in ranges]
            # Sub-tokens before tokens.
            logits_SNkB, chosen_SNkB = logits_NSkB.swapaxes(0, 1), chosen_NSkB.swapaxes(0, 1)
            return [encode_nodes(logits_SNkB[plane], chosen_SNkB[plane], method) for plane in planes]

    def _path_logits(self, bits_BNL: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
        """Return logits (float64) and chosen bits (int32) of the path nodes, (N, S, k, B), and the error of fp32."""
        if self._reference_prior is None:
            self._reference_prior = copy.deepcopy(self._prior).double()
        sub_bits, device = self._prior.config.sub_bits, self._prior.start.device
        sequence_length = bits_BNL.shape[1] * self._prior.config.sequence_length // self._prior.config.num_tokens
        batch_size = self._batch_size or max(1, _TOKENS_PER_PASS // sequence_length)
        with deterministic_fp32(device):
            sub_tokens_BNS = bits_to_integers(bits_BNL.to(device), sub_bits)
            nodes_BNSk, chosen_BNSk = binary_tree_nodes(sub_tokens_BNS, sub_bits)
            logits_BNSk = _logits_of_nodes(self._reference_prior, sub_tokens_BNS, nodes_BNSk, batch_size)
            some = slice(None, None, _TILES_PER_ERROR)
            fp32_logits_BNSk = _logits_of_nodes(self._prior, sub_tokens_BNS[some], nodes_BNSk[some], batch_size)
        error = _ERROR_FACTOR * float((logits_BNSk[some] - fp32_logits_BNSk).abs().max())
        logits_NSkB, chosen_NSkB = (
            values.permute(1, 2, 3, 0).contiguous().cpu().numpy() for values in (logits_BNSk, chosen_BNSk.int())
        )
        return logits_NSkB, chosen_NSkB, error


def _logits_of_nodes(prior: Prior, sub_tokens_BNS: Tensor, nodes_BNSk: Tensor, batch_size: int) -> Tensor:
    """Return the logits of the given nodes, float64 (B, N, S, k)."""
    parts = zip(sub_tokens_BNS.split(batch_size), nodes_BNSk.split(batch_size), strict=True)
    return torch.cat([prior(tokens).gather(-1, nodes).double() for tokens, nodes in parts])


def decode_tokens(
    prior: Prior,
    payloads: Sequence[bytes],
    tile_counts: Sequence[int],
    num_coded_tokens: int,
    num_tokens: int,
    batch_size: int | None = None,
    timings_s: dict[str, float] | None = None,
    check_cancelled: Callable[[], None] = lambda: None,
    bitstream_type: type[GroupBitstream] = GroupBitstream,
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
        check_cancelled: called before each token; an exception raised by it stops the decoding.
        bitstream_type: the version of the payloads.

    Raises:
        ValueError: the bytes cannot belong to such groups.
    """
    timings_s = {} if timings_s is None else timings_s
    model_config, device = prior.config, prior.start.device
    bitstreams = [
        bitstream_type(data, count, count * num_coded_tokens * model_config.bits)
        for data, count in zip(payloads, tile_counts, strict=True)
    ]
    num_tiles = sum(tile_counts)
    batch_sizes = split_sizes(num_tiles, batch_size)
    tokens_BNS = torch.zeros(num_tiles, num_tokens, model_config.num_sub_tokens, dtype=torch.long)
    with deterministic_fp32(device):
        decoders = [prior.start_decoding(size, num_tokens) for size in batch_sizes]
        for n in range(num_tokens):
            check_cancelled()
            with add_elapsed(timings_s, "prior"):
                features = [decoder.next_features() for decoder in decoders]
            for s in range(model_config.num_sub_tokens):
                with add_elapsed(timings_s, "prior"):
                    earlier = tokens_BNS[:, n : n + 1, :s].to(device).split(batch_sizes)
                    parts = [prior.node_logits(h, previous) for h, previous in zip(features, earlier, strict=True)]
                    logits_BK = torch.cat(parts)[:, 0].double().cpu().numpy()
                with add_elapsed(timings_s, "coder"):
                    value_B = decode_sub_token(bitstreams, tile_counts, logits_BK, model_config.sub_bits)
                tokens_BNS[:, n, s] = torch.from_numpy(value_B)
            for decoder, part_BS in zip(decoders, tokens_BNS[:, n].to(device).split(batch_sizes), strict=True):
                decoder.push(part_BS)
    return list(integers_to_bits(tokens_BNS, model_config.sub_bits).split(list(tile_counts)))


def split_sizes(num_tiles: int, batch_size: int | None) -> list[int]:
    """Return the number of tiles in each pass; None puts all tiles in one."""
    size = batch_size or num_tiles
    return [min(size, num_tiles - start) for start in range(0, num_tiles, size)]


def decode_sub_token(
    bitstreams: Sequence[GroupBitstream], tile_counts: Sequence[int], logits_BK: np.ndarray, sub_bits: int
) -> np.ndarray:
    """Decode a sub-token of every tile of several groups, int64 (B,), given the logits of all its nodes."""
    num_tiles = len(logits_BK)
    boundaries = np.cumsum([0, *tile_counts])
    value_B = np.zeros(num_tiles, np.int64)
    node_B = np.zeros(num_tiles, np.int64)
    for depth in range(sub_bits):
        node_logits_B = logits_BK[np.arange(num_tiles), node_B]
        bit_B = np.concatenate(
            [stream.next_bits(node_logits_B[boundaries[g] : boundaries[g + 1]]) for g, stream in enumerate(bitstreams)]
        )
        value_B |= bit_B << depth
        node_B = 2 * node_B + 1 + bit_B
    return value_B
