"""Tokens of frames at their own size, and pixels of such tokens, for tokenizers with local attention.

    frames (3, T, H, W) ─replicate edges─▶ whole patches ─encode─▶ tokens of their grid
    tokens ─decode─▶ whole patches ─crop─▶ frames

A token depends on its neighborhood only, so large frames are computed in blocks. The memory of a block does not grow
with the size of the frames, but with their number, and with layers and width of the model: a block has at least 32 x 32
tokens of every frame, and those around it that take part in them.

Shape suffixes: T frames, H and W pixels, t frames, r rows and c columns of tokens, L bits of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from bsq_ray.codec.pixel_codec import build_pixel_codec
from bsq_ray.codec.rect import Rect
from bsq_ray.models.tokenizer import Tokenizer


class WholeFrameCoder:
    """Encodes and decodes images and clips of up to the tokenizer's number of frames, in fp32.

    Args:
        tokenizer: a tokenizer with local attention.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.config.has_local_attention
        self._patch_size = tokenizer.config.patch_size
        # Tiles of one token: frames are padded to whole patches only.
        self._pixel_codec = build_pixel_codec(tokenizer, torch.float32, None, grid_size=1)

    def encode(self, pixels_3THW: Tensor, check_cancelled: Callable[[], None] = lambda: None) -> Tensor:
        """Encode uint8 frames to bits (t, r, c, L).

        Args:
            check_cancelled: called before each pass; an exception raised by it stops the encoding.
        """
        grid = Rect(0, 0, *pixels_3THW.shape[2:]).cover(self._patch_size)
        return self._pixel_codec.encode_tiles(pixels_3THW, grid, check_cancelled).permute(2, 0, 1, 3)

    def decode(
        self, bits_trcL: Tensor, size_hw: tuple[int, int], check_cancelled: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Decode the upper left part of frames to uint8 pixels (3, T, H, W).

        Args:
            size_hw: height and width of this part; at most those of the whole patches.
            check_cancelled: as in `encode`.
        """
        available_rc = torch.ones(bits_trcL.shape[1:3], dtype=torch.bool)
        region = Rect(0, 0, *size_hw)
        return self._pixel_codec.decode_region(
            bits_trcL.permute(1, 2, 0, 3), available_rc, len(bits_trcL), region, check_cancelled
        )


def check_frame_sizes(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the frames (H, W, 3) of a video that keeps its size.

    Raises:
        ValueError: a frame has another size than the first one.
    """
    first_hw: tuple[int, ...] | None = None
    for number, frame in enumerate(frames):
        height, width = frame.shape[:2]
        first_hw = first_hw or (height, width)
        if (height, width) != first_hw:
            raise ValueError(
                f"frame {number} of the video has {width} x {height} pixels and frame 0 {first_hw[1]} x {first_hw[0]}, "
                "but this model keeps the size of a video; convert it to one size first"
            )
        yield frame
