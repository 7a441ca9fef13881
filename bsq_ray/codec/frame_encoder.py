"""Encode frames into the groups of a `.bsq` file.

    pixels ─split─▶ tiles ─Tokenizer.encode─▶ tokens ─prior and range coder, group by group─▶ payloads ─▶ file

A group is a rectangle of tiles in one group of pictures (GOP). A GOP is a number of consecutive frames.

Shape suffixes: B tiles of a group, R and C rows and columns of tiles, N tokens of a tile, L bits of a token,
T frames, H and W pixels, and in arrays of pixels C colors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bsq_ray.codec.container import write_container
from bsq_ray.codec.header import Header, TokenFormat
from bsq_ray.codec.pixel_codec import PixelCodec
from bsq_ray.codec.plane_groups import BitRange
from bsq_ray.codec.plane_index import EncodedPlane, plane_ranges, write_planes
from bsq_ray.codec.rect import Rect
from bsq_ray.codec.tile_groups import EncodedGroup
from bsq_ray.codec.timing import add_elapsed
from bsq_ray.runtime.progress_callback import ProgressCallback

EncodedT = TypeVar("EncodedT")


@dataclass(frozen=True)
class CompressedFile:
    """A compressed file and its statistics.

    Attributes:
        data: content of the file.
        bits_per_pixel: size of the file in bits divided by the number of pixels of all frames.
        raw_bits: number of token bits before entropy coding.
        cross_entropy_bits: cross entropy of the tokens under the prior in bits; 0 without a prior.
        side_info_bits: number of bits of side information; 0 without a prior.
        timings_s: seconds spent in "tokenizer", "prior" and "coder".
        num_frames: number of frames; 1 for an image.
        num_bits: number of bits per token in the file.
    """

    data: bytes
    bits_per_pixel: float
    raw_bits: int
    cross_entropy_bits: float
    side_info_bits: int
    timings_s: dict[str, float]
    num_frames: int = 1
    num_bits: int = 0


class FrameEncoder:
    """Encodes groups of pictures.

    Args:
        pixel_codec: runs the tokenizer.
    """

    def __init__(self, pixel_codec: PixelCodec) -> None:
        self._pixel_codec = pixel_codec

    def encode_gop(
        self,
        header: Header,
        pixels_THWC: np.ndarray,
        encode: Callable[[Tensor], EncodedT],
        timings_s: dict[str, float],
        on_progress: ProgressCallback,
    ) -> list[EncodedT]:
        """Encode one group of pictures.

        Args:
            header: header of the file.
            pixels_THWC: uint8, T = header.gop_size.
            encode: encodes the tokens (B, N, L) of a group.
            timings_s: elapsed seconds are added to its entries.
            on_progress: called with the finished and the total number of groups; an exception raised by it cancels.

        Returns:
            The results of `encode`, in the order of the file.
        """
        num_groups = header.groups_per_gop
        groups: list[EncodedT] = []
        rows, columns = header.tile_grid
        pixels_CTHW = torch.from_numpy(pixels_THWC).permute(3, 0, 1, 2)
        # Encoding a few rows of groups at a time limits the memory for tiles and tokens.
        strip_rows = header.group_size * self._pixel_codec.rows_of_groups(columns, header.group_size)
        for top in range(0, rows, strip_rows):
            strip = Rect(top, 0, min(top + strip_rows, rows), columns)
            with add_elapsed(timings_s, "tokenizer"):
                bits_RCNL = self._pixel_codec.encode_tiles(
                    pixels_CTHW, strip, lambda: on_progress(len(groups), num_groups)
                )
            for _, group_tiles in header.iter_groups(strip):
                groups.append(encode(bits_RCNL[group_tiles.relative_to(strip).slices()].flatten(0, 1)))
                on_progress(len(groups), num_groups)
        return groups


def build_file(
    header: Header, token_format: TokenFormat, groups: Sequence[EncodedGroup], timings_s: dict[str, float]
) -> CompressedFile:
    """Assemble a file from all groups, in the order of the file."""
    payloads, bits_crcs = [group.payload for group in groups], [group.bits_crcs for group in groups]
    data = write_container(header, token_format, payloads, bits_crcs)
    return _with_statistics(data, header, header.bits, groups, timings_s)


def build_plane_file(
    header: Header,
    token_format: TokenFormat,
    groups: Sequence[Mapping[BitRange, EncodedPlane]],
    plane_bits: tuple[int, ...],
    timings_s: dict[str, float],
) -> CompressedFile:
    """Assemble a file with planes from all groups, in the order of the file."""
    header = replace(header, plane_bits=plane_bits)
    planes_PG = [[group[plane] for group in groups] for plane in plane_ranges(plane_bits)]
    data = write_planes(header, token_format, planes_PG)
    all_planes = [plane for planes_G in planes_PG for plane in planes_G]
    return _with_statistics(data, header, sum(plane_bits), all_planes, timings_s)


def _with_statistics(
    data: bytes,
    header: Header,
    num_bits: int,
    parts: Sequence[EncodedGroup | EncodedPlane],
    timings_s: dict[str, float],
) -> CompressedFile:
    rows, columns = header.tile_grid
    return CompressedFile(
        data,
        bits_per_pixel=8 * len(data) / (header.width * header.height * header.num_frames),
        raw_bits=rows * columns * header.tokens_per_tile * num_bits * header.num_gops,
        cross_entropy_bits=sum(part.cross_entropy_bits for part in parts),
        side_info_bits=sum(part.side_info_bits for part in parts),
        timings_s=timings_s,
        num_frames=header.num_frames,
        num_bits=num_bits,
    )


def iter_gops(frames: Iterable[np.ndarray], gop_size: int) -> Iterator[np.ndarray]:
    """Yield groups of pictures (T, H, W, 3): `gop_size` consecutive frames each; the last may be shorter.

    Raises:
        ValueError: a frame is not uint8 (H, W, 3), or the sizes of frames differ within a group of pictures.
    """
    gop_frames: list[np.ndarray] = []
    for frame in frames:
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"frames must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
        if gop_frames and frame.shape != gop_frames[0].shape:
            raise ValueError("the frames of a clip must have the same size")
        gop_frames.append(frame)
        if len(gop_frames) == gop_size:
            yield np.stack(gop_frames)
            gop_frames = []
    if gop_frames:
        yield np.stack(gop_frames)
