"""Entropy decoding of planes with a prior in the order "plane".

    plane 1: sub-tokens of all tokens, one after the other ─▶ plane 2 ─▶ … with cached keys and values of all of them

Nodes are visited in the order plane, sub-token, token, depth, tile. A plane of a group is the output of one range
coder, as in `bitstream.py`. Decoding takes one step of the prior for each sub-token, and ends after the last plane of
the file.

Shape suffixes: B tiles, N tokens, S sub-tokens of a token, K nodes of a tree, L bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bsq_ray.codec.bitstream import GroupBitstream
from bsq_ray.codec.entropy_coding import decode_sub_token, deterministic_fp32, split_sizes
from bsq_ray.codec.plane_index import plane_ranges
from bsq_ray.codec.timing import add_elapsed
from bsq_ray.models.prior import Prior
from bsq_ray.models.quantizers.bits import integers_to_bits


def decode_planes(
    prior: Prior,
    payloads_PG: Sequence[Sequence[bytes]],
    plane_bits: Sequence[int],
    tile_counts: Sequence[int],
    num_tokens: int,
    batch_size: int | None,
    timings_s: dict[str, float],
    check_cancelled: Callable[[], None],
) -> list[Tensor]:
    """Decode planes of several groups together; return the bits (B, N, L) of each group.

    Invalid bytes may decode to arbitrary tokens, so callers compare a checksum.

    Args:
        payloads_PG: bytes by plane and group.
        plane_bits: bits of a token in each plane, multiples of a sub-token's bits.
        tile_counts: number of tiles of each group.
        num_tokens: tokens of a tile (N), all of which are in the payloads.
        batch_size: tiles in one pass through the prior.
        timings_s: the seconds of "prior" and "coder" are added to it.
        check_cancelled: called before each sub-token; an exception raised by it stops the decoding.

    Raises:
        ValueError: the bytes cannot belong to such planes.
    """
    sub_bits, device, num_tiles = prior.config.sub_bits, prior.start.device, sum(tile_counts)
    batch_sizes = split_sizes(num_tiles, batch_size)
    tokens_BNS = torch.zeros(num_tiles, num_tokens, sum(plane_bits) // sub_bits, dtype=torch.long)
    with deterministic_fp32(device):
        decoders = [prior.start_plane_decoding(size, num_tokens) for size in batch_sizes]
        for payloads_G, (start, stop) in zip(payloads_PG, plane_ranges(plane_bits), strict=True):
            bitstreams = [
                GroupBitstream(data, count, count * num_tokens * (stop - start))
                for data, count in zip(payloads_G, tile_counts, strict=True)
            ]
            for s in range(start // sub_bits, stop // sub_bits):
                for n in range(num_tokens):
                    check_cancelled()
                    with add_elapsed(timings_s, "prior"):
                        earlier = tokens_BNS[:, n : n + 1, :s].to(device).split(batch_sizes)
                        parts = [
                            prior.node_logits(decoder.next_features(earlier_B1s), earlier_B1s)
                            for decoder, earlier_B1s in zip(decoders, earlier, strict=True)
                        ]
                        logits_BK = torch.cat(parts)[:, 0].double().cpu().numpy()
                    with add_elapsed(timings_s, "coder"):
                        value_B = torch.from_numpy(decode_sub_token(bitstreams, tile_counts, logits_BK, sub_bits))
                    tokens_BNS[:, n, s] = value_B
                    for decoder, part_B in zip(decoders, value_B.to(device).split(batch_sizes), strict=True):
                        decoder.push(part_B)
    return list(integers_to_bits(tokens_BNS, sub_bits).split(list(tile_counts)))
