"""Pixels of tiles to tokens, and tokens to pixels that are equal to the last bit on every machine.

    encode: tiles ─fp32─▶ tokens               decode: tokens ─fp64─▶ windows ─▶ blended over seams ─▶ 8 bits

8-bit values are rounded from fp64. Machines differ by 1e-13 of a level in fp64, which practically never crosses a
rounding boundary. With fp32 it happens in every image.

Shape suffixes: B tiles, C colors, T frames, H and W pixels, N tokens of a tile, L bits of a token, R and C rows and
columns of tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bsq_ray.codec.entropy_coding import deterministic_fp32
from bsq_ray.codec.rect import Rect
from bsq_ray.codec.tiles import as_grid, blend_tiles
from bsq_ray.models.tokenizer import Tokenizer, Tokens

_TOKENS_PER_PASS = 8192
# Pixels of all frames blended at once; larger images are decoded in blocks.
_BLOCK_PIXELS = 2**23
_GRAY = 128


class PixelCodec:
    """Runs the tokenizer on tiles.

    Args:
        tokenizer: in evaluation mode, in fp32; its decoder is converted to `decode_dtype` at the first decoding.
        decode_dtype: data type of decoding. fp32 takes half the time of fp64, and pixels may differ by a level between
            machines.
        batch_size: tiles in one pass; None chooses by the number of tokens.
    """

    def __init__(self, tokenizer: Tokenizer, decode_dtype: torch.dtype, batch_size: int | None) -> None:
        model_config = tokenizer.config
        self.tokenizer, self.decode_dtype = tokenizer, decode_dtype
        self.grid_size = model_config.grid_size
        self._batch_size = batch_size

    @property
    def _device(self) -> torch.device:
        return self.tokenizer.last_layer.device

    def _tiles_per_pass(self, frames: int) -> int:
        return self._batch_size or max(1, _TOKENS_PER_PASS // (frames * self.grid_size**2))

    def encode(self, tiles_BCTHW: Tensor, check_cancelled: Callable[[], None]) -> Tensor:
        """Encode uint8 tiles to bits (B, N, L).

        `check_cancelled` is called before each pass; an exception raised by it stops the encoding.
        """
        parts = []
        with deterministic_fp32(self._device):
            for part in tiles_BCTHW.split(self._tiles_per_pass(tiles_BCTHW.shape[2])):
                check_cancelled()
                parts.append(self.tokenizer.encode(part.to(self._device).float().div_(127.5).sub_(1)).bits_BNL.cpu())
        return torch.cat(parts)

    def decode_region(
        self,
        bits_RCNL: Tensor,
        available_RC: Tensor,
        frames: int,
        region: Rect,
        check_cancelled: Callable[[], None],
    ) -> Tensor:
        """Decode a region to uint8 pixels (3, T, H, W); missing tiles are gray.

        Args:
            bits_RCNL: tokens of the tiles of the region and of those next to it, which take part in blending its seams.
            available_RC: False for missing tiles.
            frames: number of frames T.
            region: in pixels, counted from the top left corner of these tiles.
            check_cancelled: called before each pass; an exception raised by it stops the decoding.
        """
        tile = self.tokenizer.config.image_size
        all_tiles = Rect(0, 0, *bits_RCNL.shape[:2])
        result_CTHW = torch.empty(3, frames, region.height, region.width, dtype=torch.uint8)
        for block in region.cover(tile).blocks(max(1, int((_BLOCK_PIXELS / frames) ** 0.5) // tile)):
            # Tiles of the block and those next to it; only the pixels of the block are kept.
            context, inner = block.grow(1).intersect(all_tiles), block.scale(tile).intersect(region)
            block_CTHW = self._decode_block(bits_RCNL, available_RC, frames, context, check_cancelled)
            source, target = inner.relative_to(context.scale(tile)), inner.relative_to(region)
            result_CTHW[:, :, *target.slices()] = block_CTHW[:, :, *source.slices()]
        return result_CTHW

    def _decode_block(
        self,
        bits_RCNL: Tensor,
        available_RC: Tensor,
        frames: int,
        tiles: Rect,
        check_cancelled: Callable[[], None],
    ) -> Tensor:
        """Decode a rectangle of tiles to uint8 pixels (3, T, H, W)."""
        tile = self.tokenizer.config.image_size
        grid_trcL = as_grid(bits_RCNL[tiles.slices()], frames)
        pixels_CTHW = blend_tiles(
            grid_trcL, self.grid_size, self.tokenizer.config.patch_size, partial(self._decode_windows, check_cancelled)
        )
        pixels_CTHW = pixels_CTHW.add_(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        available_HW = available_RC[tiles.slices()].repeat_interleave(tile, 0).repeat_interleave(tile, 1)
        return torch.where(available_HW, pixels_CTHW, torch.full_like(pixels_CTHW, _GRAY))

    def _decode_windows(self, check_cancelled: Callable[[], None], bits_BNL: Tensor) -> Tensor:
        """Decode windows to (B, 3, T, H, W) on the CPU, fp32 values."""
        frames = bits_BNL.shape[1] // self.grid_size**2
        grid, parts = (frames, self.grid_size, self.grid_size), []
        if self.tokenizer.from_code.weight.dtype != self.decode_dtype:
            for module in (self.tokenizer.from_code, self.tokenizer.decoder):
                module.to(self.decode_dtype)
        with deterministic_fp32(self._device):
            for part in bits_BNL.split(self._tiles_per_pass(frames)):
                check_cancelled()
                windows = self.tokenizer.decode(Tokens(part.to(self._device), grid)).cpu()
                parts.append(windows if windows.ndim == 5 else windows.unsqueeze(2))
        return torch.cat(parts)
