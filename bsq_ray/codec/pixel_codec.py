"""Pixels of tiles to tokens, and tokens to pixels that are equal to the last bit on every machine.

    encode: pixels ─fp32─▶ tokens of each tile          decode: tokens ─fp64─▶ pixels ─▶ 8 bits

Tokenizers with learned positions (`TilePixelCodec`) encode tile by tile, and decode windows that are blended over the
seams between tiles. Tokenizers with local attention (`LocalPixelCodec`) have no seams: frames are computed as a whole,
and large ones in blocks with all tokens that take part in them. Their tiles only group tokens in the file.

8-bit values are rounded from fp64. Machines differ by 1e-13 of a level in fp64, which practically never crosses a
rounding boundary. With fp32 it happens in every image.

Shape suffixes: B tiles, C colors, T frames, H and W pixels, R and C rows and columns of tiles, N tokens of a tile, L
bits of a token; t frames, r and c rows and columns of tokens of the whole image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor

from bsq_ray.codec.entropy_coding import deterministic_fp32
from bsq_ray.codec.rect import Rect
from bsq_ray.codec.tiles import as_grid, as_tiles, blend_tiles, pad_to_tiles, split_tiles
from bsq_ray.models.tokenizer import Tokenizer, Tokens

_TOKENS_PER_PASS = 8192
# Pixels of all frames decoded at once; larger images are decoded in blocks.
_BLOCK_PIXELS = 2**23
# Tokens computed at once by local attention, with those around a block.
_LOCAL_BLOCK_TOKENS = 2**14
# Smallest rows and columns of tokens of such a block, without those around it.
_MIN_LOCAL_BLOCK_SIDE = 32
_GRAY = 128


class PixelCodec(ABC):
    """Runs the tokenizer on an image or clip of any size.

    Args:
        tokenizer: in evaluation mode, in fp32; its decoder is converted to `decode_dtype` at the first decoding.
        decode_dtype: data type of decoding. fp32 takes half the time of fp64, and pixels may differ by a level between
            machines.
        batch_size: tiles in one pass; None chooses by the number of tokens.
        grid_size: rows and columns of tokens of a tile; other than the tokenizer's only if it takes any size.

    Attributes:
        context_tiles: number of tiles around a region that take part in decoding it.
    """

    context_tiles: int

    def __init__(self, tokenizer: Tokenizer, decode_dtype: torch.dtype, batch_size: int | None, grid_size: int) -> None:
        self.tokenizer, self.decode_dtype = tokenizer, decode_dtype
        self.tile_size, self.grid_size = grid_size * tokenizer.config.patch_size, grid_size
        self._batch_size = batch_size

    @abstractmethod
    def encode_tiles(self, pixels_CTHW: Tensor, tiles: Rect, check_cancelled: Callable[[], None]) -> Tensor:
        """Encode a rectangle of tiles of uint8 frames to bits (R, C, N, L); edges are replicated to whole tiles.

        `check_cancelled` is called before each pass; an exception raised by it stops the encoding.
        """

    def rows_of_groups(self, columns: int, group_size: int) -> int:
        """Return how many rows of groups of tiles to encode at once; `columns` is the number of tiles in a row."""
        return 1

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
            bits_RCNL: tokens of the tiles of the region and of the `context_tiles` around it.
            available_RC: False for missing tiles.
            frames: number of frames T.
            region: in pixels, counted from the top left corner of these tiles.
            check_cancelled: called before each pass; an exception raised by it stops the decoding.
        """
        self._convert_decoder()
        tile, decodable_RC = self.tile_size, self._decodable_tiles(available_RC)
        all_tiles = Rect(0, 0, *bits_RCNL.shape[:2])
        result_CTHW = torch.empty(3, frames, region.height, region.width, dtype=torch.uint8)
        for block in region.cover(tile).blocks(self._block_tiles(frames)):
            # Tiles of the block and those around it; only the pixels of the block are kept.
            context, inner = block.grow(self.context_tiles).intersect(all_tiles), block.scale(tile).intersect(region)
            block_CTHW = self._decode_block(bits_RCNL, decodable_RC, frames, context, check_cancelled)
            source, target = inner.relative_to(context.scale(tile)), inner.relative_to(region)
            result_CTHW[:, :, *target.slices()] = block_CTHW[:, :, *source.slices()]
        return result_CTHW

    @abstractmethod
    def _block_tiles(self, frames: int) -> int:
        """Return the tiles in each direction of a block that is decoded at once."""

    def _decodable_tiles(self, available_RC: Tensor) -> Tensor:
        """Return the tiles whose pixels do not depend on missing tiles, beyond the blending of seams."""
        return available_RC

    @abstractmethod
    def _decode_grid(self, bits_trcL: Tensor, check_cancelled: Callable[[], None]) -> Tensor:
        """Decode a token grid of whole tiles to fp64 pixels (3, T, H, W) in [-1, 1] on the CPU."""

    @property
    def _device(self) -> torch.device:
        return self.tokenizer.last_layer.device

    def _encode(self, pixels: Tensor) -> Tensor:
        """Encode uint8 clips (B, 3, T, H, W) to bits (B, N, L) on the CPU."""
        return self.tokenizer.encode(pixels.to(self._device).float().div_(127.5).sub_(1)).bits_BNL.cpu()

    def _decode_block(
        self,
        bits_RCNL: Tensor,
        decodable_RC: Tensor,
        frames: int,
        tiles: Rect,
        check_cancelled: Callable[[], None],
    ) -> Tensor:
        """Decode a rectangle of tiles to uint8 pixels (3, T, H, W); tiles that are not decodable are gray."""
        pixels_CTHW = self._decode_grid(as_grid(bits_RCNL[tiles.slices()], frames), check_cancelled)
        pixels_CTHW = pixels_CTHW.add_(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        decodable_HW = decodable_RC[tiles.slices()]
        if bool(decodable_HW.all()):
            return pixels_CTHW
        for dimension in (0, 1):
            decodable_HW = decodable_HW.repeat_interleave(self.tile_size, dimension)
        return torch.where(decodable_HW, pixels_CTHW, torch.full_like(pixels_CTHW, _GRAY))

    def _convert_decoder(self) -> None:
        if self.tokenizer.from_code.weight.dtype != self.decode_dtype:
            for module in (self.tokenizer.from_code, self.tokenizer.decoder):
                module.to(self.decode_dtype)


class TilePixelCodec(PixelCodec):
    """Tokenizers that take images of one size."""

    # Those next to a region take part in blending its seams.
    context_tiles = 1

    def encode_tiles(self, pixels_CTHW: Tensor, tiles: Rect, check_cancelled: Callable[[], None]) -> Tensor:
        """Encode each tile alone."""
        tiles_RCCTHW = split_tiles(pixels_CTHW[:, :, *tiles.scale(self.tile_size).slices()], self.tile_size)
        tiles_BCTHW, parts = tiles_RCCTHW.flatten(0, 1), []
        with deterministic_fp32(self._device):
            for part in tiles_BCTHW.split(self._tiles_per_pass(tiles_BCTHW.shape[2])):
                check_cancelled()
                parts.append(self._encode(part))
        return torch.cat(parts).unflatten(0, tiles_RCCTHW.shape[:2])

    def _decode_grid(self, bits_trcL: Tensor, check_cancelled: Callable[[], None]) -> Tensor:
        decode_windows = partial(self._decode_windows, check_cancelled)
        return blend_tiles(bits_trcL, self.grid_size, self.tokenizer.config.patch_size, decode_windows)

    def _decode_windows(self, check_cancelled: Callable[[], None], bits_BNL: Tensor) -> Tensor:
        """Decode windows to (B, 3, T, H, W) on the CPU, fp32 values."""
        frames = bits_BNL.shape[1] // self.grid_size**2
        grid, parts = (frames, self.grid_size, self.grid_size), []
        with deterministic_fp32(self._device):
            for part in bits_BNL.split(self._tiles_per_pass(frames)):
                check_cancelled()
                windows = self.tokenizer.decode(Tokens(part.to(self._device), grid)).cpu()
                parts.append(windows if windows.ndim == 5 else windows.unsqueeze(2))
        return torch.cat(parts)

    def _block_tiles(self, frames: int) -> int:
        return max(1, int((_BLOCK_PIXELS / frames) ** 0.5) // self.tile_size)

    def _tiles_per_pass(self, frames: int) -> int:
        return self._batch_size or max(1, _TOKENS_PER_PASS // (frames * self.grid_size**2))


class LocalPixelCodec(PixelCodec):
    """Tokenizers of frames of any size, in which a token attends to its neighborhood only.

    The number of tokens limits a pass; `batch_size` has no effect.
    """

    def __init__(self, tokenizer: Tokenizer, decode_dtype: torch.dtype, batch_size: int | None, grid_size: int) -> None:
        super().__init__(tokenizer, decode_dtype, batch_size, grid_size)
        model_config = tokenizer.config
        assert model_config.attention_radius is not None
        # In each layer a token depends on those at most the radius away.
        receptive_radius = model_config.attention_radius * max(model_config.encoder.layers, model_config.decoder.layers)
        # Blocks and their contexts start at multiples of the period of the position embeddings, which count from there.
        self._aligned_tiles = lcm(grid_size, model_config.position_period) // grid_size
        self.context_tiles = _round_up(-(-receptive_radius // grid_size), self._aligned_tiles)

    def rows_of_groups(self, columns: int, group_size: int) -> int:
        """Return enough rows for a block, so that few tiles are computed again as the context of others."""
        return max(1, _LOCAL_BLOCK_TOKENS // (columns * group_size * self.grid_size**2))

    def encode_tiles(self, pixels_CTHW: Tensor, tiles: Rect, check_cancelled: Callable[[], None]) -> Tensor:
        """Encode blocks of tiles together with the tiles around them."""
        frames, height, width = pixels_CTHW.shape[1:]
        all_tiles = Rect(0, 0, height, width).cover(self.tile_size)
        bits_RCNL: Tensor | None = None
        for block in tiles.blocks(self._block_tiles(frames)):
            check_cancelled()
            inner, context = block.intersect(tiles), block.grow(self.context_tiles).intersect(all_tiles)
            padded_CTHW = pad_to_tiles(pixels_CTHW[:, :, *context.scale(self.tile_size).slices()], self.tile_size)
            with deterministic_fp32(self._device):
                bits_NL = self._encode(padded_CTHW[None])[0]
            grid_trcL = bits_NL.unflatten(0, (frames, context.height * self.grid_size, context.width * self.grid_size))
            if bits_RCNL is None:
                shape = tiles.height, tiles.width, frames * self.grid_size**2, bits_NL.shape[1]
                bits_RCNL = torch.empty(shape, dtype=torch.bool)
            block_RCNL = as_tiles(grid_trcL, self.grid_size)[inner.relative_to(context).slices()]
            bits_RCNL[inner.relative_to(tiles).slices()] = block_RCNL
        assert bits_RCNL is not None
        return bits_RCNL

    def _block_tiles(self, frames: int) -> int:
        side = int((_LOCAL_BLOCK_TOKENS / frames) ** 0.5) // self.grid_size - 2 * self.context_tiles
        # The context of a deep model has more tokens; much smaller blocks would compute it over and over.
        min_side = _round_up(-(-_MIN_LOCAL_BLOCK_SIDE // self.grid_size), self._aligned_tiles)
        return max(min_side, side // self._aligned_tiles * self._aligned_tiles)

    def _decodable_tiles(self, available_RC: Tensor) -> Tensor:
        if bool(available_RC.all()):
            return available_RC
        side = 2 * self.context_tiles + 1
        missing_11RC = (~available_RC)[None, None].float()
        near_missing = F.max_pool2d(missing_11RC, side, stride=1, padding=self.context_tiles)
        return near_missing[0, 0] == 0

    def _decode_grid(self, bits_trcL: Tensor, check_cancelled: Callable[[], None]) -> Tensor:
        check_cancelled()
        grid = bits_trcL.shape[0], bits_trcL.shape[1], bits_trcL.shape[2]
        with deterministic_fp32(self._device):
            [pixels] = self.tokenizer.decode(Tokens(bits_trcL.flatten(0, 2)[None].to(self._device), grid))
            return (pixels if pixels.ndim == 4 else pixels.unsqueeze(1)).cpu().double()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def build_pixel_codec(
    tokenizer: Tokenizer, decode_dtype: torch.dtype, batch_size: int | None, grid_size: int
) -> PixelCodec:
    """Build the pixel codec for the attention of a tokenizer; arguments as of `PixelCodec`.

    Raises:
        ValueError: the tokenizer takes any size, and each token attends to all others.
    """
    if tokenizer.config.any_size and not tokenizer.config.has_local_attention:
        raise ValueError(
            "the codec needs local attention for images of any size, because its cost is linear in their size; train "
            "the tokenizer with model.attention_radius, such as 4"
        )
    codec_class = LocalPixelCodec if tokenizer.config.has_local_attention else TilePixelCodec
    return codec_class(tokenizer, decode_dtype, batch_size, grid_size)
