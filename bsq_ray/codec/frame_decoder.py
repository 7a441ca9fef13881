"""Decodes a region of the frames of a `.bsq` file.

    container ─which payloads?─▶ groups of tiles around the region, in passes of several groups of pictures (GOPs)
              ─decode─▶ tokens of these tiles
              ─compose─▶ pixels of the region, one frame after the other

Shape suffixes: G groups of pictures, R and C rows and columns of tiles, N tokens of a tile, L bits of a token,
C colors, T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from bsq_ray.codec.container import Container
from bsq_ray.codec.pixel_codec import PixelCodec
from bsq_ray.codec.plane_groups import decode_plane_groups
from bsq_ray.codec.rect import Rect
from bsq_ray.codec.tile_groups import decode_groups, max_groups_per_pass
from bsq_ray.codec.tiles import place_tiles
from bsq_ray.codec.timing import add_elapsed
from bsq_ray.models.prior import Prior
from bsq_ray.runtime.progress_callback import ProgressCallback


class FrameDecoder:
    """One decoding of one file.

    Args:
        container: the parsed file, whose models are known to match.
        frames: the frames to decode, in steps of 1.
        region: the pixels to decode.
        prior: None if the tokens are stored as raw bits.
        pixel_codec: the tokenizer.
        batch_size: tiles in one pass through a model; None chooses by the number of tokens.
        on_progress: called with groups done and their number for an image, frames done and their number for a clip.
            An exception raised by it stops the decoding.
        timings_s: the seconds of each part are added to it.
    """

    def __init__(
        self,
        container: Container,
        frames: range,
        region: Rect,
        prior: Prior | None,
        pixel_codec: PixelCodec,
        batch_size: int | None,
        on_progress: ProgressCallback,
        timings_s: dict[str, float],
    ) -> None:
        self._container, self._header = container, container.header
        self._frames, self._prior, self._pixel_codec = frames, prior, pixel_codec
        self._batch_size, self._on_progress, self._timings_s = batch_size, on_progress, timings_s
        all_tiles = Rect(0, 0, *self._header.tile_grid)
        self._tiles = region.cover(self._header.tile_size).grow(pixel_codec.context_tiles).intersect(all_tiles)
        self._groups = list(self._header.iter_groups(self._tiles))
        self._region = region.relative_to(self._tiles.scale(self._header.tile_size))
        self._num_frames_done = self._num_groups_done = 0

    def decode(self) -> Iterator[np.ndarray]:
        """Yield the frames, uint8 (H, W, 3).

        Raises:
            ValueError: the file is damaged.
        """
        for gops in self._passes():
            frame_ranges = [self._frames_of_gop(gop) for gop in gops]
            # With a causal tokenizer, frames do not depend on the tokens of later frames.
            is_causal = self._pixel_codec.tokenizer.config.causal
            # The checksums of planes extend over all frames.
            can_stop_early = is_causal and self._container.planes is None
            num_frames = max(r.stop for r in frame_ranges) if can_stop_early else self._header.gop_size
            bits_GRCNL, available_GRC = self._decode_tokens(gops, num_frames)
            for bits_RCNL, available_RC, frame_range in zip(bits_GRCNL, available_GRC, frame_ranges, strict=True):
                yield from self._compose(bits_RCNL, available_RC, num_frames, frame_range)

    def _passes(self) -> Iterator[range]:
        """Yield the groups of pictures to decode together."""
        gop_size = self._header.gop_size
        first_gop, last_gop = self._frames.start // gop_size, -(-self._frames.stop // gop_size)
        gops_per_pass = max(1, max_groups_per_pass(self._prior, self._header) // len(self._groups))
        for start in range(first_gop, last_gop, gops_per_pass):
            yield range(start, min(start + gops_per_pass, last_gop))

    def _frames_of_gop(self, gop: int) -> range:
        """Return the requested frames of a group of pictures, counted from its first frame."""
        first_frame, gop_size = gop * self._header.gop_size, self._header.gop_size
        return range(max(self._frames.start - first_frame, 0), min(self._frames.stop - first_frame, gop_size))

    def _decode_tokens(self, gops: range, num_frames: int) -> tuple[Tensor, Tensor]:
        """Return bits (G, R, C, N, L) of the first `num_frames` frames, and which tiles (G, R, C) are available."""
        header, groups = self._header, self._groups
        shape = len(gops), self._tiles.height, self._tiles.width
        bits_GRCNL = torch.zeros(
            *shape, num_frames * header.tokens_per_frame, self._container.num_bits, dtype=torch.bool
        )
        available_GRC = torch.zeros(shape, dtype=torch.bool)
        groups_to_decode = [
            (gop * header.groups_per_gop + number, tiles.height * tiles.width)
            for gop in gops
            for number, tiles in groups
        ]
        for index, bits_BNL in self._decode_groups(groups_to_decode, num_frames):
            self._num_groups_done += 1
            gop, (_, tiles) = index // len(groups), groups[index % len(groups)]
            group_RCNL = bits_BNL.unflatten(0, (tiles.height, tiles.width))
            place_tiles(bits_GRCNL[gop], available_GRC[gop], group_RCNL, tiles, self._tiles)
            self._report_progress()
        return bits_GRCNL, available_GRC

    def _decode_groups(self, groups: list[tuple[int, int]], num_frames: int) -> Iterator[tuple[int, Tensor]]:
        if self._container.planes is not None:
            return decode_plane_groups(
                self._prior, self._container, groups, self._batch_size, self._timings_s, self._report_progress
            )
        return decode_groups(
            self._prior,
            self._container,
            groups,
            num_frames,
            self._batch_size,
            self._timings_s,
            self._report_progress,
        )

    def _compose(
        self, bits_RCNL: Tensor, available_RC: Tensor, num_frames: int, frame_range: range
    ) -> Iterator[np.ndarray]:
        """Yield the requested frames of one group of pictures."""
        with add_elapsed(self._timings_s, "tokenizer"):
            pixels_CTHW = self._pixel_codec.decode_region(
                bits_RCNL, available_RC, num_frames, self._region, self._report_progress
            )
        for frame in frame_range:
            self._num_frames_done += 1
            self._report_progress()
            yield pixels_CTHW[:, frame].permute(1, 2, 0).contiguous().numpy()

    def _report_progress(self) -> None:
        if self._header.clip is None:
            self._on_progress(self._num_groups_done, len(self._groups))
        else:
            self._on_progress(self._num_frames_done, len(self._frames))
