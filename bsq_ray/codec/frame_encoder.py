"""Encodes frames to the groups of a `.bsq` file.

    pixels ─cut─▶ tiles ─Tokenizer.encode─▶ tokens ─prior and range coder, group by group─▶ payloads ─▶ file

Shape suffixes: B tiles of a group, R and C rows and columns of tiles, N tokens of a tile, L bits of a token,
T frames, H and W pixels, C colors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from bsq_ray.codec.container import Header, write_container
from bsq_ray.codec.pixel_codec import PixelCodec
from bsq_ray.codec.tile_groups import EncodedGroup, encode_group
from bsq_ray.codec.tiles import split_tiles
from bsq_ray.codec.timing import add_elapsed
from bsq_ray.models.prior import Prior
from bsq_ray.runtime.progress_callback import ProgressCallback


@dataclass(frozen=True)
class CompressedFile:
    """A compressed file and its statistics.

    Attributes:
        data: bytes of the file.
        bits_per_pixel: bits of the file divided by the pixels of all frames.
        raw_bits: bits of the tokens before entropy coding.
        cross_entropy_bits: cross entropy of the tokens under the prior; 0 without a prior.
        side_info_bits: bits of the side information; 0 without a prior.
        timings_s: seconds spent in "tokenizer", "prior" and "coder".
        num_frames: number of frames; 1 for an image.
    """

    data: bytes
    bits_per_pixel: float
    raw_bits: int
    cross_entropy_bits: float
    side_info_bits: int
    timings_s: dict[str, float]
    num_frames: int = 1


class FrameEncoder:
    """Encodes groups of pictures.

    Args:
        prior: None to store the tokens as raw bits.
        pixel_codec: the tokenizer.
        batch_size: tiles in one pass through a model; None chooses by the number of tokens.
    """

    def __init__(self, prior: Prior | None, pixel_codec: PixelCodec, batch_size: int | None) -> None:
        self._prior, self._pixel_codec, self._batch_size = prior, pixel_codec, batch_size

    def encode_gop(
        self,
        header: Header,
        gop_index: int,
        pixels_THWC: np.ndarray,
        timings_s: dict[str, float],
        on_progress: ProgressCallback,
    ) -> list[EncodedGroup]:
        """Encode one group of pictures."""
        with add_elapsed(timings_s, "tokenizer"):
            tiles = split_tiles(torch.from_numpy(pixels_THWC).permute(3, 0, 1, 2), header.tile_size)
            bits_BNL = self._pixel_codec.encode(tiles.flatten(0, 1), lambda: on_progress(0, header.groups_per_gop))
            bits_RCNL = bits_BNL.unflatten(0, tiles.shape[:2])
        groups = []
        for group_in_gop, group_tiles in header.iter_groups():
            group_BNL = bits_RCNL[group_tiles.slices()].flatten(0, 1)
            group_index = gop_index * header.groups_per_gop + group_in_gop
            groups.append(
                encode_group(
                    self._prior, group_index, group_BNL, header.gop_size, header.tolerance, self._batch_size, timings_s
                )
            )
            on_progress(group_in_gop + 1, header.groups_per_gop)
        return groups


def build_file(header: Header, groups: list[EncodedGroup], timings_s: dict[str, float]) -> CompressedFile:
    """Assemble a file from all groups."""
    data = write_container(header, [group.payload for group in groups], [group.token_crcs for group in groups])
    rows, columns = header.tile_grid
    return CompressedFile(
        data,
        8 * len(data) / (header.width * header.height * header.num_frames),
        rows * columns * header.tokens_per_frame * header.bits * header.gop_size * header.num_gops,
        sum(group.cross_entropy_bits for group in groups),
        sum(group.side_info_bits for group in groups),
        timings_s,
        header.num_frames,
    )


def iter_gops(frames: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Stack consecutive frames to (T, H, W, 3) with T = size; the last stack may be shorter.

    Raises:
        ValueError: a frame is not uint8 (H, W, 3), or the sizes differ within a stack.
    """
    gop_frames: list[np.ndarray] = []
    for frame in frames:
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"frames must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
        if gop_frames and frame.shape != gop_frames[0].shape:
            raise ValueError("the frames of a clip must all have one size")
        gop_frames.append(frame)
        if len(gop_frames) == size:
            yield np.stack(gop_frames)
            gop_frames = []
    if gop_frames:
        yield np.stack(gop_frames)
