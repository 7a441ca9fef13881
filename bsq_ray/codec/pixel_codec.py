"""Pixels of tiles to tokens, and tokens to pictures that are the same to the last bit on every machine.

    encode: tiles ─fp32─▶ tokens               decode: tokens ─fp64─▶ windows ─▶ blended over seams ─▶ 8 bits

An 8-bit value is decided in fp64, where machines differ by 1e-13 of a level: practically never across a rounding
boundary, as fp32 does in every picture.

Shape suffixes: B tiles, C colours, T frames, H and W pixels, N tokens of a tile, L bits of a token, R and C rows and
columns of tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bsq_ray.codec.entropy_coding import deterministic_fp32
from bsq_ray.codec.tiles import as_grid, blend_tiles
from bsq_ray.data.transforms import to_float
from bsq_ray.models.tokenizer import Tokenizer, Tokens

_TOKENS_PER_PASS = 8192
# Pixels of all frames that are blended at once; larger pictures are put together from blocks.
_BLOCK_PIXELS = 2**23
_GRAY = 128


class PixelCodec:
    """The tokenizer at work on tiles.

    Args:
        tokenizer: in evaluation mode, in fp32; its decoder is kept in `arithmetic` once it has been used.
        arithmetic: of decoding; fp32 takes half the time, and pixels may then differ by a level between machines.
        batch: tiles that go through the tokenizer at once; None chooses by their tokens.
    """

    def __init__(self, tokenizer: Tokenizer, decode_dtype: torch.dtype, batch_size: int | None) -> None:
        model_config = tokenizer.config
        self.tokenizer, self.decode_dtype = tokenizer, decode_dtype
        self.side = model_config.image_size // model_config.patch_size
        self._batch_size = batch_size

    @property
    def _device(self) -> torch.device:
        return self.tokenizer.last_layer.device

    def _tiles_per_pass(self, frames: int) -> int:
        return self._batch_size or max(1, _TOKENS_PER_PASS // (frames * self.side**2))

    def encode(self, tiles_BCTHW: Tensor, check_deadline: Callable[[], None]) -> Tensor:
        """uint8 tiles to bits (B, N, L); `check` is called before each pass, and what it raises ends the work."""
        parts = []
        with deterministic_fp32(self._device):
            for part in tiles_BCTHW.split(self._tiles_per_pass(tiles_BCTHW.shape[2])):
                check_deadline()
                parts.append(self.tokenizer.encode(to_float(part.to(self._device))).bits_BNL.cpu())
        return torch.cat(parts)

    def decode_region(
        self,
        bits_RCNL: Tensor,
        available_RC: Tensor,
        frames: int,
        box: tuple[int, int, int, int],
        check_deadline: Callable[[], None],
    ) -> Tensor:
        """A part of a picture, uint8 (3, T, H, W); tiles that are not known are grey.

        Args:
            bits_RCNL: tokens of tiles around the part; those next to it take part in blending its seams.
            box: left, top, right and lower edge in pixels of these tiles.
            check: called before each pass; what it raises ends the work.
        """
        tile = self.tokenizer.config.image_size
        left, top, right, bottom = box
        result = torch.empty(3, frames, bottom - top, right - left, dtype=torch.uint8)
        block_tiles = max(1, int((_BLOCK_PIXELS / frames) ** 0.5) // tile)
        for row in range(top // tile, -(-bottom // tile), block_tiles):
            for column in range(left // tile, -(-right // tile), block_tiles):
                rows = range(max(0, row - 1), min(bits_RCNL.shape[0], row + block_tiles + 1))
                columns = range(max(0, column - 1), min(bits_RCNL.shape[1], column + block_tiles + 1))
                block_CTHW = self._decode_block(bits_RCNL, available_RC, frames, rows, columns, check_deadline)
                pixel_rows = range(max(top, row * tile), min(bottom, (row + block_tiles) * tile))
                pixel_columns = range(max(left, column * tile), min(right, (column + block_tiles) * tile))
                result[
                    :,
                    :,
                    pixel_rows.start - top : pixel_rows.stop - top,
                    pixel_columns.start - left : pixel_columns.stop - left,
                ] = block_CTHW[
                    :,
                    :,
                    pixel_rows.start - rows.start * tile : pixel_rows.stop - rows.start * tile,
                    pixel_columns.start - columns.start * tile : pixel_columns.stop - columns.start * tile,
                ]
        return result

    def _decode_block(
        self,
        bits_RCNL: Tensor,
        available_RC: Tensor,
        frames: int,
        rows: range,
        columns: range,
        check_deadline: Callable[[], None],
    ) -> Tensor:
        block_slices = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        tile = self.tokenizer.config.image_size
        grid_trcL = as_grid(bits_RCNL[block_slices], frames)
        pixels_CTHW = blend_tiles(
            grid_trcL, self.side, self.tokenizer.config.patch_size, partial(self._decode_windows, check_deadline)
        )
        pixels_CTHW = pixels_CTHW.add_(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        available_HW = available_RC[block_slices].repeat_interleave(tile, 0).repeat_interleave(tile, 1)
        return torch.where(available_HW, pixels_CTHW, torch.full_like(pixels_CTHW, _GRAY))

    def _decode_windows(self, check_deadline: Callable[[], None], bits_BNL: Tensor) -> Tensor:
        """Windows (B, 3, T, H, W), fp32 values on the CPU."""
        frames = bits_BNL.shape[1] // self.side**2
        grid, parts = (frames, self.side, self.side), []
        if self.tokenizer.from_code.weight.dtype != self.decode_dtype:
            for module in (self.tokenizer.from_code, self.tokenizer.decoder):
                module.to(self.decode_dtype)
        with deterministic_fp32(self._device):
            for part in bits_BNL.split(self._tiles_per_pass(frames)):
                check_deadline()
                windows = self.tokenizer.decode(Tokens(part.to(self._device), grid)).cpu()
                parts.append(windows if windows.ndim == 5 else windows.unsqueeze(2))
        return torch.cat(parts)
