"""Attention to nearby tokens of frames of any size, with rotary positions.

A token attends to the tokens at most `radius` rows and columns away. Only differences of positions matter, so the same
weights apply to every size, and there are no borders inside an image. Large grids are computed in blocks:

    queries of a block ─▶ keys of the block and of the `radius` rows and columns around it, farther ones masked

In clips the keys are those of several frames, at the same places.

Rotary position embedding (Su et al., 2021, section 3.2) in two dimensions: one half of a head's channels is rotated by
the row, the other by the column. In clips the slower half of the frequencies of each is rotated by the frame, too; the
first frame is rotated as an image, so an image model initializes a video model.

Shape suffixes: B images or clips, H heads, T frames, r rows and c columns of the grid of a frame, N = T·r·c tokens of
queries, M tokens of keys (frames slowest), E width of a head, F = E / 4 frequencies, W blocks of a row, Q queries and K
keys of a block in one frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bsq_ray.models.layers.attention import span_attention

# Positions are small numbers of patches, so the longest wavelength is about 630 patches.
_ROTARY_BASE = 100.0
# Grids of at most this many tokens are computed in one block: 16 x 16, and as many in other proportions.
_MAX_DENSE_TOKENS = 272
_BLOCK = 8


class Neighborhood(NamedTuple):
    """Geometry of frames, in tables of one axis. This is a tuple because torch.compile traces the tensors in tuples.

    Attributes:
        grid: rows and columns of tokens of a frame.
        radius: maximum distance in rows and in columns; None attends to every token.
        row_rotation, column_rotation: cosines and sines, (2, T, rows, E / 2) and (2, T, columns, E / 2).
        row_masks, column_masks: for each block along an axis, which positions attend to which; (1, rows, rows) and (1,
            columns, columns) if all tokens are one block. None: no pair is masked.
    """

    grid: tuple[int, int]
    radius: int | None
    row_rotation: Tensor
    column_rotation: Tensor
    row_masks: Tensor | None
    column_masks: Tensor | None

    @property
    def is_dense(self) -> bool:
        """True if the tokens of a frame are one block."""
        return self.grid[0] * self.grid[1] <= _MAX_DENSE_TOKENS


@dataclass(frozen=True)
class RotaryPositions:
    """Rotary positions in frames of any size.

    Attributes:
        radius: a token attends to the tokens at most this many rows and columns away; None attends to every token.
        period: learned position embeddings repeat every so many rows and columns. They let the tokens of a neighborhood
            describe different parts of it.
        frames: maximum number of frames; 1 for images.
    """

    radius: int | None
    period: int
    frames: int = 1

    def neighborhood(
        self, grid: tuple[int, int], frames: range, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> Neighborhood:
        """Return the geometry of consecutive frames; `dtype` is that of the rotations."""
        whole = _build_neighborhood(grid, self.frames, self.radius, head_dim, device, dtype)
        selected = slice(frames.start, frames.stop)
        return whole._replace(
            row_rotation=whole.row_rotation[:, selected], column_rotation=whole.column_rotation[:, selected]
        )


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _build_neighborhood(
    grid: tuple[int, int],
    frames: int,
    radius: int | None,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Neighborhood:
    num_frequencies = head_dim // 4
    frequency_F = _frequencies(num_frequencies)
    # The slower frequencies turn by the frame, too. Rows and columns have every other frequency of time.
    num_of_time = (num_frequencies + 1) // 2
    of_rows, of_columns = _frequencies(2 * num_of_time).unflatten(0, (num_of_time, 2)).unbind(1)
    rotations = [
        _rotation(frames, F.pad(of_time, (num_frequencies - num_of_time, 0)), length, frequency_F).to(device, dtype)
        for length, of_time in zip(grid, (of_rows, of_columns), strict=True)
    ]
    if radius is None or max(grid) <= radius + 1:
        return Neighborhood(grid, radius, rotations[0], rotations[1], None, None)
    unmasked = Neighborhood(grid, radius, rotations[0], rotations[1], None, None)
    masks = [(_dense_mask if unmasked.is_dense else _axis_masks)(length, radius).to(device) for length in grid]
    return unmasked._replace(row_masks=masks[0], column_masks=masks[1])


def _frequencies(count: int) -> Tensor:
    return _ROTARY_BASE ** (-torch.arange(count, dtype=torch.float64) / count)


def _rotation(frames: int, of_time_F: Tensor, length: int, frequency_F: Tensor) -> Tensor:
    """Return cosines and sines, (2, T, length, E / 2), of the positions along one axis in each frame."""
    angle_TNF = torch.arange(frames)[:, None, None] * of_time_F + torch.arange(length)[:, None] * frequency_F
    angle = torch.cat([angle_TNF, angle_TNF], -1)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x_BHNE: Tensor, neighborhood: Neighborhood) -> Tensor:
    """Rotate queries or keys by their positions, one half by the row and one by the column; the type is kept."""
    by_row, by_column = x_BHNE.unflatten(2, (-1, *neighborhood.grid)).chunk(2, -1)  # B H T rows columns E/2
    cos, sin = neighborhood.row_rotation[:, :, :, None]
    rotated = [by_row * cos + _quarter_turn(by_row) * sin]
    cos, sin = neighborhood.column_rotation[:, :, None]
    rotated.append(by_column * cos + _quarter_turn(by_column) * sin)
    return torch.cat(rotated, -1).flatten(2, 4).to(x_BHNE.dtype)


def _quarter_turn(x: Tensor) -> Tensor:
    real, imaginary = x.chunk(2, -1)
    return torch.cat([-imaginary, real], -1)


def local_attention(q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, span: int, neighborhood: Neighborhood) -> Tensor:
    """Attend from every token to its neighborhood in the frames that it can see; return (B, N, H, E).

    Args:
        q_BHNE, k_BHME: rotated queries and keys of whole frames.
        span: tokens of a frame, which sees itself and earlier ones; N if every frame sees all.
    """
    row_masks, column_masks = neighborhood.row_masks, neighborhood.column_masks
    if row_masks is None or column_masks is None or neighborhood.is_dense:
        # A view would keep the memory of the whole projection for the backward pass.
        v_BHME = v_BHME.contiguous()
    if row_masks is None or column_masks is None:
        return span_attention(q_BHNE, k_BHME, v_BHME, (span, span))
    grid, batch_size = neighborhood.grid, len(q_BHNE)
    span_frames = span // (grid[0] * grid[1])
    if neighborhood.is_dense:
        mask_NM = _pair_masks(row_masks[0], column_masks)[0].repeat(span_frames, span_frames)
        return span_attention(q_BHNE, k_BHME, v_BHME, (span, span), mask_NM)
    assert neighborhood.radius is not None
    radius = neighborhood.radius
    queries, keys, values = _blocks(q_BHNE, grid, 0), _blocks(k_BHME, grid, radius), _blocks(v_BHME, grid, radius)
    spans = span_frames * _BLOCK**2, span_frames * (_BLOCK + 2 * radius) ** 2
    rows = []
    # One row of blocks at a time, because the margins of blocks overlap and are copied, once for all frames.
    for row, row_mask in enumerate(row_masks):
        # Images are additional heads, so that the masks of a block hold for all of them.
        q, k, v = (blocks[row].flatten(3, 5).flatten(1, 2) for blocks in (queries, keys, values))
        mask_WQK = _pair_masks(row_mask, column_masks).repeat(1, span_frames, span_frames)
        y = span_attention(q, k, v, spans, mask_WQK[:, None])
        y = y.unflatten(2, (batch_size, -1)).unflatten(1, (-1, _BLOCK, _BLOCK))  # W T row column B H E
        rows.append(y.permute(4, 1, 2, 0, 3, 5, 6).flatten(3, 4))
    return torch.cat(rows, 2)[:, :, : grid[0], : grid[1]].flatten(1, 3)


def _pair_masks(row_mask: Tensor, column_masks: Tensor) -> Tensor:
    """Return the masks (W, Q, K) of the blocks in a row of blocks: pairs near in both directions."""
    mask = row_mask[:, None, :, None] & column_masks[:, None, :, None, :]  # W row column row column
    return mask.flatten(3, 4).flatten(1, 2)


def _blocks(x_BHNE: Tensor, grid: tuple[int, int], margin: int) -> Tensor:
    """Return blocks with margins as a view, zero outside the grid.

    The dimensions are block rows, block columns, B, H, T, side, side, E.
    """
    rows, columns = grid
    x = x_BHNE.unflatten(2, (-1, *grid))
    x = F.pad(x, (0, 0, margin, margin + -columns % _BLOCK, margin, margin + -rows % _BLOCK))
    side = _BLOCK + 2 * margin
    return x.unfold(3, side, _BLOCK).unfold(4, side, _BLOCK).permute(3, 4, 0, 1, 2, 6, 7, 5)


def _dense_mask(length: int, radius: int) -> Tensor:
    position = torch.arange(length)
    return _near(position, position, radius)[None]


def _axis_masks(length: int, radius: int) -> Tensor:
    """Return for each block along an axis which positions (block, block + 2 radius) attend to which."""
    masks = []
    for start in range(0, length, _BLOCK):
        queries, keys = torch.arange(start, start + _BLOCK), torch.arange(start - radius, start + _BLOCK + radius)
        exists = (keys >= 0) & (keys < length)
        # Queries outside the grid are discarded later; without any key their softmax would not be finite.
        masks.append((_near(queries, keys, radius) & exists) | (queries >= length)[:, None])
    return torch.stack(masks)


def _near(queries: Tensor, keys: Tensor, radius: int) -> Tensor:
    return (queries[:, None] - keys).abs() <= radius
