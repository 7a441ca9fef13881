"""Attention to nearby tokens of an image of any size, with rotary positions.

A token attends to the tokens at most `radius` rows and columns away. Only differences of positions matter, so the same
weights apply to every size, and there are no borders inside an image. Large grids are computed in blocks:

    queries of a block ─▶ keys of the block and of the `radius` rows and columns around it, farther ones masked

Rotary position embedding (Su et al., 2021, section 3.2) in two dimensions: one half of a head's channels is rotated by
the row, the other by the column.

Shape suffixes: B images, H heads, N = r·c tokens of a grid of r rows and c columns, E width of a head, F = E / 4
frequencies, W blocks, Q queries and K keys of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bsq_ray.models.layers.attention import masked_attention

# Positions are small numbers of patches, so the longest wavelength is about 630 patches.
_ROTARY_BASE = 100.0
# Grids of at most this many tokens are computed in one block.
_MAX_DENSE_TOKENS = 256
_BLOCK = 8


class Neighborhood(NamedTuple):
    """Geometry of a grid. This is a tuple because torch.compile traces the tensors in tuples.

    Attributes:
        grid: rows and columns of tokens.
        radius: maximum distance in rows and in columns; None attends to every token.
        cos_NE, sin_NE: rotation of each channel of queries and keys.
        mask_WQK: True where a query attends to a key; W is 1 if all tokens are one block. None: no key is masked.
    """

    grid: tuple[int, int]
    radius: int | None
    cos_NE: Tensor
    sin_NE: Tensor
    mask_WQK: Tensor | None


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


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _build_neighborhood(
    grid: tuple[int, int], radius: int | None, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Neighborhood:
    rows, columns = grid
    row_N = torch.arange(rows).repeat_interleave(columns)
    column_N = torch.arange(columns).repeat(rows)
    frequency_F = _ROTARY_BASE ** (-torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    angle_NE = torch.cat([position_N[:, None] * frequency_F for position_N in (row_N, row_N, column_N, column_N)], 1)
    rotations = [values.to(device, dtype) for values in (angle_NE.cos(), angle_NE.sin())]
    mask_WQK = None if radius is None or max(grid) <= radius + 1 else _mask(grid, radius).to(device)
    return Neighborhood(grid, radius, rotations[0], rotations[1], mask_WQK)


def rotate(x_BHNE: Tensor, neighborhood: Neighborhood) -> Tensor:
    """Rotate queries or keys by their positions; the type is kept."""
    a, b, c, d = x_BHNE.chunk(4, -1)
    turned_BHNE = torch.cat([-b, a, -d, c], -1)
    rotated_BHNE = x_BHNE * neighborhood.cos_NE + turned_BHNE * neighborhood.sin_NE
    return rotated_BHNE.to(x_BHNE.dtype)


def local_attention(q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, neighborhood: Neighborhood) -> Tensor:
    """Attend from every token to its neighborhood; return (B, N, H, E)."""
    q_BHNE, k_BHNE = rotate(q_BHNE, neighborhood), rotate(k_BHNE, neighborhood)
    mask_WQK = neighborhood.mask_WQK
    if mask_WQK is None or len(mask_WQK) == 1:
        return masked_attention(q_BHNE, k_BHNE, v_BHNE, mask_WQK).transpose(1, 2)
    assert neighborhood.radius is not None
    grid, radius, batch_size = neighborhood.grid, neighborhood.radius, len(q_BHNE)
    queries, keys, values = _blocks(q_BHNE, grid, 0), _blocks(k_BHNE, grid, radius), _blocks(v_BHNE, grid, radius)
    masks = mask_WQK.unflatten(0, queries.shape[1:3])
    rows = []
    # One row of blocks at a time, because the margins of blocks overlap and are copied.
    for row, mask in enumerate(masks):
        q, k, v = (blocks[:, row].flatten(3, 4).flatten(0, 1) for blocks in (queries, keys, values))
        y = masked_attention(q, k, v, mask.repeat(batch_size, 1, 1)[:, None])
        y = y.unflatten(2, (_BLOCK, _BLOCK)).unflatten(0, (batch_size, -1))  # B block_columns H row column E
        rows.append(y.permute(0, 3, 1, 4, 2, 5).flatten(2, 3))
    return torch.cat(rows, 1)[:, : grid[0], : grid[1]].flatten(1, 2)


def _blocks(x_BHNE: Tensor, grid: tuple[int, int], margin: int) -> Tensor:
    """Return blocks with margins as a view, (B, block rows, block columns, H, side, side, E); zero outside the grid."""
    rows, columns = grid
    x = x_BHNE.unflatten(2, grid)
    x = F.pad(x, (0, 0, margin, margin + -columns % _BLOCK, margin, margin + -rows % _BLOCK))
    side = _BLOCK + 2 * margin
    return x.unfold(2, side, _BLOCK).unfold(3, side, _BLOCK).permute(0, 2, 3, 1, 5, 6, 4)


def _mask(grid: tuple[int, int], radius: int) -> Tensor:
    """Return the mask (W, Q, K): one block without margins for small grids, otherwise blocks with margins."""
    rows, columns = grid
    if rows * columns <= _MAX_DENSE_TOKENS:
        near_rows, near_columns = (_near(i, i, radius) for i in (torch.arange(rows), torch.arange(columns)))
        return (near_rows[:, None, :, None] & near_columns[:, None, :]).flatten(2).flatten(0, 1)[None]
    row_masks = _axis_masks(rows, radius)
    column_masks = _axis_masks(columns, radius)
    mask = row_masks[:, None, :, None, :, None] & column_masks[None, :, None, :, None, :]
    return mask.flatten(4, 5).flatten(2, 3).flatten(0, 1)


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
