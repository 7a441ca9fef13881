"""Images and clips of any size to tiles of the tokenizer's size, and back without seams.

Shape suffixes: R and C rows and columns of tiles, t frames, r and c rows and columns of tokens of the whole image, N
tokens of a tile (frames slowest), L bits, T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bsq_ray.codec.rect import Rect


def split_tiles(pixels_CTHW: Tensor, tile: int) -> Tensor:
    """Cut frames into tiles (R, C, 3, T, tile, tile); right and lower edges are replicated to fill the last tiles."""
    padded_CTHW = pad_to_tiles(pixels_CTHW, tile)
    return padded_CTHW.unfold(2, tile, tile).unfold(3, tile, tile).permute(2, 3, 0, 1, 4, 5)


def pad_to_tiles(pixels_CTHW: Tensor, tile: int) -> Tensor:
    """Replicate right and lower edges until height and width are multiples of `tile`."""
    _, _, height, width = pixels_CTHW.shape
    padding = 0, -width % tile, 0, -height % tile
    return F.pad(pixels_CTHW.float(), padding, mode="replicate").to(pixels_CTHW.dtype)


def as_grid(bits_RCNL: Tensor, frames: int) -> Tensor:
    """Rearrange tokens by tile to the token grid of the whole image (t, r, c, L)."""
    side = round((bits_RCNL.shape[2] // frames) ** 0.5)
    return bits_RCNL.unflatten(2, (frames, side, side)).permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)


def as_tiles(bits_trcL: Tensor, side: int) -> Tensor:
    """Invert `as_grid`: the token grid (t, r, c, L) to tokens by tile (R, C, N, L) of `side` rows and columns."""
    bits_tRrCcL = bits_trcL.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return bits_tRrCcL.permute(1, 3, 0, 2, 4, 5).flatten(2, 4)


def place_tiles(
    bits_RCNL: Tensor, available_RC: Tensor, group_RCNL: Tensor, group_tiles: Rect, all_tiles: Rect
) -> None:
    """Copy the tiles of a group into those of `all_tiles` and mark them as available; other tiles are ignored."""
    common = group_tiles.intersect(all_tiles)
    target = common.relative_to(all_tiles).slices()
    bits_RCNL[target] = group_RCNL[common.relative_to(group_tiles).slices()]
    available_RC[target] = True


def blend_tiles(bits_trcL: Tensor, side: int, patch: int, decode: Callable[[Tensor], Tensor]) -> Tensor:
    """Decode a token grid to fp64 pixels (3, t, r · patch, c · patch) without seams.

    Windows are decoded twice: at the positions of the tiles and shifted by half a tile. An edge of one set lies in the
    middle of the other. Near an edge the weights blend to the shifted windows, over one token on each side.

    Args:
        side: tokens of a tile in each direction.
        patch: pixels of a token in each direction.
        decode: function from tokens (n, N, L) of n windows to pixels (n, 3, t, side · patch, side · patch).
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
    """Return the weight of the windows shifted by `shift` tokens at each pixel along one axis.

    The weights of the unshifted and the shifted windows sum to 1.
    """
    pixel = torch.arange(tokens * patch, dtype=torch.float64) + 0.5
    length = side * patch
    seam = (pixel / length).round()
    to_seam = (pixel - seam * length).abs()
    # The edges of the image are not seams.
    is_border = (seam == 0) | (seam * side >= tokens)
    fraction = (to_seam / patch).clamp(max=1.0)
    unshifted_weight = torch.where(is_border, torch.ones_like(fraction), 0.5 - 0.5 * torch.cos(torch.pi * fraction))
    return 1 - unshifted_weight if shift else unshifted_weight
