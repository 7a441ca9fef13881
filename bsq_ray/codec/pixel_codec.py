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

from bsq_ray.codec.entropy_coding import plain_arithmetic
from bsq_ray.codec.tiles import as_grid, join
from bsq_ray.data.transforms import to_float
from bsq_ray.models.tokenizer import Tokenizer, Tokens

_PASS = 8192
# Pixels of all frames that are blended at once; larger pictures are put together from blocks.
_BLOCK_PIXELS = 2**23
_GREY = 128


class PixelCoder:
    """The tokenizer at work on tiles.

    Args:
        tokenizer: in evaluation mode, in fp32; its decoder is kept in `arithmetic` once it has been used.
        arithmetic: of decoding; fp32 takes half the time, and pixels may then differ by a level between machines.
        batch: tiles that go through the tokenizer at once; None chooses by their tokens.
    """

    def __init__(self, tokenizer: Tokenizer, arithmetic: torch.dtype, batch: int | None) -> None:
        section = tokenizer.config
        self.tokenizer, self.arithmetic = tokenizer, arithmetic
        self.side = section.image_size // section.patch_size
        self._batch = batch

    @property
    def _device(self) -> torch.device:
        return self.tokenizer.last_layer.device

    def _tiles_at_once(self, frames: int) -> int:
        return self._batch or max(1, _PASS // (frames * self.side**2))

    def encode(self, tiles_BCTHW: Tensor, check: Callable[[], None]) -> Tensor:
        """uint8 tiles to bits (B, N, L); `check` is called before each pass, and what it raises ends the work."""
        parts = []
        with plain_arithmetic(self._device):
            for part in tiles_BCTHW.split(self._tiles_at_once(tiles_BCTHW.shape[2])):
                check()
                parts.append(self.tokenizer.encode(to_float(part.to(self._device))).bits_BNL.cpu())
        return torch.cat(parts)

    def picture(
        self,
        bits_RCNL: Tensor,
        known_RC: Tensor,
        frames: int,
        box: tuple[int, int, int, int],
        check: Callable[[], None],
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
        step = max(1, int((_BLOCK_PIXELS / frames) ** 0.5) // tile)
        for row in range(top // tile, -(-bottom // tile), step):
            for column in range(left // tile, -(-right // tile), step):
                rows = range(max(0, row - 1), min(bits_RCNL.shape[0], row + step + 1))
                columns = range(max(0, column - 1), min(bits_RCNL.shape[1], column + step + 1))
                block_CTHW = self._block(bits_RCNL, known_RC, frames, rows, columns, check)
                down = range(max(top, row * tile), min(bottom, (row + step) * tile))
                across = range(max(left, column * tile), min(right, (column + step) * tile))
                result[:, :, down.start - top : down.stop - top, across.start - left : across.stop - left] = block_CTHW[
                    :,
                    :,
                    down.start - rows.start * tile : down.stop - rows.start * tile,
                    across.start - columns.start * tile : across.stop - columns.start * tile,
                ]
        return result

    def _block(
        self,
        bits_RCNL: Tensor,
        known_RC: Tensor,
        frames: int,
        rows: range,
        columns: range,
        check: Callable[[], None],
    ) -> Tensor:
        place = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        tile = self.tokenizer.config.image_size
        grid_trcL = as_grid(bits_RCNL[place], frames)
        pixels_CTHW = join(grid_trcL, self.side, self.tokenizer.config.patch_size, partial(self._decode, check))
        pixels_CTHW = pixels_CTHW.add_(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        known_HW = known_RC[place].repeat_interleave(tile, 0).repeat_interleave(tile, 1)
        return torch.where(known_HW, pixels_CTHW, torch.full_like(pixels_CTHW, _GREY))

    def _decode(self, check: Callable[[], None], bits_BNL: Tensor) -> Tensor:
        """Windows (B, 3, T, H, W), fp32 values on the CPU."""
        frames = bits_BNL.shape[1] // self.side**2
        grid, parts = (frames, self.side, self.side), []
        if self.tokenizer.from_code.weight.dtype != self.arithmetic:
            for module in (self.tokenizer.from_code, self.tokenizer.decoder):
                module.to(self.arithmetic)
        with plain_arithmetic(self._device):
            for part in bits_BNL.split(self._tiles_at_once(frames)):
                check()
                windows = self.tokenizer.decode(Tokens(part.to(self._device), grid)).cpu()
                parts.append(windows if windows.ndim == 5 else windows.unsqueeze(2))
        return torch.cat(parts)
