"""Images of any size as tiles of the size the tokenizer takes, and back without seams.

Shape suffixes: R and C rows and columns of tiles, r and c rows and columns of tokens of the whole image, L bits, H and
W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cut(image_CHW: Tensor, tile: int) -> Tensor:
    """Tiles (R, C, 3, tile, tile) of an image whose right and lower edges are repeated to fill the last ones."""
    _, height, width = image_CHW.shape
    padded = image_CHW[None].float()
    padded = F.pad(padded, (0, -width % tile, 0, -height % tile), mode="replicate")[0].to(image_CHW.dtype)
    return padded.unfold(1, tile, tile).unfold(2, tile, tile).permute(1, 2, 0, 3, 4)


def as_grid(bits_RCNL: Tensor) -> Tensor:
    """Tokens by tile to tokens by place in the whole image (r, c, L)."""
    side = round(bits_RCNL.shape[2] ** 0.5)
    return bits_RCNL.unflatten(2, (side, side)).permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)


def join(bits_rcL: Tensor, side: int, patch: int, decode: Callable[[Tensor], Tensor]) -> Tensor:
    """Pixels (3, r · patch, c · patch) of a grid of tokens, without seams.

    Windows of the grid are decoded tile by tile and again shifted by half a tile, so that where one has its edge the
    other has its middle. Near an edge the shifted one takes over, smoothly over a token on each side.

    Args:
        side: tokens of a tile in each direction.
        decode: tokens (n, N, L) of n windows to images (n, 3, side · patch, side · patch).
    """
    rows, columns, _ = bits_rcL.shape
    result = torch.zeros(3, rows * patch, columns * patch)
    half = side // 2
    for down in (0, half) if rows > side else (0,):
        for right in (0, half) if columns > side else (0,):
            tall, wide = (rows - down) // side * side, (columns - right) // side * side
            part_rcL = bits_rcL[down : down + tall, right : right + wide]
            windows = part_rcL.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2)
            pixels = decode(windows.flatten(0, 1).flatten(1, 2))
            pixels = pixels.unflatten(0, windows.shape[:2]).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
            weight_H1 = _weight(rows, side, patch, down)[:, None]
            weight_HW = weight_H1 * _weight(columns, side, patch, right)
            place = slice(down * patch, (down + tall) * patch), slice(right * patch, (right + wide) * patch)
            result[:, place[0], place[1]] += pixels.cpu() * weight_HW[place]
    return result


def _weight(tokens: int, side: int, patch: int, shift: int) -> Tensor:
    """Share of the windows shifted by `shift` tokens at each pixel along one direction; both shares add up to 1."""
    pixel = torch.arange(tokens * patch) + 0.5
    length = side * patch
    to_seam = (pixel / length - (pixel / length).round()).abs() * length
    # The image's own edges are no seams.
    seam = (pixel / length).round()
    outer = (seam == 0) | (seam * side >= tokens)
    share = (to_seam / patch).clamp(max=1.0)
    own = torch.where(outer, torch.ones_like(share), 0.5 - 0.5 * torch.cos(torch.pi * share))
    return 1 - own if shift else own
