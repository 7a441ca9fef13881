"""Attention to nearby tokens of an image of any size, with rotary positions.

A token attends to the tokens at most `radius` rows and columns away. Only differences of positions matter, so the same
weights apply to every size, and there are no borders inside an image. Large grids are computed in blocks:

    queries of a block ─▶ keys of the block and of the `radius` rows and columns around it, farther ones masked

Rotary position embedding (Su et al., 2021, section 3.2) in two dimensions: one half of a head's channels is rotated by
the row, the other by the column.

Shape suffixes: B images, H heads, N = r·c tokens of a grid of r rows and c columns, E width of a head, F = E / 4
frequencies, W blocks of a row, Q queries and K keys of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bsq_ray.models.layers.attention import attention, masked_attention

# Positions are small numbers of patches, so the longest wavelength is about 630 patches.
_ROTARY_BASE = 100.0
# Grids of at most this many tokens are computed in one block: 16 x 16, and as many in other proportions.
_MAX_DENSE_TOKENS = 272
_BLOCK = 8


class Neighborhood(NamedTuple):
    """Geometry of a grid, in tables of one axis. This is a tuple because torch.compile traces the tensors in tuples.

    Attributes:
        grid: rows and columns of tokens.
        radius: maximum distance in rows and in columns; None attends to every token.
        row_rotation, column_rotation: cosines and sines, (2, rows, E / 2) and (2, columns, E / 2).
        row_masks, column_masks: for each block along an axis, which positions attend to which; (1, rows, rows) and (1,
            columns, columns) if all tokens are one block. None: no pair is masked.
    """

    grid: tuple[int, int]
    radius: int | None
    row_rotation: Tensor
    column_rotation: Tensor
    row_masks: Tensor | None
    column_masks: Tensor | None


@dataclass(frozen=True)
class RotaryPositions:
    """Rotary positions in grids of any size.

    Attributes:
        radius: a token attends to the tokens at most this many rows and columns away; None attends to every token.
        period: learned position embeddings repeat every so many rows and columns. They let the tokens of a neighborhood
            describe different parts of it.
    """

    radius: int | None
    period: int

    def neighborhood(
        self, grid: tuple[int, int], head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> Neighborhood:
        """Return the geometry of a grid; `dtype` is that of the rotations."""
        return _build_neighborhood(grid, self.radius, head_dim, device, dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _build_neighborhood(
    grid: tuple[int, int], radius: int | None, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Neighborhood:
    frequency_F = _ROTARY_BASE ** (-torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    rotations = [_rotation(length, frequency_F).to(device, dtype) for length in grid]
    if radius is None or max(grid) <= radius + 1:
        return Neighborhood(grid, radius, rotations[0], rotations[1], None, None)
    is_one_block = grid[0] * grid[1] <= _MAX_DENSE_TOKENS
    masks = [(_dense_mask if is_one_block else _axis_masks)(length, radius).to(device) for length in grid]
    return Neighborhood(grid, radius, rotations[0], rotations[1], masks[0], masks[1])


def _rotation(length: int, frequency_F: Tensor) -> Tensor:
    angle_NF = torch.arange(length)[:, None] * frequency_F
    angle_NE2 = torch.cat([angle_NF, angle_NF], 1)
    return torch.stack([angle_NE2.cos(), angle_NE2.sin()])


def rotate(x_BHNE: Tensor, neighborhood: Neighborhood) -> Tensor:
    """Rotate queries or keys by their positions, one half by the row and one by the column; the type is kept."""
    by_row, by_column = x_BHNE.unflatten(2, neighborhood.grid).chunk(2, -1)  # B H rows columns E/2
    cos, sin = neighborhood.row_rotation[:, :, None]
    rotated = [by_row * cos + _quarter_turn(by_row) * sin]
    cos, sin = neighborhood.column_rotation
    rotated.append(by_column * cos + _quarter_turn(by_column) * sin)
    return torch.cat(rotated, -1).flatten(2, 3).to(x_BHNE.dtype)


def _quarter_turn(x: Tensor) -> Tensor:
    real, imaginary = x.chunk(2, -1)
    return torch.cat([-imaginary, real], -1)


def local_attention(q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, neighborhood: Neighborhood) -> Tensor:
    """Attend from every token to its neighborhood; return (B, N, H, E)."""
    q_BHNE, k_BHNE = rotate(q_BHNE, neighborhood), rotate(k_BHNE, neighborhood)
    row_masks, column_masks = neighborhood.row_masks, neighborhood.column_masks
    if row_masks is None or column_masks is None:
        return attention(q_BHNE, k_BHNE, v_BHNE).transpose(1, 2)
    if neighborhood.grid[0] * neighborhood.grid[1] <= _MAX_DENSE_TOKENS:
        mask_NN = _pair_masks(row_masks[0], column_masks)[0]
        return masked_attention(q_BHNE, k_BHNE, v_BHNE, mask_NN).transpose(1, 2)
    assert neighborhood.radius is not None
    grid, radius, batch_size = neighborhood.grid, neighborhood.radius, len(q_BHNE)
    queries, keys, values = _blocks(q_BHNE, grid, 0), _blocks(k_BHNE, grid, radius), _blocks(v_BHNE, grid, radius)
    rows = []
    # One row of blocks at a time, because the margins of blocks overlap and are copied.
    for row, row_mask in enumerate(row_masks):
        q, k, v = (blocks[:, row].flatten(3, 4).flatten(0, 1) for blocks in (queries, keys, values))
        mask_WQK = _pair_masks(row_mask, column_masks)
        y = masked_attention(q, k, v, mask_WQK.repeat(batch_size, 1, 1)[:, None])
        y = y.unflatten(2, (_BLOCK, _BLOCK)).unflatten(0, (batch_size, -1))  # B block_columns H row column E
        rows.append(y.permute(0, 3, 1, 4, 2, 5).flatten(2, 3))
    return torch.cat(rows, 1)[:, : grid[0], : grid[1]].flatten(1, 2)


def _pair_masks(row_mask: Tensor, column_masks: Tensor) -> Tensor:
    """Return the masks (W, Q, K) of the blocks in a row of blocks: pairs near in both directions."""
    mask = row_mask[:, None, :, None] & column_masks[:, None, :, None, :]  # W row column row column
    return mask.flatten(3, 4).flatten(1, 2)


def _blocks(x_BHNE: Tensor, grid: tuple[int, int], margin: int) -> Tensor:
    """Return blocks with margins as a view, (B, block rows, block columns, H, side, side, E); zero outside the grid."""
    rows, columns = grid
    x = x_BHNE.unflatten(2, grid)
    x = F.pad(x, (0, 0, margin, margin + -columns % _BLOCK, margin, margin + -rows % _BLOCK))
    side = _BLOCK + 2 * margin
    return x.unfold(2, side, _BLOCK).unfold(3, side, _BLOCK).permute(0, 2, 3, 1, 5, 6, 4)


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
