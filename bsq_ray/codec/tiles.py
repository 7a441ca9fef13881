"""Images and clips of any size as tiles of the size the tokenizer takes, and back without seams.

Shape suffixes: R and C rows and columns of tiles, t frames, r and c rows and columns of tokens of the whole picture, N
tokens of a tile (frames slowest), L bits, T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def split_tiles(pixels_CTHW: Tensor, tile: int) -> Tensor:
    """Tiles (R, C, 3, T, tile, tile) of frames whose right and lower edges are repeated to fill the last ones."""
    _, _, height, width = pixels_CTHW.shape
    padded = F.pad(pixels_CTHW.float(), (0, -width % tile, 0, -height % tile), mode="replicate").to(pixels_CTHW.dtype)
    return padded.unfold(2, tile, tile).unfold(3, tile, tile).permute(2, 3, 0, 1, 4, 5)


def as_grid(bits_RCNL: Tensor, frames: int) -> Tensor:
    """Tokens by tile to tokens by place in the whole picture (t, r, c, L)."""
    side = round((bits_RCNL.shape[2] // frames) ** 0.5)
    return bits_RCNL.unflatten(2, (frames, side, side)).permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)


def place_tiles(
    bits_RCNL: Tensor,
    available_RC: Tensor,
    group_RCNL: Tensor,
    group_ranges: tuple[range, range],
    rows: range,
    columns: range,
) -> None:
    """Copies what a group has in common with the tiles that are wanted."""
    common_rows = range(max(group_ranges[0].start, rows.start), min(group_ranges[0].stop, rows.stop))
    common_columns = range(max(group_ranges[1].start, columns.start), min(group_ranges[1].stop, columns.stop))
    target = _relative_slice(common_rows, rows), _relative_slice(common_columns, columns)
    bits_RCNL[target] = group_RCNL[
        _relative_slice(common_rows, group_ranges[0]), _relative_slice(common_columns, group_ranges[1])
    ]
    available_RC[target] = True


def _relative_slice(inner: range, outer: range) -> slice:
    return slice(inner.start - outer.start, inner.stop - outer.start)


def blend_tiles(bits_trcL: Tensor, side: int, patch: int, decode: Callable[[Tensor], Tensor]) -> Tensor:
    """Pixels (3, t, r · patch, c · patch), fp64, of a grid of tokens, without seams.

    Windows of the grid are decoded tile by tile and again shifted by half a tile, so that where one has its edge the
    other has its middle. Near an edge the shifted one takes over, smoothly over a token on each side.

    Args:
        side: tokens of a tile in each direction.
        decode: tokens (n, N, L) of n windows to pixels (n, 3, t, side · patch, side · patch).
    """
    frames, rows, columns, _ = bits_trcL.shape
    result = torch.zeros(3, frames, rows * patch, columns * patch, dtype=torch.float64)
    half = side // 2
    for shift_rows in (0, half) if rows > side else (0,):
        for shift_columns in (0, half) if columns > side else (0,):
            window_rows, window_columns = (rows - shift_rows) // side * side, (columns - shift_columns) // side * side
            part_trcL = bits_trcL[
                :, shift_rows : shift_rows + window_rows, shift_columns : shift_columns + window_columns
            ]
            windows = part_trcL.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # t R side C side L
            pixels = decode(windows.permute(1, 3, 0, 2, 4, 5).flatten(0, 1).flatten(1, 3))
            pixels = pixels.unflatten(0, (window_rows // side, window_columns // side)).permute(2, 3, 0, 4, 1, 5)
            weight_H1 = _blend_weight(rows, side, patch, shift_rows)[:, None]
            weight_HW = weight_H1 * _blend_weight(columns, side, patch, shift_columns)
            target = (
                slice(shift_rows * patch, (shift_rows + window_rows) * patch),
                slice(shift_columns * patch, (shift_columns + window_columns) * patch),
            )
            result[:, :, target[0], target[1]] += pixels.flatten(4, 5).flatten(2, 3) * weight_HW[target]
    return result


def _blend_weight(tokens: int, side: int, patch: int, shift: int) -> Tensor:
    """Share of the windows shifted by `shift` tokens at each pixel along one direction; both shares add up to 1."""
    pixel = torch.arange(tokens * patch, dtype=torch.float64) + 0.5
    length = side * patch
    seam = (pixel / length).round()
    to_seam = (pixel - seam * length).abs()
    # The picture's own edges are no seams.
    is_border = (seam == 0) | (seam * side >= tokens)
    fraction = (to_seam / patch).clamp(max=1.0)
    unshifted_weight = torch.where(is_border, torch.ones_like(fraction), 0.5 - 0.5 * torch.cos(torch.pi * fraction))
    return 1 - unshifted_weight if shift else unshifted_weight
